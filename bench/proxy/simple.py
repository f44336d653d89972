"""A proxy of thirty lines, as one writes it with aiohttp: ``python -m bench.proxy.simple PORT UPSTREAM_URL``."""

import sys
from collections.abc import AsyncIterator

import aiohttp
import uvloop
from aiohttp import web

HOP_BY_HOP = {"Host", "Connection", "Keep-Alive", "Transfer-Encoding", "Content-Length", "Content-Encoding"}
session_of = web.AppKey("session_of", aiohttp.ClientSession)


async def opened(app: web.Application) -> AsyncIterator[None]:
    connector = aiohttp.TCPConnector(
        limit=0, force_close=True
    )  # llama-server closes kept ones without notice
    timeout = aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout, auto_decompress=False) as session:
        app[session_of] = session
        yield


async def handle(request: web.Request) -> web.StreamResponse:
    headers = {name: value for name, value in request.headers.items() if name not in HOP_BY_HOP}
    url, body = sys.argv[2] + request.path_qs, await request.read()
    async with request.app[session_of].request(request.method, url, data=body, headers=headers) as upstream:
        kept = {name: value for name, value in upstream.headers.items() if name not in HOP_BY_HOP}
        response = web.StreamResponse(status=upstream.status, headers=kept)
        await response.prepare(request)
        async for piece in upstream.content.iter_any():
            await response.write(piece)
        await response.write_eof()
        return response


if __name__ == "__main__":
    app = web.Application(client_max_size=1 << 30)
    app.cleanup_ctx.append(opened)
    app.router.add_route("*", "/{path:.*}", handle)
    web.run_app(
        app,
        host="127.0.0.1",
        port=int(sys.argv[1]),
        backlog=4_096,  # as nginx here: by default the kernel drops some of 1,000 clients, who try again after a second
        loop=uvloop.new_event_loop(),
        print=None,
        access_log=None,
    )
