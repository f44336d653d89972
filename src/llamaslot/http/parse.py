"""A client's completion request, and the slot request that llamaslot makes of it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import orjson
from msgspec import Struct

from llamaslot.backend.lease import Lease
from llamaslot.cache.ids import common, head
from llamaslot.cache.reuse import CacheKind
from llamaslot.errors import BadRequest, PromptNotTokenizable, PromptTooLong, Reason, UpstreamError
from llamaslot.fleet.model_context import ModelContext
from llamaslot.formats.base import Format, PromptKind
from llamaslot.llama.answers import Response
from llamaslot.llama.dry_run import DryRun
from llamaslot.scheduling.plan import PrefillTo, Source
from llamaslot.scheduling.request import Placement, Request, User
from llamaslot.tokens import media
from llamaslot.tokens.tokenizer import NoPrompt, Prompt

# With an empty prompt and several answers, the slots of the other answers wait until the first has computed the prompt,
# which it never does. They are lost until llama-server is restarted (measured on xllamacpp 2026.10.11549).
_NO_COPIES = "an empty 'prompt' has only one answer: leave 'n' out, or send a prompt"


Post = Callable[[dict[str, Any]], contextlib.AbstractAsyncContextManager[Response]]


class ClientRequest(Struct, frozen=True):
    """A completion as the client sent it. ``post`` sends a body to the same route of llama-server. ``started``: its
    arrival by the monotonic clock, in seconds.
    """

    id: str
    body: dict[str, Any]
    format: Format
    post: Post
    started: float

    @property
    def is_streaming(self) -> bool:
        return self.body.get("stream") is True

    @property
    def wants_progress(self) -> bool:
        return self.is_streaming and self.body.get("return_progress") is True

    def may_set(self, name: str) -> bool:
        """True if llamaslot may set a boolean field of the body: the field is absent or a boolean. A value of another
        type must stay, because llama-server refuses it.
        """
        return isinstance(self.body.get(name), bool | None)


class ParsedRequest(Struct, frozen=True):
    """The slot request made from a body, and facts about its prompts.

    ``prompts`` is empty if their tokens are not known; ``unknown`` says why. ``is_head``: ``prompts`` has only the text
    before the first medium (image, audio, video). ``dry_run`` makes the dry run for the request.
    """

    request: Request
    prompts: tuple[Prompt, ...]
    dry_run: Callable[[], DryRun]
    # llama-server will refuse the request with its own error, for example for more answers than slots.
    is_beyond_server: bool = False
    unknown: Reason | None = None
    is_head: bool = False
    n_prompts: int = 1  # including those whose tokens are not known

    @property
    def left_in_slot(self) -> bytes:
        """The packed tokens with which the slot surely begins after the answer: the prompt, or what all prompts of a
        list have in common.

        llama-server computes the prompts of a list one after another, but any of them may be the last: if another
        request gets the slot before a prompt, that prompt is put behind the next one.
        """
        if len(self.prompts) == 1:
            return self.prompts[0].tokens
        tokens = [prompt.tokens for prompt in self.prompts] or [b""]
        return head(tokens[0], min(common(tokens[0], other) for other in tokens))


def lora_of(body: Mapping[str, Any]) -> str:
    """Return the LoRA scales in a body as JSON, equal for bodies that surely mean the same; "" if the body sets none.

    Adapters that are not named get the scale 0, but an empty list has no effect on some builds (measured on xllamacpp
    2026.10.11549). Malformed values are kept as they are: llama-server answers them with 400.
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


async def parse_request(
    id_: str, body: Mapping[str, Any], raw: bytes, format_: Format, context: ModelContext, user: User
) -> ParsedRequest:
    """Make the slot request for ``body``; ``raw``: the body as JSON. If the tokens of its prompt cannot be known, the
    slot request has none.

    Raises BadRequest, PromptTooLong, and UpstreamError with llama-server's own error for a body that its template
    refuses. Canceling is safe.
    """
    unknown = None
    try:
        said = await _said(body, raw, format_, context, context.namespace(user).user)
        if said.is_head and not format_.honours_id_slot:
            # llama-server chooses the slot by the share of the whole prompt that it holds, and the length of the
            # whole prompt is not known here.
            unknown = Reason.MEDIA
    except PromptNotTokenizable as error:
        said, unknown = _Said(None, ()), error.reason
    for prompt in said.prompts:
        if prompt.n_tokens >= context.n_ctx:
            raise PromptTooLong(prompt.n_tokens, context.n_ctx)
    heard = body if said.chat is None else said.chat  # the fields that llama-server reads
    n = format_.n_answers(body)
    if n > 1 and not all(prompt.n_tokens for prompt in said.prompts):
        raise BadRequest(_NO_COPIES)
    n_system, boundaries = await _boundaries(said, context)
    slot_request = Request(
        id=id_,
        tokens=said.prompts[0].tokens if said.prompts else b"",
        boundaries=boundaries,
        n_system=n_system,
        no_cache=heard.get("cache_prompt") is False,
        user=user,
        namespace=context.namespace(user, lora_of(heard)),
        max_tokens=max_tokens(body),
        n_children=n - 1,
        placement=Placement.PINNED if format_.honours_id_slot else Placement.STEERED,
    )
    is_beyond_server = said.is_refused or n > context.n_slots
    n_prompts = len(said.prompts) or format_.n_prompts(body)
    is_plain = format_.prompt_kind is PromptKind.PLAIN
    ids = next((prompt.tokens for prompt in said.prompts if is_plain and prompt.text is None), None)
    run = partial(format_.dry_run, body, said.chat, tokens=ids, n=n)
    return ParsedRequest(slot_request, said.prompts, run, is_beyond_server, unknown, said.is_head, n_prompts)


class _Said(NamedTuple):
    """What a body asks for. ``chat``: the chat that it is or is converted to, None for a plain prompt. ``prompts``: its
    prompts; with ``is_head`` only the text before the first medium. ``is_refused``: it has media, and llama-server
    accepts none.
    """

    chat: Mapping[str, Any] | None
    prompts: tuple[Prompt, ...]
    is_head: bool = False
    is_refused: bool = False


async def _boundaries(said: _Said, context: ModelContext) -> tuple[int, tuple[int, ...]]:
    """Return the number of tokens of the system part and tools, and the token counts where a prefill should stop for
    checkpoints. A dense model needs no checkpoints, so it has no stops.
    """
    if said.chat is None or not said.prompts:
        return 0, ()
    if context.cache_kind is CacheKind.DENSE:
        return await context.tokenizer.system_end(said.chat, said.prompts[0]), ()
    return await context.tokenizer.boundaries(said.chat, said.prompts[0])


async def _said(
    body: Mapping[str, Any], raw: bytes, format_: Format, context: ModelContext, whose: str
) -> _Said:
    """Find out the chat and the prompts of a body. ``whose``: the namespace whose known texts may be used.

    Raises UpstreamError if the template refuses the body. Raises PromptNotTokenizable if the tokens are not known, and
    also if the template refuses a chat that llamaslot has converted: llama-server may still accept the client's own
    body.
    """
    if format_.prompt_kind is PromptKind.INFILL:
        return _Said(None, (await context.infill.prompt(body, whose),))
    is_converted = format_.prompt_kind is PromptKind.CONVERTED
    is_right = context.conversions.known(body) if is_converted else None
    if is_right is False:
        raise PromptNotTokenizable(
            "llama-server has counted other tokens in a body of this shape", Reason.MISCOUNTED
        )
    chat = format_.chat_body(body)
    if chat is None:
        return await _plain(body, context, whose)
    needed = {media.KINDS[part] for part in media.kinds(chat)}
    try:
        if not needed:
            prompt = await context.tokenizer.chat(chat, whose, raw if chat is body else None)
            # llama-server chooses the slot by its own conversion: if that gives another prompt, it may choose any
            # slot.
            is_checked = (
                format_.honours_id_slot or is_right or await context.conversions.check(body, prompt.n_tokens)
            )
            if not is_checked:
                raise PromptNotTokenizable(
                    "llama-server counted other tokens in a body of this shape", Reason.MISCOUNTED
                )
            return _Said(chat, (prompt,))
        if not context.reads_media(needed):
            return _Said(chat, (), is_refused=True)
        cut, prompt = await context.tokenizer.before_medium(chat, whose)
        return _Said(cut, _short(prompt, context), is_head=True)
    except UpstreamError as error:
        if chat is body and not needed:
            raise
        raise PromptNotTokenizable(str(error), Reason.TEMPLATE) from error


async def _plain(body: Mapping[str, Any], context: ModelContext, whose: str) -> _Said:
    if "prompt" not in body:
        raise NoPrompt("'prompt' is required")
    prompt = body["prompt"]
    if (text := media.before_marker(prompt, context.media_markers())) is None:
        return _Said(None, tuple(await context.tokenizer.completion(prompt, whose)))
    if context.modalities is not None and not any(context.modalities.values()):
        return _Said(None, (), is_refused=True)
    prompts = await context.tokenizer.completion(text, whose)
    return _Said(None, _short(prompts[0], context), is_head=True)


def _short(prompt: Prompt, context: ModelContext) -> tuple[Prompt, ...]:
    """Return ``prompt``, the text before a medium, as the only prompt. Raises PromptNotTokenizable if it is too long
    for a slot: llama-server's own error is better, because llama-server knows the length of the whole prompt.
    """
    if prompt.n_tokens >= context.n_ctx:
        raise PromptNotTokenizable("it is too long", Reason.MEDIA)
    return (prompt,)


def keep_what_follows(lease: Lease) -> None:
    """Remove the prefill from the plan of ``lease`` if the slot already holds the whole known text before a medium. The
    slot may hold the same media behind that text, and a prefill would cut them off.
    """
    content, plan = lease.content, lease.plan
    if content is None or plan is None or plan.source is not Source.RESIDENT or content.is_exact:
        return
    if common(content.tokens, lease.request.tokens) >= lease.request.n_tokens - 1:
        steps = tuple(step for step in plan.steps if not isinstance(step, PrefillTo))
        lease.replace_steps(steps)


def max_tokens(body: Mapping[str, Any]) -> int | None:
    """Return the limit of the answer in tokens, by the lowest of the fields that the routes have for it; None without
    any. Used for estimates only.
    """
    names = ("max_tokens", "max_completion_tokens", "max_output_tokens", "n_predict")
    values = [body[name] for name in names if type(body.get(name)) is int and body[name] >= 0]
    return min(values, default=None)
