"""Finds the exact tokens that llama-server makes of a prompt, by asking it to render and to tokenize. Before that,
``formats/`` has converted the bodies of the client APIs to chats.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Coroutine, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import orjson
from msgspec import Struct

from llamaslot.cache.ids import WIDTH, common, count, head, pack
from llamaslot.errors import BadRequest, LlamaslotError, PromptNotTokenizable, Reason, UpstreamError
from llamaslot.tasks import gather, give_way
from llamaslot.tokens.boundaries import openings, system_variant, variants_of
from llamaslot.tokens.media import has_media, text_before, up_to_medium
from llamaslot.tokens.special_tokens import SpecialTokens, SpecialTokensOfEach, TokenizeRoute, TokenSpan
from llamaslot.tokens.tokenize_cache import Known, PartCache, TokenizeCache, spaced

log = logging.getLogger(__name__)

_BAD_PROMPT = (
    '"prompt" must be a string, a list of tokens, an object with a "prompt_string", or a list of these'
)

#: The fields of a body, besides its messages, that templates write into a prompt. If a template writes another field
#: too, remembered tokens may not fit: prompts are then cut earlier than necessary.
_SHOWN = (
    "tools", "tool_choice", "response_format", "json_schema", "chat_template_kwargs", "reasoning_effort",
    "add_generation_prompt", "continue_final_message",
)  # fmt: skip

_MAX_TEXTS = 1024  # in one list of prompts: for each, one request is sent to the server, one after the other
_LONG_TEXT = 1 << 16  # characters; before a longer text is stored, other requests run first

# The most tokens of the header that a template puts before an answer: the role, perhaps the beginning of its reasoning.
_HEADER_TOKENS = 16

# The tokens of this header that follow the question in each turn: <|im_start|>, assistant, a line break.
_HEADER_END_TOKENS = 3


def listed(prompt: Any) -> list[Any]:
    """The prompts in ``prompt``, a body's field, as a list. A list with a token id in it is one prompt."""
    return prompt if isinstance(prompt, list) and int not in set(map(type, prompt)) else [prompt]


def n_texts(prompt: Any) -> int:
    """The number of strings to tokenize in ``prompt``, which is one prompt or a list of prompts."""
    if isinstance(prompt, Mapping):
        prompt = prompt.get("prompt_string")
    if isinstance(prompt, list) and not set(map(type, prompt)) <= {int}:
        return sum(n_texts(part) for part in prompt if not isinstance(part, int))
    return 1 if isinstance(prompt, str) else 0


class NoPrompt(BadRequest):
    """llama-server does not accept this value as a prompt."""


class PromptServer(TokenizeRoute, Protocol):
    """The two routes of llama-server that turn a body into tokens. They raise UpstreamError for its error answers."""

    async def apply_template(self, body: Mapping[str, Any], raw: bytes | None = None) -> str:
        """``POST /apply-template``: the text to which the template renders a chat body. ``raw``: the body as JSON, if
        the caller has it.
        """
        ...


@dataclass(frozen=True, slots=True)
class Prompt:
    """The tokens of one prompt (packed int32) and their text, None for lists of ids."""

    tokens: bytes
    text: str | None = None
    whole: bool = True  # tokenized in one piece; False: in two, at a cut that may have been wrong
    whose: str = field(default="", compare=False)  # the namespace whose remembered texts were used

    @property
    def n_tokens(self) -> int:
        return count(self.tokens)

    def __repr__(self) -> str:
        return f"<Prompt {self.n_tokens} tok{'' if self.whole else ' in pieces'}>"


class Boundaries(NamedTuple):
    """The places in a prompt where a prefill may stop for a checkpoint or a snapshot, as numbers of tokens before them.

    ``stops``: ascending, each between 0 and the number of tokens, exclusive. ``n_system``: the one of them where the
    system part and tools end; 0 if the prompt has neither.
    """

    n_system: int
    stops: tuple[int, ...]


class _Split(Struct, frozen=True):
    """A text in two parts. Its beginning is ``known``: the cache has the tokens. ``marks``: the special tokens behind
    it; ``cuts``: those of them that are worth cutting at.
    """

    whose: str
    specials: SpecialTokens
    n_version: int  # ``specials.n_version`` when the text was split
    known: Known
    marks: list[TokenSpan]
    cuts: list[TokenSpan]


class _Model:
    """All that was learned about the model's tokenizer. When a cut has given wrong tokens, an empty one takes its
    place, with ``is_whole`` set: then no text is cut any more.
    """

    def __init__(self, server: PromptServer, cache_bytes: int, *, is_whole: bool = False) -> None:
        self.specials = SpecialTokensOfEach(server)
        self.pieces = TokenizeCache(cache_bytes)
        # Of system parts, of all up to a question, and of what follows a question. Their keys have different forms.
        self.parts = PartCache()
        self.is_whole = is_whole

    def split(self, text: str, whose: str) -> _Split:
        specials = self.specials.of(whose)
        known = self.pieces.find(text, specials, whose)
        marks = specials.find(text, known.begin)
        return _Split(whose, specials, specials.n_version, known, marks, spaced(marks, known.begin))


class Tokenizer:
    """Tokens of chat bodies and of completion prompts, as llama-server makes them.

    llama-server tokenizes a text only from the last special token that the text shares with an earlier one. So the
    7 ms per 1,000 tokens that tokenizing costs the server are spent only on new text. For this the tokenizer keeps the
    special tokens that it knows (``specials``) and earlier texts (``pieces``, at most ``cache_bytes``). Three checks
    prevent wrong tokens:

    1. The special tokens of a text and of its tokens must be the same, in the same order.
    2. ``SpecialTokens.prove`` verifies each special token before its first use as a cut.
    3. ``confirm`` compares the number of tokens of each prompt with llama-server's own.

    ``whose`` is the namespace of the texts and special tokens that may be reused, so that response times reveal nothing
    about other users; "" for the shared one. Canceling any of the coroutines is safe: they change only the caches.
    """

    def __init__(self, server: PromptServer, *, cache_bytes: int = 128 << 20) -> None:
        self._server, self._cache_bytes = server, cache_bytes
        self._model = _Model(server, cache_bytes)
        self.has_miscounted = False

    async def chat(self, body: Mapping[str, Any], whose: str = "", raw: bytes | None = None) -> Prompt:
        """The prompt of a chat body, rendered and tokenized. ``raw``: the body as JSON, if the caller has it.

        Raises PromptNotTokenizable for media, UpstreamError if the template refuses the body.
        """
        if has_media(body):
            raise PromptNotTokenizable("the messages hold media", Reason.MEDIA)
        text = await self._server.apply_template(body, raw)
        return await self._of_text(text, whose)

    async def before_medium(self, body: Mapping[str, Any], whose: str = "") -> tuple[dict[str, Any], Prompt]:
        """For a chat with media: the body up to its first medium (``up_to_medium``), and the prompt of the text before
        that medium, which llama-server tokenizes separately. Raises PromptNotTokenizable if no text comes before it,
        UpstreamError if the template refuses the body.
        """
        cut = up_to_medium(body)
        return cut, await self._of_text(text_before(await self._server.apply_template(cut), cut), whose)

    async def completion(self, prompt: Any, whose: str = "") -> list[Prompt]:
        """Tokenize ``prompt``, a completion's field, as llama-server does. Returns one or more prompts.

        One prompt is a string, a list of ids, or a list of strings and ids. A list of these is several prompts. An
        object with a ``prompt_string`` counts as that string. Raises NoPrompt for anything else, PromptNotTokenizable
        for ``multimodal_data``, and BadRequest for more texts than can be tokenized in a few seconds. An id outside of
        the vocabulary raises nothing: llama-server refuses it with 400, and explains it best.
        (tools/server/server-common.cpp: tokenize_input_prompts, tokenize_input_subprompt, tokenize_mixed)
        """
        if prompt == []:
            raise NoPrompt('"prompt" must not be empty')
        if isinstance(prompt, list) and {int}.issuperset(map(type, prompt)):  # two million ids take 40 ms
            await give_way(len(prompt) * WIDTH)
            return [Prompt(_pack_wrapping(prompt))]
        if (n := n_texts(prompt)) > _MAX_TEXTS:
            raise BadRequest(f'"prompt" has {n} texts: send at most {_MAX_TEXTS} in one request')
        return [await self._one(one, whose) for one in listed(prompt)]

    async def _one(self, prompt: Any, whose: str) -> Prompt:
        if isinstance(prompt, Mapping) and "prompt_string" in prompt:
            if "multimodal_data" in prompt:
                raise PromptNotTokenizable("the prompt holds media", Reason.MEDIA)
            prompt = prompt["prompt_string"]
            if isinstance(prompt, list):
                return await self._mixed(prompt)
        elif isinstance(prompt, list):
            types = set(map(type, prompt))
            if types <= {int}:
                return Prompt(_pack_wrapping(prompt))
            if {int, str} <= types:
                return await self._mixed(prompt)
        if isinstance(prompt, str):
            return await self._of_text(prompt, whose)
        raise NoPrompt(_BAD_PROMPT)

    async def _mixed(self, elements: list[Any]) -> Prompt:
        """The prompt of a list of strings and ids. Strings are tokenized one by one; only the first element gets BOS
        (and EOS), if the model wants them. Other numbers become an int32, as in the server's JSON library: true is 1,
        2.7 is 2. Raises NoPrompt for any other element.
        """
        parts: list[bytes] = []
        for position, element in enumerate(elements):
            if isinstance(element, str):
                parts.append(await self._server.tokenize(element, add_special=position == 0))
            elif isinstance(element, int | float):
                parts.append(_pack_wrapping([int(element)]))
            else:
                raise NoPrompt(_BAD_PROMPT)
        return Prompt(b"".join(parts))

    async def _of_text(self, text: str, whose: str) -> Prompt:
        """The prompt of a text, with BOS if the model wants that."""
        while True:
            model = self._model
            prompt = await self._tokenize(model, text, whose)
            if model is self._model:
                return prompt
            # Meanwhile ``confirm`` has found that a cut was wrong, perhaps one of this text: tokenize it again.

    async def _tokenize(self, model: _Model, text: str, whose: str) -> Prompt:
        if model.is_whole:
            tokens = await self._server.tokenize(text, add_special=True)
            return Prompt(tokens, text, whose=whose)
        split = model.split(text, whose)
        known = split.known
        if known.n_cuts:
            end = known.begin + len(known.special)
            cut = TokenSpan(known.begin, end, split.specials.id_of(known.special))
            tail = await self._tail(split.specials, text, cut)
            if tail is None:  # that special token was dropped, so this ends after a few rounds
                return await self._tokenize(model, text, whose)
            tokens = known.tokens + tail
        else:
            tokens = await self._server.tokenize(text, add_special=True)
        await self._cache_text(model, text, tokens, split)
        return Prompt(tokens, text, whole=not known.n_cuts, whose=whose)

    async def _tail(self, specials: SpecialTokens, text: str, cut: TokenSpan) -> bytes | None:
        """The tokens of ``text`` from ``cut`` on; None if cutting there turns out to change the tokens."""
        if cut.id in specials.proved or await specials.prove(text, cut):
            specials.proved.add(cut.id)
            tail = await self._server.tokenize(text[cut.start :], add_special=False)
            if tail[:WIDTH] == pack([cut.id]):
                return tail
        special = text[cut.start : cut.end]
        if specials.drop(special):
            log.warning(
                "tokenizer: a text that was cut at %r and tokenized in parts has other tokens than the whole text, so"
                " prompts are no longer cut there",
                special,
            )
        return None

    async def _cache_text(self, model: _Model, text: str, tokens: bytes, split: _Split) -> None:
        """Put ``text`` and its ``tokens`` into the tokenize cache, so that of a later text which begins like it only
        the rest is tokenized. Before that, learn which special tokens the new part of ``text`` has: the cache cuts
        texts there. If learning fails, no error is raised, because the request needs only its tokens.
        """
        with contextlib.suppress(LlamaslotError):
            await split.specials.learn(text[split.known.begin :])
        if len(text) - split.known.begin > _LONG_TEXT:
            await asyncio.sleep(0)  # let other requests run first: what follows takes a millisecond
        if split.specials.n_version != split.n_version:
            split = model.split(text, split.whose)
        n_known = count(split.known.tokens)
        n_version = split.specials.n_version
        where = await split.specials.locate(split.marks, tokens[n_known * WIDTH :], may_add=not n_known)
        if where is not None and split.specials.n_version == n_version:
            index = {mark.start: n_known + i for mark, i in zip(split.marks, where, strict=True)}
            ends = [index[cut.start] for cut in split.cuts]
            model.pieces.keep(text, split.known, split.cuts, ends, tokens, split.whose)

    def confirm(self, prompt: Prompt, n_server: int) -> bool:
        """True if ``n_server``, llama-server's number of tokens in the prompt, is this tokenizer's number too.

        If not, and the prompt was tokenized in pieces, all texts are tokenized in one piece from now on. The first
        difference is logged. No answer was wrong, because llama-server compares tokens itself before it reuses any.
        """
        if n_server == prompt.n_tokens:
            return True
        if not prompt.whole:
            self._model = _Model(self._server, self._cache_bytes, is_whole=True)
        if not self.has_miscounted:
            self.has_miscounted = True
            whole = "; from now on prompts are tokenized whole, which takes longer"
            remedy = whole if self._model.is_whole else ""
            log.warning(
                "tokenizer: llama-server counted %d tokens in a prompt, llamaslot counted %d%s",
                n_server, prompt.n_tokens, remedy,
            )  # fmt: skip
        return False

    def check(self) -> int:
        """The number of stored pieces of text. Raises AssertionError with the name of the invariant that does not
        hold.
        """
        self._model.pieces.check()
        return len(self._model.pieces)

    async def boundaries(self, body: Mapping[str, Any], prompt: Prompt) -> Boundaries:
        """Find where the parts of a chat body's prompt end.

        For each part, a variant of the body has the same beginning and goes on differently. The part ends where the
        prompts of both diverge:

        1. The system part and tools.
        2. Everything up to the last user message and the header of the answer, as the prompt of the next turn will
           have it.
        3. The same, as this turn's prompt has it. It is left out if it ends at most a header behind 2. (A template may
           move the tools to the last user message: then 2 ends long before.)

        A variant that the template refuses gives no stop. Raises what the requests raise.
        """
        n_system, *found = await gather(self.system_end(body, prompt), *self._question_ends(body, prompt))
        if len(found) == 2 and 0 < found[1] - found[0] <= _HEADER_TOKENS and found[0]:
            del found[1]
        stops = tuple(sorted({n for n in (n_system, *found) if 0 < n < prompt.n_tokens}))
        return Boundaries(n_system if n_system in stops else 0, stops)

    def _question_ends(self, body: Mapping[str, Any], prompt: Prompt) -> list[Coroutine[Any, Any, int]]:
        """Two coroutines (``_question_end``) that find the end of the last user message in the prompt: as the next turn
        will have it, and as this turn has it. An empty list if the body has no user message.
        """
        variants = variants_of(body)[1:]
        if not variants:
            return []
        messages, n_asked = body["messages"], len(variants[1]["messages"]) - 1
        shown = {name: body[name] for name in _SHOWN if name in body}
        is_last = n_asked == len(messages)
        return [
            self._question_end(
                variant,
                prompt,
                _key([number, prompt.whose, shown, messages[:n_asked]]),
                _key([number, prompt.whose, shown]) if is_last else None,
            )
            for number, variant in enumerate(variants)
        ]

    async def _question_end(
        self, variant: Mapping[str, Any], prompt: Prompt, made_from: bytes, tail_from: bytes | None
    ) -> int:
        """The number of tokens that the prompt shares with the prompt of ``variant``, which goes on differently after
        the last user message, the *question*.

        ``made_from``: all that the tokens up to the end of the question depend on. These tokens are remembered, so the
        turns that call tools for one question cost one request together. ``tail_from``: None unless the question is the
        last message. Then a template always writes the same few tokens (the *tail*) after it, and ``tail_from`` is all
        that they depend on. Once the tail is known, a prompt that ends with it costs no request.
        """
        model, n = self._model, 0
        if tail_from is not None and (tail := model.parts.find(tail_from)) is not None:
            n = prompt.n_tokens - count(tail) + _HEADER_END_TOKENS if prompt.tokens.endswith(tail) else 0
        elif (asked := model.parts.find(made_from)) is not None and prompt.tokens.startswith(asked):
            return count(asked)
        if not n and (n := await self._shared(variant, prompt)) and tail_from is not None:
            tail = prompt.tokens[max(n - _HEADER_END_TOKENS, 0) * WIDTH :]
            if _HEADER_END_TOKENS <= count(tail) <= _HEADER_TOKENS + _HEADER_END_TOKENS:
                model.parts.keep(tail_from, tail)
        if n:
            model.parts.keep(made_from, head(prompt.tokens, n))
        return n

    async def system_end(self, body: Mapping[str, Any], prompt: Prompt) -> int:
        """The number of tokens in the prompt of a chat body up to the end of the system part and tools; 0 if the body
        has neither.

        The tokens of system parts are remembered: a body with the same one as an earlier body costs no request.
        """
        variant = system_variant(body)
        if variant is None or not (len(variant["messages"]) > 1 or body.get("tools")):
            return 0
        shown = {name: body[name] for name in _SHOWN if name in body}
        key = _key([prompt.whose, variant["messages"][:-1], shown])
        parts = self._model.parts
        if (tokens := parts.find(key)) is None:
            tokens = head(prompt.tokens, await self._shared(variant, prompt))
            parts.keep(key, tokens)
        return common(tokens, prompt.tokens)

    async def opening(self, body: Mapping[str, Any]) -> tuple[Prompt, int]:
        """A prompt that begins like those of all conversations with the system part and tools of ``body``, and the
        number of tokens in this beginning. If ``body`` has neither, the beginning has all its messages.

        Raises PromptNotTokenizable for media, UpstreamError if the template refuses the body.
        """
        prompt, other = await gather(*(self.chat(variant) for variant in openings(body)))
        return prompt, common(prompt.tokens, other.tokens)

    async def _shared(self, variant: Mapping[str, Any], prompt: Prompt) -> int:
        """The number of tokens that the prompt shares with the prompt of ``variant``; 0 if the template refuses the
        variant.
        """
        try:
            text = await self._server.apply_template(variant)
        except UpstreamError:
            return 0
        return common((await self._of_text(text, prompt.whose)).tokens, prompt.tokens)


def _key(made_from: list[Any]) -> bytes:
    return orjson.dumps(made_from, option=orjson.OPT_SORT_KEYS)


def _pack_wrapping(ids: list[int]) -> bytes:
    """Pack ids as int32. Ids out of range wrap around, as in the server's conversion: the server refuses them then."""
    try:
        return pack(ids)
    except ValueError:
        return pack([(i + 2**31) % 2**32 - 2**31 for i in ids])
