"""One llama-server process: all that is here ends with it."""
