"""The only room that knows aiohttp.web."""
