"""config.yaml: its sections, their values, and what is wrong with a file."""
