"""Bodies that no client would send, to the routes of completions: valid ones, changed field by field, and garbage.

``Bodies(seed)`` is an endless series of them: ``body(n)`` is always the same for the same seed and ``n``.
``await fuzz(front, bodies, range(n))`` sends each, which must be answered within ``LIMIT_S`` and without an error of
llamaslot's own. An AssertionError names the body that was not, with what is needed to send it again.
"""

from __future__ import annotations

import asyncio
import gzip
import json
import logging
import random
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aiohttp import web

from tests.support.answers import Answer
from tests.support.fake import FakeServer
from tests.support.fake_http import Dropped, Seen, reply
from tests.support.fake_model import BadInput
from tests.support.inprocess import Front, Served

LIMIT_S = 60.0
_N_AT_ONCE = 12

Body = dict[str, Any]

_TEXTS = [
    "", " ", "x", "hello", "Name three planets.", "<|im_start|>user\n", "<|im_end|>", "<think></think>", "\x00",
    "\ufeff", "é" * 40, "\U0001f600" * 9, "\ud800", "\udc00\ud800", "null", "[DONE]", "data: x\n\n", "{{ 7 * 7 }}",
    "../../etc/passwd", "a" * 2000, "x-anthropic-billing-header: cc_version=1; cch=a5145;", "1e999", "%s%n", "\r\n\r\n",
]  # fmt: skip
_NUMBERS = [
    0, 1, 2, 3, -1, -2, 0.5, -0.0, 2.9, 1e308, -1e308, 1e-320, 2**31 - 1, 2**31, 2**32, -(2**31) - 1, 2**53 + 1,
    2**63, 2**64 - 1, 2**64, -(2**63) - 1, 10**400, float("nan"), float("inf"), float("-inf"),
]  # fmt: skip
_NAMES = [
    "messages", "prompt", "input", "system", "instructions", "tools", "tool_choice", "stream", "n", "n_cmpl", "id_slot",
    "cache_prompt", "lora", "return_progress", "n_predict", "max_tokens", "max_completion_tokens", "max_output_tokens",
    "metadata", "stop", "echo", "logprobs", "top_logprobs", "n_probs", "return_tokens", "response_fields",
    "response_format", "json_schema", "grammar", "chat_template_kwargs", "reasoning_format", "reasoning_effort",
    "reasoning", "stream_options", "timings_per_token", "add_generation_prompt", "continue_final_message", "verbose",
    "input_prefix", "input_suffix", "input_extra", "previous_response_id", "thinking", "temperature", "seed", "model",
    "user", "store", "n_indent", "n_keep", "logit_bias", "samplers", "post_sampling_probs", "", "x", "__proto__",
]  # fmt: skip

_LIMITS = ["n_predict", "max_tokens", "max_completion_tokens", "max_output_tokens"]


def _messages(rng: random.Random) -> list[Any]:
    turns = [{"role": "user", "content": rng.choice(_TEXTS) + str(rng.randrange(50))}]
    if rng.random() < 0.4:
        turns.insert(
            0, {"role": rng.choice(["system", "developer"]), "content": "You are of use. " * rng.randrange(9)}
        )
    for _ in range(rng.randrange(3)):
        turns.append({"role": "assistant", "content": "Well."})
        turns.append({"role": "user", "content": rng.choice(_TEXTS)})
    return turns


def _tools(rng: random.Random) -> Any:
    schema = {"type": "object", "properties": {"path": {"type": "string"}}}
    return [{"type": "function", "function": {"name": "read", "description": "Reads.", "parameters": schema}}]


def _chat(rng: random.Random) -> Body:
    body: Body = {"messages": _messages(rng), "max_tokens": 2}
    if rng.random() < 0.3:
        body["tools"] = _tools(rng)
    return body


def _text(rng: random.Random) -> Body:
    prompt: Any = rng.choice(_TEXTS) + str(rng.randrange(50))
    if rng.random() < 0.3:
        prompt = rng.choice([[1, 2, 3], ["a", "b"], [1, "x", 2], [[1, 2], "x"], {"prompt_string": "hello"}])
    return {"prompt": prompt, "max_tokens": 2}


def _native(rng: random.Random) -> Body:
    return {**_text(rng), "n_predict": 2}


def _responses(rng: random.Random) -> Body:
    given: Any = rng.choice(_TEXTS)
    if rng.random() < 0.6:
        given = [
            {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Read."}]},
            {"type": "function_call", "call_id": "c1", "name": "read", "arguments": '{"path": "/"}'},
            {"type": "function_call_output", "call_id": "c1", "output": rng.choice(_TEXTS)},
            {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "So."}]},
        ]
    return {"input": given, "instructions": "Be brief.", "max_output_tokens": 2}


def _anthropic(rng: random.Random) -> Body:
    blocks = [
        {"type": "text", "text": rng.choice(_TEXTS)},
        {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "found"}]},
    ]
    used = [{"type": "tool_use", "id": "t1", "name": "read", "input": {"path": "/"}}]
    return {
        "system": [{"type": "text", "text": rng.choice(_TEXTS)}],
        "messages": [
            {"role": "user", "content": "hello"},
            {"role": "assistant", "content": used},
            {"role": "user", "content": blocks},
        ],
        "tools": [{"name": "read", "description": "Reads.", "input_schema": {"type": "object"}}],
        "metadata": {"user_id": "u"},
        "max_tokens": 2,
    }


def _infill(rng: random.Random) -> Body:
    extra = [{"filename": "a.py", "text": "x = 1"}]
    return {
        "input_prefix": "def f(",
        "input_suffix": "):",
        "input_extra": extra,
        "prompt": "",
        "n_predict": 2,
    }


KINDS: dict[str, Callable[[random.Random], Body]] = {
    "/v1/chat/completions": _chat,
    "/chat/completions": _chat,
    "/v1/completions": _text,
    "/completions": _native,
    "/completion": _native,
    "/v1/responses": _responses,
    "/responses": _responses,
    "/v1/messages": _anthropic,
    "/infill": _infill,
}


@dataclass(frozen=True, slots=True)
class Fuzzed:
    path: str
    data: bytes
    headers: dict[str, str]


class Bodies:
    """``body(n)`` is a body for any ``n``."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def body(self, n: int) -> Fuzzed:
        rng = random.Random(f"{self.seed} {n}")
        path = rng.choice(list(KINDS))
        body: Any = KINDS[path](rng)
        if rng.random() < 0.5:
            body["stream"] = True
        for _ in range(rng.choice([1, 1, 1, 2, 3, 5])):
            body = _changed(body, rng)
        if isinstance(body, dict) and any(not _is_small(body.get(name, 2)) for name in _LIMITS):
            body |= dict.fromkeys(_LIMITS, 2)
        data = _written(body, rng)
        if rng.random() < 0.15:
            data = _spoilt(data, rng)
        headers = {
            "Content-Type": rng.choice(["application/json"] * 8 + ["text/plain", "", "multipart/form-data"])
        }
        if rng.random() < 0.03:
            headers["Content-Encoding"] = rng.choice(["gzip", "deflate", "br", "x", "gzip, gzip"])
            data = gzip.compress(data, 1) if rng.random() < 0.7 else data
        return Fuzzed(path, data, headers)


def _is_small(limit: Any) -> bool:
    """True if a limit is no number at all, or a number that makes no long answer."""
    return not isinstance(limit, int | float) or 0 <= limit < 9


def _changed(body: Any, rng: random.Random) -> Any:
    """The same body, with one value anywhere in it inserted, replaced, left out, doubled or wrapped."""
    places = list(_places(body))
    if not places or rng.random() < 0.3:
        if isinstance(body, dict):
            body[rng.choice(_NAMES)] = _value(rng)
            return body
        return _value(rng)
    holder, at = rng.choice(places)
    match rng.randrange(5):
        case 0 | 1:
            holder[at] = _value(rng)
        case 2:
            del holder[at]
        case 3:
            holder[at] = [holder[at]] if rng.random() < 0.5 else {rng.choice(_NAMES): holder[at]}
        case _ if isinstance(holder, list):
            holder.extend([holder[at]] * rng.choice([1, 3, 40]))
        case _:
            holder[rng.choice(_NAMES)] = holder[at]
    return body


def _places(value: Any, depth: int = 0) -> Iterator[tuple[Any, Any]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for at, inner in list(items)[:100]:
        yield value, at
        if depth < 12:
            yield from _places(inner, depth + 1)


def _value(rng: random.Random, depth: int = 0) -> Any:
    match rng.randrange(12 if depth < 3 else 7):
        case 0:
            return rng.choice([None, True, False])
        case 1 | 2 | 3:
            return rng.choice(_NUMBERS)
        case 4 | 5 | 6:
            return rng.choice(_TEXTS)
        case 7:
            return rng.choice([[], {}, [[]], [{}], [None], [""], {"": None}])
        case 8:
            return [_value(rng, depth + 1) for _ in range(rng.randrange(4))]
        case 9:
            return {rng.choice(_NAMES): _value(rng, depth + 1) for _ in range(rng.randrange(4))}
        case 10:
            return [_value(rng, 3)] * rng.choice([2, 50, 2000])
        case _:
            deep: Any = "x"
            for _ in range(rng.choice([3, 60, 260, 700])):
                deep = [deep] if rng.random() < 0.5 else {"content": deep}
            return deep


def _written(body: Any, rng: random.Random) -> bytes:
    """The body as JSON: compact or not, characters escaped or not, sometimes with a key twice."""
    is_ascii = rng.random() < 0.5
    try:
        text = json.dumps(body, ensure_ascii=is_ascii, separators=rng.choice([None, (",", ":")]))
    except RecursionError:  # Python writes a thousand levels
        text = '{"x":' * 1500 + "0" + "}" * 1500
    if rng.random() < 0.05 and isinstance(body, dict) and text.startswith("{"):
        text = "{" + json.dumps(rng.choice(_NAMES)) + ": " + json.dumps(_value(rng, 3)) + ", " + text[1:]
    return text.encode("utf-8", "surrogatepass")


def _spoilt(data: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(data) + 1)
    match rng.randrange(8):
        case 0:
            return data[:at]
        case 1:
            return data[:at] + rng.randbytes(rng.randrange(1, 9)) + data[at:]
        case 2:
            return b"\xef\xbb\xbf" + data
        case 3:
            return b"[" * rng.choice([300, 1100, 200_000]) + data
        case 4:
            return rng.randbytes(rng.randrange(300))
        case 5:
            return data + data
        case 6:
            return data.decode("utf-8", "replace").encode("utf-16")
        case _:
            return data[:at] + data[at + 1 :]


# -- sending them --------------------------------------------------------------------------------------------------


class Mistakes(logging.Handler):
    """What llamaslot and aiohttp's server log as errors while it listens: tracebacks of ours, and tasks that died."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(self.format(record))

    def __enter__(self) -> Mistakes:
        for name in ("llamaslot", "aiohttp"):
            logging.getLogger(name).addHandler(self)
        return self

    def __exit__(self, *_: object) -> None:
        for name in ("llamaslot", "aiohttp"):
            logging.getLogger(name).removeHandler(self)


async def fuzz(
    front: Front, bodies: Bodies, numbers: Iterable[int], tell: Callable[[str], None] = lambda _: None
) -> Counter[int]:
    """Send the bodies with these ``numbers``. Returns how many answers had which status."""
    statuses: Counter[int] = Counter()
    rest, began = iter(numbers), time.monotonic()
    with Mistakes() as mistakes:

        async def client() -> None:
            for n in rest:
                fuzzed = bodies.body(n)
                try:
                    async with asyncio.timeout(LIMIT_S):
                        answer = await front.send(
                            "POST", fuzzed.path, data=fuzzed.data, headers=fuzzed.headers
                        )
                except TimeoutError:
                    leases = [(lease, lease.state) for lease in front.pool.dispatcher.leases]
                    what = [
                        f"no answer in {LIMIT_S} s",
                        front.readout(),
                        str(leases),
                        *mistakes.said,
                        *_waiting(),
                    ]
                    raise AssertionError(_found(bodies, n, "\n".join(what))) from None
                assert not mistakes.said, _found(bodies, n, "\n".join(mistakes.said))
                assert not _is_ours(answer), _found(bodies, n, f"{answer.status} {answer.raw[-500:]!r}")
                statuses[answer.status] += 1
                if statuses.total() % 1000 == 0:
                    speed = statuses.total() / (time.monotonic() - began)
                    told = dict(sorted(statuses.items()))
                    tell(f"{statuses.total()} bodies of seed {bodies.seed}, {speed:.0f}/s: {told}")
                    if isinstance(front, Served):
                        front.fake.requests.clear()

        async with asyncio.TaskGroup() as group:
            for _ in range(_N_AT_ONCE):
                group.create_task(client())
        await front.at_rest()
    assert not mistakes.said, mistakes.said
    return statuses


def _is_ours(answer: Answer) -> bool:
    """True if the answer is a failure that is llamaslot's fault."""
    return b"internal error in llamaslot" in answer.raw or (
        answer.status >= 500 and b"llamaslot" in answer.raw
    )


def _found(bodies: Bodies, n: int, what: str) -> str:
    fuzzed = bodies.body(n)
    return f"Bodies({bodies.seed}).body({n}), {fuzzed.path} {fuzzed.headers} {fuzzed.data[:600]!r}: {what}"


def _waiting() -> list[str]:
    """Where in its code each request in llamaslot waits."""
    found = []
    for task in asyncio.all_tasks():
        coroutine: Any = task.get_coro()
        steps = []
        while coroutine is not None:
            frame = getattr(coroutine, "cr_frame", None) or getattr(coroutine, "ag_frame", None)
            steps += [f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"] if frame is not None else []
            coroutine = getattr(coroutine, "cr_await", None) or getattr(coroutine, "ag_await", None)
        found += [" > ".join(steps)] if any(step.startswith("app.py") for step in steps) else []
    return found


def forgiving(fake: FakeServer) -> None:
    """Let the fake answer 500 in its own words, or break off, for a body that it cannot handle: that is not llamaslot's
    fault.
    """
    answer = fake.routes._answer

    async def answered(request: web.BaseRequest, seen: Seen, data: bytes) -> Any:
        try:
            return await answer(request, seen, data)
        except (BadInput, Dropped, OSError):
            raise
        except Exception as error:
            fake.engine.cancel(seen.tasks)
            if request.writer.output_size:
                raise Dropped from error
            return reply({"error": {"message": f"fake: {error!r}", "type": "server_error", "code": 500}}, 500)

    fake.routes._answer = answered  # type: ignore[method-assign]
