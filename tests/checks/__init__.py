"""`check`: each test of it against what it is meant to find."""
