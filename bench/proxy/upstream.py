"""A stand-in for llama-server that answers at once: ``python -m bench.proxy.upstream PORT N_SLOTS SAVE_DIR``.

It answers in the shapes of the real one (``tests/real/test_bench_upstream.py`` holds them side by side) and computes
nothing: four characters of a prompt are one token. What it says of its own speed is that of a GPU, so that llamaslot
decides as in front of one.

A word in the prompt asks for another answer than ``max_tokens`` events at once:
``@every-20`` an event each 20 ms, which names the nanosecond of its sending, until ``GET /bench/release``;
``@flood`` ``max_tokens`` events one by one, as fast as they are taken.
"""

from __future__ import annotations

import asyncio
import random
import re
import struct
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import httptools
import numpy as np
import orjson
import uvloop

N_CTX = 131_072
N_VOCAB = 131_072 + 16
WORD = "abc "  # each token of an answer
SPECIAL = {"<|im_start|>": 1, "<|im_end|>": 2, "<|endoftext|>": 3}
#: Milliseconds that a token of a prompt and one of an answer take, as reported.
PROMPT_MS, ANSWER_MS = 0.05, 10.0
N_BATCH = 2_048  # tokens of a prompt between two reports of progress

_SPECIALS = re.compile("(" + "|".join(map(re.escape, SPECIAL)) + ")")
_ORDER = re.compile(rb"@(flood|every-(\d+))")
_MAGIC = 0x67677371

_JSON_HEAD = (
    b"HTTP/1.1 %d OK\r\nServer: llama.cpp\r\nAccess-Control-Allow-Origin: \r\n"
    b"Content-Type: application/json; charset=utf-8\r\nContent-Length: %d\r\n%s\r\n"
)
_KEEP, _CLOSE = b"Keep-Alive: timeout=5, max=100\r\n", b"Connection: close\r\n"
_STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\nServer: llama.cpp\r\nAccess-Control-Allow-Origin: \r\nContent-Type: text/event-stream\r\n"
    b"Transfer-Encoding: chunked\r\nKeep-Alive: timeout=5, max=100\r\n\r\n"
)
_END = b"0\r\n\r\n"

Body = Mapping[str, Any]


def tokens_of(text: str, *, parse_special: bool = True) -> bytes:
    """Little-endian int32. Special tokens cut a text, as in llama.cpp."""
    parts = _SPECIALS.split(text) if parse_special else [text]
    return b"".join(
        struct.pack("<i", SPECIAL[part]) if part in SPECIAL and parse_special else _plain(part)
        for part in parts
        if part
    )


def _plain(text: str) -> bytes:
    """Four characters a token, by a hash of 17 bits, so that ids are as long as those of a real vocabulary."""
    raw = text.encode("ascii", "replace")
    words = np.frombuffer(raw + b" " * (-len(raw) % 4), "<u4")
    hashed = (words * np.uint32(2_654_435_761)) >> np.uint32(15)
    return (hashed + np.uint32(16)).astype("<i4").tobytes()


def rendered(body: Body) -> str:
    """A chat by the ChatML template."""
    parts = []
    for message in body["messages"]:
        content = message.get("content") or ""
        if isinstance(content, list):
            content = "".join(part.get("text", "") for part in content)
        parts.append(f"<|im_start|>{message['role']}\n{content}<|im_end|>\n")
    if body.get("add_generation_prompt", True):
        parts.append("<|im_start|>assistant\n")
    return "".join(parts)


def n_common(a: bytes, b: bytes) -> int:
    """How many tokens two prompts have in common."""
    low, high = 0, min(len(a), len(b)) // 4
    if a[: 4 * high] == b[: 4 * high]:
        return high
    while high - low > 1:
        middle = (low + high) // 2
        if a[4 * low : 4 * middle] == b[4 * low : 4 * middle]:
            low = middle
        else:
            high = middle
    return low


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


def slot_file(tokens: bytes) -> bytes:
    """What llama-server writes for a slot that holds these, without the KV cache itself."""
    n_tokens = len(tokens) // 4
    return struct.pack("<IIIiiI", _MAGIC, 4, n_tokens + 4, -1, 1, n_tokens) + tokens + struct.pack("<I", 0)


class Slot:
    def __init__(self) -> None:
        self.tokens = b""
        self.n_tasks = 0
        self.is_busy = False


class Server:
    """What all connections share: slots, and the streams that wait for their release."""

    def __init__(self, n_slots: int, save_dir: Path) -> None:
        self.slots = [Slot() for _ in range(n_slots)]
        self.save_dir = save_dir
        self.mark = f"<__media_{time.time_ns()}__>"
        self.n_tasks = 0
        self.held = set[Stream]()

    def next_slot(self, body: Body) -> int:
        """The slot that a request names, else each in turn."""
        self.n_tasks += 1
        wanted = body.get("id_slot", -1)
        return (wanted if isinstance(wanted, int) and wanted >= 0 else self.n_tasks) % len(self.slots)

    def props(self) -> Body:
        return {
            "default_generation_settings": {"params": {}, "n_ctx": N_CTX},
            "total_slots": len(self.slots),
            "model_alias": "bench",
            "model_path": "",
            "modalities": {"vision": False, "audio": False},
            "media_marker": self.mark,
            "chat_template": "x" * 3_000,
            "build_info": "b0-bench",
            "is_sleeping": False,
        }

    def models(self) -> Body:
        meta = {
            "vocab_type": 2,
            "n_vocab": N_VOCAB,
            "n_ctx_train": N_CTX,
            "n_embd": 64,
            "n_params": 1_000,
            "size": 1_000,
        }
        return {
            "object": "list",
            "data": [{"id": "bench", "object": "model", "owned_by": "llamacpp", "meta": meta}],
        }

    def slot_infos(self) -> list[Body]:
        infos: list[Body] = []
        for number, slot in enumerate(self.slots):
            ran: dict[str, Any] = {}
            if slot.n_tasks:
                n_tokens = len(slot.tokens) // 4
                ran = {
                    "id_task": slot.n_tasks,
                    "n_prompt_tokens": n_tokens,
                    "n_prompt_tokens_processed": n_tokens,
                    "n_prompt_tokens_cache": 0,
                }
            infos.append(
                {"id": number, "n_ctx": N_CTX, "speculative": False, "is_processing": slot.is_busy, **ran}
            )
        return infos

    def save(self, number: int, name: str) -> Body:
        tokens = self.slots[number].tokens
        n_tokens = len(tokens) // 4
        data = slot_file(tokens)
        (self.save_dir / name).write_bytes(data)
        timings = {"save_ms": 1.0}
        return {
            "id_slot": number,
            "filename": name,
            "n_saved": n_tokens,
            "n_written": len(data),
            "timings": timings,
        }

    def restore(self, number: int, name: str) -> Body | None:
        """None if there is no such file: the slot is empty then."""
        slot = self.slots[number]
        try:
            data = (self.save_dir / name).read_bytes()
        except OSError:
            slot.tokens = b""
            return None
        n_tokens = struct.unpack_from("<IIIiiI", data)[5]
        slot.tokens, slot.n_tasks = data[24 : 24 + 4 * n_tokens], slot.n_tasks or 1
        timings = {"restore_ms": 1.0}
        return {
            "id_slot": number,
            "filename": name,
            "n_restored": n_tokens,
            "n_read": len(data),
            "timings": timings,
        }


class Answer:
    """What a completion answers, as one JSON or as events."""

    def __init__(self, server: Server, body: Body, *, is_chat: bool) -> None:
        prompt = rendered(body) if is_chat else body["prompt"]
        tokens = tokens_of(prompt) if isinstance(prompt, str) else struct.pack(f"<{len(prompt)}i", *prompt)
        self.number = server.next_slot(body)
        self.slot = slot = server.slots[self.number]
        self.n_prompt = len(tokens) // 4
        shared = n_common(slot.tokens, tokens) if body.get("cache_prompt", True) else 0
        self.n_cache = max(0, min(shared, self.n_prompt - 1))
        wanted = (body.get(name) for name in ("max_tokens", "max_completion_tokens", "n_predict"))
        # At least one: the real one, too, decodes a token if none is asked for.
        self.n_predict = max(next((n for n in wanted if isinstance(n, int) and n >= 0), 16), 1)
        slot.n_tasks = server.n_tasks
        slot.tokens = tokens + _plain(WORD) * (self.n_predict - 1)
        self.body, self.is_chat = body, is_chat
        envelope = {"created": int(time.time()), "model": "bench", "system_fingerprint": "b0-bench"}
        self.envelope = {**envelope, "object": "chat.completion.chunk", "id": f"chatcmpl-{slot.n_tasks:032x}"}
        delta = self.event({"content": "\0"}) if is_chat else self.native(content="\0", tokens=[97])
        self.before, self.after = delta.split(b"\\u0000")

    def timings(self, n_answer: int | None = None) -> Body:
        """After ``n_answer`` tokens of the answer; None: at its end."""
        n_computed = self.n_prompt - self.n_cache
        n_answer = self.n_predict if n_answer is None else n_answer
        prompt_ms, answer_ms = PROMPT_MS * n_computed, ANSWER_MS * n_answer
        return {
            "cache_n": self.n_cache,
            "prompt_n": n_computed,
            "prompt_ms": prompt_ms,
            "prompt_per_token_ms": PROMPT_MS,
            "prompt_per_second": 1_000 / PROMPT_MS,
            "predicted_n": self.n_predict,
            "predicted_ms": answer_ms,
            "predicted_per_token_ms": ANSWER_MS,
            "predicted_per_second": 1_000 / ANSWER_MS,
        }

    def timings_so_far(self, n_answer: int) -> Body:
        """In each event, if that is asked for."""
        return {"timings": self.timings(n_answer)} if self.body.get("timings_per_token") else {}

    def usage(self) -> Body:
        return {
            "completion_tokens": self.n_predict,
            "prompt_tokens": self.n_prompt,
            "total_tokens": self.n_prompt + self.n_predict,
            "prompt_tokens_details": {"cached_tokens": self.n_cache},
        }

    def event(self, delta: Body, finish: str | None = None, **more: Any) -> bytes:
        choice = {"finish_reason": finish, "index": 0, "delta": delta}
        return b"data: " + orjson.dumps({"choices": [choice], **self.envelope, **more}) + b"\n\n"

    def native(self, **more: Any) -> bytes:
        return b"data: " + orjson.dumps(self._native(**more)) + b"\n\n"

    def _native(self, **more: Any) -> dict[str, Any]:
        told = {"index": 0, "content": "", "tokens": [], "stop": False, "id_slot": self.number}
        return {**told, "tokens_predicted": 0, "tokens_evaluated": self.n_prompt, **more}

    def token(self, text: str = WORD) -> bytes:
        """The event of one token."""
        return self.before + text.encode() + self.after

    def tokens(self) -> list[bytes]:
        """The events of all."""
        if not self.body.get("timings_per_token"):
            return [self.token()] * self.n_predict
        return [
            self.event({"content": WORD}, **self.timings_so_far(n))
            if self.is_chat
            else self.native(content=WORD, tokens=[97], **self.timings_so_far(n))
            for n in range(1, self.n_predict + 1)
        ]

    def first_events(self) -> list[bytes]:
        """Progress if it is asked for, and the role."""
        events = []
        if self.body.get("return_progress"):
            batches = range(self.n_cache + N_BATCH, self.n_prompt, N_BATCH)
            for n_done in (self.n_cache, *batches, self.n_prompt):
                ms = round(PROMPT_MS * (n_done - self.n_cache))
                progress = {"total": self.n_prompt, "cache": self.n_cache, "processed": n_done, "time_ms": ms}
                events.append(
                    self.event(
                        {"role": "assistant", "content": None},
                        prompt_progress=progress,
                        **self.timings_so_far(0),
                    )
                    if self.is_chat
                    else self.native(tokens=[0], prompt_progress=progress)
                )
        if self.is_chat:
            events.append(self.event({"role": "assistant", "content": None}))
        return events

    def last_events(self) -> list[bytes]:
        if not self.is_chat:
            return [b"data: " + orjson.dumps(self.whole()) + b"\n\n"]
        if not (self.body.get("stream_options") or {}).get("include_usage"):
            return [self.event({}, "length", timings=self.timings()), b"data: [DONE]\n\n"]
        ending = {"choices": [], **self.envelope, "usage": self.usage(), "timings": self.timings()}
        return [self.event({}, "length"), b"data: " + orjson.dumps(ending) + b"\n\n", b"data: [DONE]\n\n"]

    def whole(self) -> Body:
        """The answer in one piece; of a native one also its last event."""
        text = WORD * self.n_predict
        if self.is_chat:
            choice = {
                "finish_reason": "length",
                "index": 0,
                "message": {"role": "assistant", "content": text},
            }
            envelope = {**self.envelope, "object": "chat.completion"}
            return {"choices": [choice], **envelope, "usage": self.usage(), "timings": self.timings()}
        stopped: dict[str, Any] = {
            "content": "" if self.body.get("stream") else text,
            "stop": True,
            "model": "bench",
            "tokens_predicted": self.n_predict,
            "generation_settings": {},
            "prompt": "",
            "has_new_line": False,
            "truncated": False,
            "stop_type": "limit",
            "stopping_word": "",
            "tokens_cached": self.n_prompt + self.n_predict - 1,
            "timings": self.timings(),
        }
        if n_probs := self.body.get("n_probs"):
            likely = [{"id": 97 + i, "logprob": -1.0 - i} for i in range(n_probs)]
            stopped["completion_probabilities"] = [{"id": 97, "logprob": -1.0, "top_logprobs": likely}]
        return self._native(**stopped)


class Stream:
    """A streamed answer that is not sent at once: at a pace until it is released, or as fast as it is taken."""

    def __init__(
        self, server: Server, transport: asyncio.Transport, answer: Answer, every_s: float | None
    ) -> None:
        self.server, self.transport, self.answer, self.every_s = server, transport, answer, every_s
        self.is_held_up = False
        self.n_left = answer.n_predict
        self.has_begun = False
        self.loop = asyncio.get_running_loop()
        self.due = self.loop.time()
        answer.slot.is_busy = True
        transport.write(_STREAM_HEAD + b"".join(map(chunk, answer.first_events())))
        if every_s is not None:
            server.held.add(self)
        self.next = self.loop.call_soon(self.flood if every_s is None else self.tick)

    def tick(self) -> None:
        self.transport.write(chunk(self.answer.token(f"{time.monotonic_ns()} ")))
        assert self.every_s is not None
        # The first one at once, the next at a random moment: else all streams that began together stay together.
        self.due += self.every_s if self.has_begun else self.every_s * random.random()
        self.has_begun = True
        self.next = self.loop.call_at(self.due, self.tick)

    def flood(self) -> None:
        """One event each time around the loop, so that all streams go at the same pace."""
        self.transport.write(chunk(self.answer.token()))
        self.n_left -= 1
        if self.n_left <= 0:
            self.end()
        elif not self.is_held_up:
            self.next = self.loop.call_soon(self.flood)

    def hold_up(self, is_held_up: bool) -> None:
        self.is_held_up = is_held_up
        if not is_held_up and self.every_s is None and self.n_left > 0:
            self.next = self.loop.call_soon(self.flood)

    def end(self) -> None:
        self.stop()
        self.transport.write(b"".join(map(chunk, self.answer.last_events())) + _END)
        self.transport.close()

    def stop(self) -> None:
        self.next.cancel()
        self.answer.slot.is_busy = False
        self.server.held.discard(self)


class Connection(asyncio.Protocol):
    """One connection of a client; httptools calls the methods that begin with ``on_``."""

    transport: asyncio.Transport

    def __init__(self, server: Server) -> None:
        self.server = server
        self.stream: Stream | None = None
        self.pieces: list[bytes] = []
        self.target = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]
        self.parser = httptools.HttpRequestParser(self)

    def connection_lost(self, exc: Exception | None) -> None:
        if self.stream is not None:
            self.stream.stop()

    def pause_writing(self) -> None:
        if self.stream is not None:
            self.stream.hold_up(True)

    def resume_writing(self) -> None:
        if self.stream is not None:
            self.stream.hold_up(False)

    def data_received(self, data: bytes) -> None:
        self.parser.feed_data(data)

    def on_message_begin(self) -> None:
        self.pieces.clear()
        self.target = b""

    def on_url(self, url: bytes) -> None:
        self.target += url

    def on_body(self, body: bytes) -> None:
        self.pieces.append(body)

    def on_message_complete(self) -> None:
        path, _, query = self.target.decode().partition("?")
        raw = b"".join(self.pieces)
        try:
            self.serve(path, query, raw)
        except (LookupError, TypeError, ValueError) as error:
            self.refuse(400, "invalid_request_error", repr(error))

    def reply(self, answer: object, status: int = 200) -> None:
        body = orjson.dumps(answer)
        self.transport.write(_JSON_HEAD % (status, len(body), _KEEP if status == 200 else _CLOSE) + body)
        if status != 200:
            self.transport.close()

    def refuse(self, status: int, type_: str, message: str) -> None:
        self.reply({"error": {"code": status, "message": message, "type": type_}}, status)

    def serve(self, path: str, query: str, raw: bytes) -> None:
        if path in ("/v1/chat/completions", "/completion", "/v1/completions"):
            self.complete(raw, is_chat=path == "/v1/chat/completions")
        elif route := self.routes().get(path):
            self.reply(route(orjson.loads(raw) if raw else {}))
        elif path.startswith("/slots/"):
            self.act(int(path[7:]), query.removeprefix("action="), orjson.loads(raw) if raw else {})
        elif path == "/bench/release":
            n_held = len(self.server.held)
            for stream in list(self.server.held):
                stream.end()
            self.reply({"n": n_held})
        else:
            self.refuse(404, "not_found_error", "File Not Found")

    def routes(self) -> Mapping[str, Callable[[Body], object]]:
        server = self.server
        return {
            "/health": lambda _: {"status": "ok"},
            "/props": lambda _: server.props(),
            "/slots": lambda _: server.slot_infos(),
            "/v1/models": lambda _: server.models(),
            "/lora-adapters": lambda _: [],
            "/apply-template": lambda body: {"prompt": rendered(body)},
            "/tokenize": lambda body: {
                "tokens": np.frombuffer(
                    tokens_of(body["content"], parse_special=body.get("parse_special", True)), "<i4"
                ).tolist()
            },
        }

    def act(self, number: int, action: str, body: Body) -> None:
        match action:
            case "erase":
                n_erased, self.server.slots[number].tokens = len(self.server.slots[number].tokens) // 4, b""
                self.reply({"id_slot": number, "n_erased": n_erased})
            case "save":
                self.reply(self.server.save(number, body["filename"]))
            case "restore" if (answer := self.server.restore(number, body["filename"])) is not None:
                self.reply(answer)
            case "restore":
                self.refuse(400, "invalid_request_error", "Unable to restore slot")
            case _:
                self.refuse(400, "invalid_request_error", "Invalid action")

    def complete(self, raw: bytes, *, is_chat: bool) -> None:
        body = orjson.loads(raw)
        answer = Answer(self.server, body, is_chat=is_chat)
        if not body.get("stream"):
            self.reply(answer.whole())
        elif order := _ORDER.search(raw, max(0, len(raw) - 4_000)):
            every_s = int(order[2]) / 1_000 if order[2] else None
            self.stream = Stream(self.server, self.transport, answer, every_s)
        else:
            events = [*answer.first_events(), *answer.tokens(), *answer.last_events()]
            self.transport.write(_STREAM_HEAD + b"".join(map(chunk, events)) + _END)
            self.transport.close()  # as llama-server does behind each stream


async def serve(port: int, n_slots: int, save_dir: Path) -> None:
    """Until it is killed."""
    server = Server(n_slots, save_dir)
    loop = asyncio.get_running_loop()
    listener = await loop.create_server(lambda: Connection(server), "127.0.0.1", port, backlog=2_048)
    await listener.serve_forever()


if __name__ == "__main__":
    uvloop.run(serve(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])))
