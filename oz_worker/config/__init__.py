"""From YAML, environment and flags to frozen option classes; every mistake with its place."""
