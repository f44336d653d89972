"""HTTP to llama-server: how bytes are sent and received. ``LlamaServer`` in ``llama.client`` chooses the sender."""
