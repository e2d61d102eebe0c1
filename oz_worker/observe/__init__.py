"""What operators see: logs and status."""
