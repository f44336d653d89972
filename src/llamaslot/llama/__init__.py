"""All code that depends on llama-server's interfaces and behaviour."""
