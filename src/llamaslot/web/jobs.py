"""From a completion's body to the job that wants a slot."""

from __future__ import annotations

import itertools
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import orjson

from llamaslot.core.reuse import Memory
from llamaslot.core.slots import Job
from llamaslot.core.tokens import common, head
from llamaslot.core.users import User
from llamaslot.engine.backend import Backend
from llamaslot.engine.pool import Pool
from llamaslot.errors import PromptTooLong, UpstreamError
from llamaslot.llama import anthropic, responses
from llamaslot.llama.prompts import NoPrompt, OpaquePrompt, Prompt
from llamaslot.llama.routes import Format

ATTEMPTS = 3  # a server that restarts between two steps of a job: the job is placed again on the new one
_serial = itertools.count(1)


@dataclass(frozen=True, slots=True)
class Wanted:
    """A job and what is needed to speak about it. ``prompts`` is empty for a prompt that cannot be known."""

    job: Job
    prompts: tuple[Prompt, ...]
    is_beyond_server: bool = False  # more answers than there are slots: llama-server has its own 400 for that

    @property
    def left_in_slot(self) -> bytes:
        """Tokens that the slot surely begins with at the end.

        Several prompts run one after another, but not always in their order: one that a request of llama-server's own
        choice gets ahead of is put back behind the next.
        """
        tokens = [prompt.tokens for prompt in self.prompts] or [b""]
        return head(tokens[0], min(common(tokens[0], other) for other in tokens))


_PLAIN_ID = re.compile(r"[!-~]{1,128}")


def request_id(headers: Mapping[str, str]) -> str:
    """The client's ``X-Request-Id`` if it is fit for logs, headers and sidecars, else a new one."""
    given = headers.get("X-Request-Id", "")
    return given if _PLAIN_ID.fullmatch(given) else f"req-{next(_serial)}-{secrets.token_hex(3)}"


def lora_of(body: Mapping[str, Any]) -> str:
    """The LoRA scales that a body sets, as JSON, alike for bodies that surely mean the same; "" when it sets none.

    Adapters that are not named get the scale 0, but an empty list is as good as none on some builds (seen running on
    xllamacpp 2026.10.11549). What is malformed is left to llama-server's 400.
    (tools/server/server-common.cpp: parse_lora_request)
    """
    lora = body.get("lora")
    if lora is None:
        return ""
    scales: dict[int, float] = {}
    for entry in lora if isinstance(lora, list) else [lora]:
        id_, scale = (entry.get("id"), entry.get("scale", 0)) if isinstance(entry, dict) else (None, None)
        if type(id_) is not int or not isinstance(scale, int | float) or isinstance(scale, bool):
            return orjson.dumps(lora, option=orjson.OPT_SORT_KEYS).decode()
        scales[id_] = float(scale)
    return orjson.dumps([{"id": id_, "scale": scales[id_]} for id_ in sorted(scales)]).decode()


async def wanted(
    id_: str, body: Mapping[str, Any], kind: Format, backend: Backend, pool: Pool, user: User
) -> Wanted:
    """The job for ``body``. Raises NoPrompt, PromptTooLong, and llama-server's own error for a body it refuses."""
    try:
        chat = _chat_body(body, kind)
        whose = pool.rules.space(user).user
        prompts = await _prompts(body, chat, backend, whose)
    except OpaquePrompt:
        chat, prompts = None, ()
    for prompt in prompts:
        if prompt.n_tokens >= pool.n_ctx:
            raise PromptTooLong(prompt.n_tokens, pool.n_ctx)
    heard = body if chat is None else chat  # what llama-server takes note of
    n = _n_answers(heard)
    n_system, boundaries = 0, tuple[int, ...]()
    if chat is not None:
        if pool.memory is Memory.DENSE:
            n_system = await backend.prompts.system_end(chat, prompts[0])
        else:
            n_system, boundaries = await backend.prompts.boundaries(chat, prompts[0])
    job = Job(
        id=id_,
        tokens=prompts[0].tokens if prompts else b"",
        boundaries=boundaries,
        n_system=n_system,
        is_cold=heard.get("cache_prompt") is False,
        user=user,
        space=pool.rules.space(user, lora_of(heard)),
        max_tokens=_max_tokens(body),
        n_children=n - 1,
        is_steered=kind == "messages",
    )
    return Wanted(job, prompts, is_beyond_server=n > len(pool.slots))


def _chat_body(body: Mapping[str, Any], kind: Format) -> Mapping[str, Any] | None:
    """The chat that a body is, or that llama-server makes of it; None for a plain prompt. Raises OpaquePrompt where
    that is not known."""
    match kind:
        case "chat":
            return body
        case "messages":
            return anthropic.chat_body(body)
        case "responses":
            return responses.chat_body(body)
        case "openai-completion" | "native-completion":
            return None


async def _prompts(
    body: Mapping[str, Any], chat: Mapping[str, Any] | None, backend: Backend, whose: str
) -> tuple[Prompt, ...]:
    """Raises OpaquePrompt, and UpstreamError for what the template refuses: of a body that was converted nobody knows
    whether llama-server would refuse it too, so it is served without its tokens."""
    if chat is not None:
        try:
            return (await backend.prompts.chat(chat, whose),)
        except UpstreamError as error:
            if chat is body:
                raise
            raise OpaquePrompt(str(error)) from error
    if "prompt" not in body:
        raise NoPrompt("'prompt' is required")
    return tuple(await backend.prompts.completion(body["prompt"], whose))


def _max_tokens(body: Mapping[str, Any]) -> int | None:
    """How long its answer may be at most, by any of the names that the routes have for that. For estimates."""
    names = ("max_tokens", "max_completion_tokens", "max_output_tokens", "n_predict")
    values = [body[name] for name in names if type(body.get(name)) is int and body[name] >= 0]
    return min(values, default=None)


def _n_answers(body: Mapping[str, Any]) -> int:
    """``n`` (OpenAI) or ``n_cmpl`` (native); llama-server takes 2.9 for 2. What is no number it refuses by itself."""
    values = [body.get(key) for key in ("n", "n_cmpl")]
    numbers = [
        int(value) for value in values if isinstance(value, int | float) and not isinstance(value, bool)
    ]
    return max([1, *numbers])
