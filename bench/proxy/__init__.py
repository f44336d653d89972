"""``python -m bench.proxy``: what llamaslot adds to each request and event, beside other proxies."""
