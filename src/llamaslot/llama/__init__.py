"""All that knows llama-server and its quirks."""
