"""A llama-server that llamaslot starts itself."""
