"""A server that is measured: its model and context, a request to it, and its counters. It may be any server with
OpenAI's chat completions.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote, urlsplit

import aiohttp
import orjson

from llamaslot.bench.result import Request
from llamaslot.errors import LlamaslotError
from llamaslot.llama.sse import EventSplitter, data_of

#: Names of a counter of prompt tokens computed, less those of the second, which are in it without being computed.
_COUNTERS = (
    ("llamacpp:prompt_tokens_total", None),
    ("vllm:prompt_tokens_total", "vllm:prefix_cache_hits_total"),
)
_QUICK_S = 10.0  # for questions that need no computing


class BenchError(LlamaslotError):
    """The server cannot be measured; the text says why, and what to do."""


class ContextTooSmall(Exception):
    """The server refused a prompt as too long: the context has only ``n_ctx`` tokens."""

    def __init__(self, n_ctx: int) -> None:
        super().__init__(f"a context of {n_ctx} tokens")
        self.n_ctx = n_ctx


class Target:
    """The client of one base URL; an async context manager. ``keys``: API keys, which the users share out."""

    def __init__(
        self,
        url: str,
        *,
        name: str,
        keys: Sequence[str],
        model: str | None,
        timeout_s: float,
        key_flag: str = "--key",
    ) -> None:
        parts = urlsplit(url if "://" in url else f"http://{url}")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise BenchError(f"{url}: should be an address such as http://127.0.0.1:8081/v1")
        path = parts.path.rstrip("/")
        self.root = f"{parts.scheme}://{parts.netloc}{path.removesuffix('/v1')}"
        self.base = f"{parts.scheme}://{parts.netloc}{path or '/v1'}"
        self.name, self.model = name, model or ""
        self.n_ctx: int | None = None
        self.about = ""
        self._keys, self._timeout_s, self._key_flag = keys, timeout_s, key_flag
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Target:
        self._session = aiohttp.ClientSession(
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=_QUICK_S, sock_read=self._timeout_s),
            # llama-server closes a kept connection after a stream without saying so
            connector=aiohttp.TCPConnector(limit=0, force_close=True),
            read_bufsize=1 << 20,
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._session is not None:
            await self._session.close()

    @property
    def session(self) -> aiohttp.ClientSession:
        assert self._session is not None, "entered"
        return self._session

    async def look(self) -> None:
        """Find out the model and the size of its context, and set ``model``, ``n_ctx`` and ``about``. Raises BenchError
        if the server cannot be asked.
        """
        served = await self._models()
        names = [str(entry.get("id")) for entry in served]
        if not self.model:
            if len(names) > 1:
                raise BenchError(
                    f"{self.base} serves several models: choose with --model: {', '.join(names[:20])}"
                )
            self.model = names[0]
        entry = next((entry for entry in served if entry.get("id") == self.model), {})
        if not entry and len(names) > 1:
            raise BenchError(f"{self.base} has no model {self.model}; it has {', '.join(names[:20])}")
        props = await self._json(f"{self.root}/props?model={quote(self.model, safe='')}") or {}
        settings = props.get("default_generation_settings") or {}
        sizes = (settings.get("n_ctx"), entry.get("max_model_len"), (entry.get("meta") or {}).get("n_ctx"))
        self.n_ctx = next((int(size) for size in sizes if size), None)
        told = [f"{props['total_slots']} slots"] if props.get("total_slots") else []
        told += [f"{self.n_ctx:,} tokens each"] if self.n_ctx else []
        told += [f"build {props['build_info']}"] if props.get("build_info") else []
        self.about = ", ".join(told)

    async def _models(self) -> list[dict[str, Any]]:
        try:
            async with (
                asyncio.timeout(_QUICK_S),
                self.session.get(f"{self.base}/models", headers=self._headers(0)) as response,
            ):
                text = await response.text()
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            if isinstance(error, TimeoutError):
                why = "it does not answer"
            elif isinstance(error, aiohttp.ClientSSLError):
                why = "no TLS there; perhaps it is http://"
            else:
                why = getattr(error, "strerror", None) or str(error)
            raise BenchError(f"{self.base} cannot be reached: {why}. Does a server run there?") from None
        if response.status in (401, 403):
            has = "the key is refused" if self._keys else "a key is needed"
            raise BenchError(f"{self.base}: {has} ({self._key_flag})")
        if response.status == 503:
            raise BenchError(f"{self.base} is not ready: {_message(text)}")
        try:
            served = [entry for entry in orjson.loads(text)["data"] if isinstance(entry, dict)]
        except (orjson.JSONDecodeError, KeyError, TypeError):
            raise BenchError(
                f"{self.base}/models: {response.status}, no list of models: it should be an OpenAI base URL, such as "
                f"{self.root}/v1"
            ) from None
        if not served:
            raise BenchError(f"{self.base} serves no model")
        return served

    async def _json(self, url: str) -> dict[str, Any] | None:
        """Return the JSON object at ``url``; None if the server has no such page (some pages are llama.cpp's only)."""
        text = await self._page(url)
        try:
            found = orjson.loads(text or "")
        except orjson.JSONDecodeError:
            return None
        return found if isinstance(found, dict) else None

    async def _page(self, url: str) -> str | None:
        try:
            async with asyncio.timeout(_QUICK_S), self.session.get(url, headers=self._headers(0)) as response:
                return await response.text() if response.status == 200 else None
        except (aiohttp.ClientError, OSError, TimeoutError, UnicodeDecodeError):
            return None

    async def computed(self) -> tuple[str, int] | None:
        """Return the name and the value of the server's counter of computed prompt tokens; None if it has none."""
        page = await self._page(f"{self.root}/metrics") or ""
        for name, less in _COUNTERS:
            if (value := _counter(page, name)) is not None:
                return name, int(value - (_counter(page, less) or 0 if less is not None else 0))
        return None

    def _headers(self, number: int, user: str = "") -> dict[str, str]:
        headers = {"Authorization": f"Bearer {self._keys[number % len(self._keys)]}"} if self._keys else {}
        return {**headers, "x-llamaslot-user": user} if user else headers

    async def ask(
        self,
        messages: Sequence[Mapping[str, str]],
        n_answer: int,
        request: Request,
        began: float,
        number: int = 0,
    ) -> str:
        """Send a chat, read its answer to the end and return the answer's text. Times (since ``began``) and token
        counts are written to ``request``; if something fails, ``request.error`` says what. ``number``: of the user, for
        its key. Raises ContextTooSmall. Canceling closes the connection.
        """
        body = {
            "model": self.model,
            "messages": messages,
            "max_tokens": n_answer,
            "stream": True,
            "stream_options": {"include_usage": True},
            "temperature": 0,
        }
        said: list[str] = []
        try:
            async with self.session.post(
                f"{self.base}/chat/completions",
                data=orjson.dumps(body),
                headers={"Content-Type": "application/json", **self._headers(number, request.user)},
            ) as response:
                if response.status != 200:
                    text = await response.text()
                    _raise_if_too_small(text)
                    request.error = f"{response.status} {_message(text)}"
                else:
                    splitter = EventSplitter()
                    async for chunk in response.content.iter_any():
                        for event in splitter.feed(chunk):
                            if isinstance(data := data_of(event), dict):
                                self._take(data, request, said, began)
        except TimeoutError:
            request.error = f"nothing came for {self._timeout_s:g} s"
        except (aiohttp.ClientError, OSError) as error:
            request.error = f"the connection failed: {type(error).__name__}"
        request.end_s = time.perf_counter() - began
        if not request.error and request.first_s is None:
            if request.n_answer > 1:
                request.first_s = request.end_s
            else:
                request.error = "the answer has no token"
        return "".join(said)

    def _take(self, data: dict[str, Any], request: Request, said: list[str], began: float) -> None:
        """Add one event of an answer to ``request``, and its text to ``said``. Raises ContextTooSmall."""
        if error := data.get("error"):
            text = str(orjson.dumps(error), "utf-8")
            _raise_if_too_small(text)
            request.error = _message(text)
            return
        for choice in data.get("choices") or ():
            delta = choice.get("delta") or {}
            piece = delta.get("content") or ""
            if piece or delta.get("reasoning_content") or delta.get("reasoning") or delta.get("tool_calls"):
                if request.first_s is None:
                    request.first_s = time.perf_counter() - began
                said.append(piece)
        if usage := data.get("usage"):
            request.n_prompt = usage.get("prompt_tokens") or 0
            request.n_answer = usage.get("completion_tokens") or 0
            cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")
            if cached is not None:
                request.n_reused = cached
        if "cache_n" in (timings := data.get("timings") or {}):
            request.n_reused = timings["cache_n"]
            request.n_prompt = timings["cache_n"] + timings["prompt_n"]
            request.n_answer = timings["predicted_n"]


def _counter(page: str, name: str) -> float | None:
    """Return the sum of the Prometheus counter ``name`` over all its labels; None if the page has no such counter."""
    values = re.findall(rf"^{re.escape(name)}(?:\{{[^}}]*\}})? (\S+)", page, re.M)
    return sum(map(float, values)) if values else None


def _raise_if_too_small(text: str) -> None:
    """Raise ContextTooSmall if the text of an error says so, as llama.cpp, vLLM and others write it."""
    if (found := re.search(r'"n_ctx":\s*(\d+)', text)) or (
        found := re.search(r"maximum context length is (\d+)", text)
    ):
        raise ContextTooSmall(int(found[1]))


def _message(text: str) -> str:
    """Return the message of an error answer as one line of at most 160 characters."""
    try:
        told = orjson.loads(text)
        told = told.get("error", told)
        text = told if isinstance(told, str) else str(told.get("message", text))
    except (orjson.JSONDecodeError, AttributeError):
        pass
    return " ".join(text.split())[:160]
