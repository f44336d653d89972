"""llamaslot: a streaming proxy before llama.cpp's llama-server that sends each prompt to the KV cache with
its prefix.
"""

__version__ = "0.1.0"
