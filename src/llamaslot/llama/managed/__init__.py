"""llama-servers that llamaslot starts, watches and ends itself."""
