"""config.yaml: its sections, their values, and the faults of a file."""
