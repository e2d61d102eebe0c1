"""Metrics and traces over OTLP, received by a collector of our own."""
