"""llama-server's HTTP API as a table: what to send to each of its routes, and how two answers are compared.

``TABLE`` has a line for each line of ``llamaslot.llama.routes.ROUTES``. Each route gets its usual request, also as a
stream if it has streams, and the mistakes of clients: a field that is missing or has a wrong type, a body that is not
JSON, another method.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import aiohttp

JSON = {"Content-Type": "application/json"}


@dataclass(frozen=True, slots=True)
class Ask:
    """One request. ``body`` is sent as JSON unless it is bytes."""

    name: str
    method: str
    target: str
    body: Any = None
    headers: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.method} {self.target} ({self.name})"


@dataclass(frozen=True, slots=True)
class ReportedCounts:
    """An answer, read to its end. Nothing in it is decompressed."""

    status: int
    headers: Mapping[str, str]
    raw: bytes

    @property
    def content_type(self) -> str:
        return self.headers.get("Content-Type", "")

    @property
    def value(self) -> Any:
        """What two answers to the same request must have in common. Ids and times are replaced by their types."""
        if self.content_type.startswith("text/event-stream"):
            return _by_answer([_event(part) for part in self.raw.decode().split("\n\n") if part])
        if self.content_type.startswith("application/json") and self.raw:
            return plain(json.loads(self.raw))
        if self.raw.startswith(b"# HELP"):
            return [line.rsplit(b" ", 1)[0] for line in self.raw.splitlines()]
        return self.raw

    @property
    def end_to_end(self) -> dict[str, str]:
        """Its headers, except those of one connection, and those that tell browsers which pages may read the answer."""
        return {
            name.lower(): value
            for name, value in self.headers.items()
            if name.lower() not in _OF_A_CONNECTION and not name.lower().startswith("access-control-")
        }


_OF_A_CONNECTION = {"connection", "keep-alive", "transfer-encoding", "server", "date"}


async def tell(session: aiohttp.ClientSession, url: str, ask: Ask) -> ReportedCounts:
    """Send the request, and return the answer; any status is an answer. ``session`` must not decompress."""
    data = ask.body if isinstance(ask.body, bytes | None) else json.dumps(ask.body).encode()
    skip = ("Content-Type", "Accept-Encoding", "User-Agent", "Accept")
    async with session.request(
        ask.method, url + ask.target, data=data, headers=ask.headers, skip_auto_headers=skip
    ) as answer:
        return ReportedCounts(answer.status, answer.headers, await answer.read())


def _event(text: str) -> list[Any]:
    """The lines of an event, the JSON in it made comparable."""
    lines: list[Any] = []
    for line in text.split("\n"):
        name, _, data = line.partition(": ")
        lines.append([name, plain(json.loads(data))] if data.startswith(("{", "[{")) else line)
    return lines


def _by_answer(events: list[list[Any]]) -> list[list[Any]]:
    """The events sorted by the answer that they belong to, because several answers in one stream come mixed.
    ``data: null`` separates the prompts.
    """
    numbers = [_answer_of(event) for event in events]
    if len(set(numbers) - {None}) < 2:
        return events
    numbered = zip(numbers, events, strict=True)
    each = sorted(
        (pair for pair in numbered if pair[1] != ["data: null"]), key=lambda pair: (pair[0] is None, pair[0])
    )
    return [event for _, event in each]


def _answer_of(event: list[Any]) -> int | None:
    payload = event[-1][1] if isinstance(event[-1], list) else None
    if not isinstance(payload, dict) or "type" in payload:
        return None
    of = payload["choices"][0] if payload.get("choices") else payload
    return of.get("index")


_IDS = {"id", "item_id", "call_id"}  # random; what they begin with tells what they are of
_TIMES = {
    "created", "created_at", "completed_at", "prompt_ms", "prompt_per_token_ms", "prompt_per_second", "predicted_ms",
    "predicted_per_token_ms", "predicted_per_second", "time_ms",
}  # fmt: skip


def plain(value: Any) -> Any:
    """A JSON value without what depends on the time or on the slot.

    Anthropic's ``input_tokens`` are only the computed ones, so their sum with the reused ones is compared.
    """
    if isinstance(value, list):
        return [plain(item) for item in value]
    if not isinstance(value, dict):
        return value
    told = {name: plain(item) for name, item in value.items()}
    for name in told:
        if name in _TIMES or name == "id_slot":
            told[name] = type(value[name]).__name__
        elif name in _IDS and isinstance(value[name], str):
            told[name] = value[name].replace("-", "_").partition("_")[0]
    if "cache_read_input_tokens" in told:
        told["input_tokens"] += told.pop("cache_read_input_tokens")
    return told


# -- the table ---------------------------------------------------------------------------------------------------

#: Everything is computed anew, and the likeliest token is taken: so two answers are equal to the last token.
FIRM = {"temperature": 0, "seed": 1, "cache_prompt": False}
USER = [{"role": "user", "content": "hi"}]
TOOLS = [
    {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}
]
TOO_LONG = "a" * 3000


def post(path: str, *asks: tuple[str, Any]) -> list[Ask]:
    return [Ask(name, "POST", path, body, JSON) for name, body in asks]


def faults(path: str, usual: Mapping[str, Any], *wanted: str) -> list[Ask]:
    """The mistakes that clients make in the request ``usual``. ``wanted``: the fields without which llama-server
    refuses it.
    """
    wrong: list[tuple[str, Any]] = [
        ("nothing asked", {}),
        ("an empty list", []),
        ("a text", "x"),
        ("null", None),
    ]
    bads: tuple[Any, ...] = (None, 7.5, {}, [], [None], [{}], True)
    for name in wanted:
        rest = {other: value for other, value in usual.items() if other != name}
        wrong.append((f"no {name}", rest))
        wrong += [(f"{name} {bad!r}", {**usual, name: bad}) for bad in bads]
    asks = post(path, *wrong)
    asks[3] = replace(asks[3], body=b"null")
    bodies = {
        "no body": b"",
        "blanks": b" \n",
        "broken": b'{"a":',
        "two values": b"{} {}",
        "ill-formed": b'{"a": "\xff"}',
    }
    return asks + [Ask(name, "POST", path, body, JSON) for name, body in bodies.items()]


def other_methods(path: str, *methods: str) -> list[Ask]:
    return [
        Ask("wrong method", method, path, {} if method in ("POST", "PUT", "PATCH") else None)
        for method in methods
    ]


def completion(
    path: str, usual: Mapping[str, Any], wanted: str, *more: tuple[str, Any], limit: str = "max_tokens"
) -> list[Ask]:
    """The requests to a route that answers with text, in one piece or as a stream."""
    usual = {**FIRM, **usual, limit: 4}
    bodies = [("usual", usual), *((name, {**usual, **body}) for name, body in more)]
    streamed = [(f"{name}, streamed", {**body, "stream": True}) for name, body in bodies]
    whole = post(path, *bodies, *streamed)
    types: list[tuple[str, dict[str, Any]]] = [
        ("stream 'yes'", {"stream": "yes"}),
        (f"{limit} 'x'", {limit: "x"}),
        ("temperature {}", {"temperature": {}}),
    ]
    odd = post(path, *((name, {**usual, **body}) for name, body in types))
    whole += [
        replace(whole[0], name="with a query", target=path + "?a=b&stream=true"),
        replace(whole[0], name="no content type", headers={}),
        replace(whole[0], name="text/plain", headers={"Content-Type": "text/plain"}),
        replace(whole[0], name="event-stream wanted", headers={**JSON, "Accept": "text/event-stream"}),
    ]
    return (
        whole
        + odd
        + faults(path, usual, wanted)
        + other_methods(path, "GET", "HEAD", "PUT", "PATCH", "DELETE")
    )


def chat(path: str) -> list[Ask]:
    long = [{"role": "user", "content": TOO_LONG}]
    parts = [{"role": "user", "content": [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]}]
    return completion(
        path,
        {"messages": USER, "model": "any"},
        "messages",
        ("usage", {"stream_options": {"include_usage": True}}),
        ("progress", {"return_progress": True}),
        ("parts", {"messages": parts}),
        ("tools", {"tools": TOOLS}),
        ("stop word", {"stop": ["y"]}),
        ("several", {"n": 2}),
        ("too many", {"n": 9}),
        ("log-probabilities", {"logprobs": True, "top_logprobs": 2}),
        ("a role that is none", {"messages": [{"content": "hi"}]}),
        ("too long", {"messages": long}),
        ("grammar that is none", {"grammar": "root ::="}),
        (
            "an image",
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        ),
    )


def text(path: str, limit: str) -> list[Ask]:
    return completion(
        path,
        {"prompt": "hi"},
        "prompt",
        ("ids", {"prompt": [104, 105]}),
        ("mixed", {"prompt": ["h", 105]}),
        ("several prompts", {"prompt": ["hi", "there"]}),
        ("an id that is none", {"prompt": [999_999]}),
        ("progress", {"return_progress": True}),
        ("stop word", {"stop": [","]}),
        ("probabilities", {"n_probs": 2} if limit == "n_predict" else {"logprobs": 2}),
        ("too many", {"n": 9}),
        ("too long", {"prompt": TOO_LONG}),
        ("grammar that is none", {"grammar": "root ::="}),
        limit=limit,
    )


def responses(path: str) -> list[Ask]:
    spoken = [{"role": "user", "content": [{"type": "input_text", "text": "hi"}]}]
    return completion(
        path,
        {"input": "hi", "model": "any"},
        "input",
        ("instructions", {"instructions": "be brief", "input": spoken}),
        ("progress", {"return_progress": True}),
        ("goes on", {"previous_response_id": "resp_1"}),
        ("too long", {"input": TOO_LONG}),
        limit="max_output_tokens",
    )


def messages(path: str) -> list[Ask]:
    system = [{"type": "text", "text": "be brief", "cache_control": {"type": "ephemeral"}}]
    tool = {"name": "look", "input_schema": {"type": "object", "properties": {}}}
    return completion(
        path,
        {"messages": USER, "model": "any"},
        "messages",
        ("system", {"system": system}),
        ("tools", {"tools": [tool]}),
        ("stop word", {"stop_sequences": ["y"]}),
        ("too long", {"messages": [{"role": "user", "content": TOO_LONG}]}),
    )


def inputs(path: str, name: str, *more: tuple[str, Any], value: Any = "hi") -> list[Ask]:
    """The requests to a route that answers with something other than text."""
    usual = {name: value}
    bodies = [("usual", usual), *((called, {**usual, **body}) for called, body in more)]
    return (
        post(path, *bodies)
        + post(path + "?a=b", ("with a query", usual))
        + faults(path, usual, name)
        + other_methods(path, "GET", "HEAD", "PUT", "DELETE")
    )


def page(path: str, *queries: str) -> list[Ask]:
    """The requests for a page, by GET and by HEAD."""
    return [
        Ask("usual", "GET", path),
        Ask("head", "HEAD", path),
        Ask("compressed", "GET", path, headers={"Accept-Encoding": "gzip"}),
        *(Ask("with a query", "GET", path + query) for query in ("?a=b", *queries)),
        *other_methods(path, "PUT", "DELETE", "PATCH"),
    ]


#: For each line of ``ROUTES`` what is asked of it.
TABLE: dict[str, Sequence[Ask]] = {
    "POST /v1/chat/completions": chat("/v1/chat/completions"),
    "POST /chat/completions": chat("/chat/completions"),
    "POST /v1/completions": text("/v1/completions", "max_tokens"),
    "POST /completions": text("/completions", "n_predict"),
    "POST /completion": text("/completion", "n_predict"),
    "POST /v1/responses": responses("/v1/responses"),
    "POST /responses": responses("/responses"),
    "POST /infill": completion(
        "/infill",
        {"input_prefix": "a = ", "input_suffix": "\n"},
        "input_prefix",
        ("extra", {"input_extra": [{"filename": "b", "text": "c"}]}),
        ("a prompt", {"prompt": "b"}),
        limit="n_predict",
    ),
    "POST /api/chat": chat("/api/chat"),
    "POST /v1/messages": messages("/v1/messages"),
    "POST /v1/audio/transcriptions": inputs("/v1/audio/transcriptions", "file"),
    "POST /audio/transcriptions": inputs("/audio/transcriptions", "file"),
    "POST /embedding": inputs("/embedding", "content"),
    "POST /embeddings": inputs("/embeddings", "input"),
    "POST /v1/embeddings": inputs(
        "/v1/embeddings",
        "input",
        ("two", {"input": ["hi", "there"]}),
        ("base64", {"encoding_format": "base64"}),
        ("a format that is none", {"encoding_format": "x"}),
    ),
    "POST /rerank": inputs("/rerank", "query", ("documents", {"documents": ["a", "b"]})),
    "POST /reranking": inputs("/reranking", "query", ("documents", {"documents": ["a", "b"]})),
    "POST /v1/rerank": inputs("/v1/rerank", "query", ("documents", {"documents": ["a", "b"]})),
    "POST /v1/reranking": inputs("/v1/reranking", "query", ("documents", {"documents": ["a", "b"]})),
    "POST /v1/systemone": inputs("/v1/systemone", "state", ("questions", {"questions": {}})),
    "GET /health": page("/health"),
    "GET /v1/health": page("/v1/health"),
    "* /llamaslot": [Ask("usual", "GET", "/llamaslot")],
    "* /llamaslot/*": [
        Ask("usual", "GET", "/llamaslot/status"),
        Ask("usual", "GET", "/llamaslot/metrics"),
        Ask("usual", "GET", "/llamaslot/journal"),
    ],
    "POST /slots/:id": [
        Ask("save", "POST", "/slots/0?action=save", {"filename": "x"}),
        Ask("restore", "POST", "/slots/0?action=restore", {"filename": "x"}),
        Ask("erase", "POST", "/slots/0?action=erase"),
        Ask("no action", "POST", "/slots/0", {}),
        Ask("encoded", "POST", "/%73lots%2f0?action=erase", {}),
        Ask("wrong method", "PUT", "/slots/0?action=erase", {}),
    ],
    "POST /predict": post("/predict", ("usual", {"@requestFormat": "completion", "instances": []})),
    "POST /props": post("/props", ("usual", {}), ("a text", "x")),
    "POST /lora-adapters": post(
        "/lora-adapters", ("usual", []), ("an object", {}), ("unknown", [{"id": 9, "scale": 1}])
    ),
    "POST /models": [*post("/models", ("usual", {"model": "x"})), Ask("deleted", "DELETE", "/models?model=x")],
    "POST /models/*": [
        *post("/models/load", ("usual", {"model": "x"})),
        *post("/models/unload", ("usual", {"model": "x"})),
    ],
    "* /tools": [Ask("usual", "GET", "/tools"), *post("/tools", ("usual", {"tool": "x"}))],
    "* /tools/*": [Ask("usual", "GET", "/tools/x"), *post("/tools/x", ("usual", {}))],
    "* /cors-proxy": [Ask("usual", "GET", "/cors-proxy?url=http://127.0.0.1:1/"), *post("/cors-proxy", ("usual", {}))],
    "* /cors-proxy/*": [Ask("usual", "GET", "/cors-proxy/x"), *post("/cors-proxy/x", ("usual", {}))],
    "POST /tokenize": inputs(
        "/tokenize",
        "content",
        ("pieces", {"with_pieces": True}),
        ("special", {"content": "<|im_start|>", "parse_special": False}),
    ),
    "POST /detokenize": inputs("/detokenize", "tokens", value=[104, 105]),
    "POST /apply-template": inputs("/apply-template", "messages", ("tools", {"tools": TOOLS}), value=USER),
    "POST /chat/completions/input_tokens": inputs("/chat/completions/input_tokens", "messages", value=USER),
    "POST /v1/chat/completions/input_tokens": inputs("/v1/chat/completions/input_tokens", "messages", value=USER),
    "POST /responses/input_tokens": inputs("/responses/input_tokens", "input"),
    "POST /v1/responses/input_tokens": inputs("/v1/responses/input_tokens", "input"),
    "POST /v1/messages/count_tokens": inputs("/v1/messages/count_tokens", "messages", value=USER),
    "POST /v1/chat/completions/control": inputs(
        "/v1/chat/completions/control", "id", ("ends reasoning", {"action": "reasoning_end"}), value="chatcmpl-x"
    ),
    "GET /slots": page("/slots", "?fail_on_no_slot=1"),
    "GET /props": page("/props", "?autoload=false"),
    "GET /metrics": page("/metrics"),
    "GET /models": page("/models", "?reload=1"),
    "GET /v1/models": page("/v1/models"),
    "GET /models/sse": page("/models/sse"),
    "GET /lora-adapters": page("/lora-adapters"),
    "GET /v1/stream": page("/v1/stream"),
    "GET /v1/stream/:id": page("/v1/stream/x"),
    "DELETE /v1/stream": [Ask("usual", "DELETE", "/v1/stream")],
    "DELETE /v1/stream/:id": [Ask("usual", "DELETE", "/v1/stream/x")],
    "POST /v1/streams/lookup": inputs("/v1/streams/lookup", "conversation_ids", value=["x"]),
    "GET /v1/streams": page("/v1/streams"),
    "GET /api/tags": page("/api/tags"),
    "POST /api/show": inputs("/api/show", "model"),
    "GET /": page("/"),
    "GET /index.html": page("/index.html"),
}  # fmt: skip

#: Paths and methods for which llama-server has no route.
UNKNOWN = [
    *(Ask("unknown path", method, "/nothing", {} if method in ("POST", "PUT", "PATCH") else None)
      for method in ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")),
    Ask("another spelling", "POST", "//completion", {"prompt": "hi"}),
    Ask("a slash too many", "POST", "/v1/chat/completions/", {"messages": USER}),
    Ask("of another server", "GET", "/v1/models/any"),
    Ask("of another server", "POST", "/v1/images/generations", {"prompt": "a cat"}),
    Ask("of another server", "POST", "/v1/moderations", {"input": "hi"}),
]  # fmt: skip
