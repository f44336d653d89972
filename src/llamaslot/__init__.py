"""llamaslot: a streaming proxy that finds the KV cache of each prompt in front of llama.cpp's llama-server."""

__version__ = "0.1.0"
