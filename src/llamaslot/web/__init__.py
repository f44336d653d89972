"""The only place that knows aiohttp.web."""
