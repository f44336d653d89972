"""From a request body to the exact tokens that llama-server will use for it."""
