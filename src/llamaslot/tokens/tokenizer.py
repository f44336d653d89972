"""Request body -> the exact tokens that llama-server will use for it."""

from __future__ import annotations

import contextlib
import logging
from bisect import bisect_left
from collections.abc import Coroutine, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol

import orjson

from llamaslot.cache.ids import WIDTH, common, count, head, pack
from llamaslot.errors import BadRequest, LlamaslotError, OpaquePrompt, Reason, UpstreamError
from llamaslot.tokens.media import has_media, text_before, up_to_medium
from llamaslot.tokens.special_tokens import Mark, Specials, SpecialsOfEach, together
from llamaslot.tokens.system_prompt_cache import Systems
from llamaslot.tokens.tokenize_cache import Known, Pieces, spaced
from llamaslot.tokens.variants import openings, variants_of

log = logging.getLogger(__name__)

_BAD_PROMPT = (
    '"prompt" must be a string, a list of tokens, an object with a "prompt_string", or a list of these'
)

#: What of a body, apart from its messages, templates show. Another field that one shows makes a prompt part earlier.
_SHOWN = (
    "tools", "tool_choice", "response_format", "json_schema", "chat_template_kwargs", "reasoning_effort",
    "add_generation_prompt", "continue_final_message",
)  # fmt: skip

_MAX_TEXTS = 1024  # of one list: each is a question to the server, asked one after the other

_HEADER_TOKENS = 16  # in front of an answer: a role, perhaps the beginning of its reasoning

# Of these, what stands behind the question in any case: <|im_start|>, assistant, a line break.
_HEADER_END_TOKENS = 3


def listed(prompt: Any) -> list[Any]:
    """The prompts that ``body["prompt"]`` is: a list with an id in it is one."""
    return prompt if isinstance(prompt, list) and int not in set(map(type, prompt)) else [prompt]


def n_texts(prompt: Any) -> int:
    """Those to be tokenized for one prompt, or for a list of them."""
    if isinstance(prompt, Mapping):
        prompt = prompt.get("prompt_string")
    if isinstance(prompt, list) and not set(map(type, prompt)) <= {int}:
        return sum(n_texts(part) for part in prompt if not isinstance(part, int))
    return 1 if isinstance(prompt, str) else 0


class NoPrompt(BadRequest):
    """What llama-server takes for no prompt."""


class PromptServer(Protocol):
    """What prompts are made with: two routes of llama-server, which raise UpstreamError for its error answers."""

    async def apply_template(self, body: Mapping[str, Any]) -> str:
        """``POST /apply-template`` with the whole chat body -> the rendered text."""
        ...

    async def tokenize(self, content: str, *, add_special: bool, parse_special: bool = True) -> bytes:
        """``POST /tokenize`` -> the packed tokens."""
        ...


@dataclass(frozen=True, slots=True)
class Prompt:
    """The tokens of one prompt (packed int32) and the text that they come from, None for lists of ids."""

    tokens: bytes
    text: str | None = None
    whole: bool = True  # tokenized in one piece, so not a matter of cuts
    n_restarts: int = field(default=0, compare=False)  # of the server before it was tokenized
    whose: str = field(default="", compare=False)  # among whose texts this one was looked for

    @property
    def n_tokens(self) -> int:
        return count(self.tokens)

    def __repr__(self) -> str:
        return f"<Prompt {self.n_tokens} tok{'' if self.whole else ' in pieces'}>"


class Boundaries(NamedTuple):
    """Where a prompt is worth cutting, in tokens: ``stops`` ascending, each in (0, n_tokens).

    ``n_system``: the end of system part and tools, one of the stops; 0 when there is none.
    """

    n_system: int
    stops: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Split:
    """A text, the special tokens in it, those worth cutting at, and how far its tokens are known already."""

    whose: str
    specials: Specials
    n_version: int  # of the special tokens that were known
    marks: list[Mark]
    cuts: list[Mark]
    known: Known

    @property
    def begin(self) -> int:
        """The character from which on the tokens are not known."""
        return self.cuts[self.known.n_cuts - 1].start if self.known.n_cuts else 0


class _Model:
    """What is known of the tokenizer of one run of the server. Thrown away as a whole when that ends."""

    def __init__(self, server: PromptServer, cache_bytes: int, *, is_whole: bool = False) -> None:
        self.specials = SpecialsOfEach(server)
        self.pieces = Pieces(cache_bytes)
        self.systems = Systems()
        self.questions, self.tails = Systems(), Systems()  # see Prompts._question_end
        self.is_whole = is_whole  # a cut has given wrong tokens: no more cuts

    def split(self, text: str, whose: str) -> _Split:
        specials = self.specials.of(whose)
        marks = specials.find(text)
        cuts = spaced(marks)
        return _Split(whose, specials, specials.n_version, marks, cuts, self.pieces.find(text, cuts, whose))


class Prompts:
    """Tokens of chat bodies and of completion prompts, as llama-server makes them.

    A text is tokenized from the last special token on that it has in common with an earlier text, as far as special
    tokens are known (``specials``) and texts remembered (``pieces``, at most ``cache_bytes``): so the 7 ms per 1,000
    tokens that tokenizing costs the server are paid for what is new. Three things keep that from giving wrong tokens:
    special tokens must come in the same order in text and tokens, each is tried out before it is first used as a cut,
    and the server's own count of each prompt is compared (``confirm``). ``whose``: only texts of the same one are made
    use of, also to learn special tokens, so that nobody can tell by the time what others have asked; "" where that is
    no secret.

    Canceling any of its coroutines is safe: they change nothing but what is remembered.
    """

    def __init__(self, server: PromptServer, *, cache_bytes: int = 128 << 20) -> None:
        self._server, self._cache_bytes = server, cache_bytes
        self._model = _Model(server, cache_bytes)
        self._is_told = False
        self.n_miscounted = 0
        self.n_restarts = 0

    def forget(self) -> None:
        """The server was restarted, perhaps with another model: nothing is known any more."""
        self.n_restarts += 1
        self._model = _Model(self._server, self._cache_bytes)
        self._is_told = False

    async def chat(self, body: Mapping[str, Any], whose: str = "") -> Prompt:
        """The tokens of a chat body. Raises OpaquePrompt for media, UpstreamError when the template refuses it."""
        if has_media(body):
            raise OpaquePrompt("the messages hold media", Reason.MEDIA)
        text = await self._server.apply_template(body)
        return await self._of_text(text, whose)

    async def before_medium(self, body: Mapping[str, Any], whose: str = "") -> tuple[dict[str, Any], Prompt]:
        """Of a chat with media: what is left of it up to its first one, and the tokens of that. llama-server tokenizes
        the text before a medium for itself. Raises OpaquePrompt, UpstreamError when the template refuses it."""
        cut = up_to_medium(body)
        return cut, await self._of_text(text_before(await self._server.apply_template(cut), cut), whose)

    async def completion(self, prompt: Any, whose: str = "") -> list[Prompt]:
        """The prompts of ``body["prompt"]`` of a completion, read as llama-server reads it.

        A string; a list of ids; a mixed list of strings and ids (one prompt); or a list of those (several). An
        object with a ``prompt_string`` counts as that string. Raises NoPrompt for anything else, OpaquePrompt
        for ``multimodal_data``, and BadRequest for more texts than would be asked about in a few seconds. Ids outside
        of the vocabulary are left to the server, whose 400 says it best.
        (tools/server/server-common.cpp: tokenize_input_prompts, tokenize_input_subprompt, tokenize_mixed)
        """
        if prompt == []:
            raise NoPrompt('"prompt" must not be empty')
        if (n := n_texts(prompt)) > _MAX_TEXTS:
            raise BadRequest(f'"prompt" has {n} texts: send at most {_MAX_TEXTS} in one request')
        return [await self._one(one, whose) for one in listed(prompt)]

    async def _one(self, prompt: Any, whose: str) -> Prompt:
        if isinstance(prompt, Mapping) and "prompt_string" in prompt:
            if "multimodal_data" in prompt:
                raise OpaquePrompt("the prompt holds media", Reason.MEDIA)
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
        """Strings are tokenized one by one; only one that stands first gets BOS (and EOS) as far as the model wants.

        Anything else is read as an int32, as the server's JSON library converts it: true is 1, 2.7 is 2.
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
        """The tokens of a text with whatever the model wants in front of it."""
        while True:
            model = self._model
            prompt = await self._tokenize(model, text, whose)
            if model is self._model:
                return prompt
            # The server was restarted meanwhile: half of these tokens may be another model's.

    async def _tokenize(self, model: _Model, text: str, whose: str) -> Prompt:
        if model.is_whole:
            tokens = await self._server.tokenize(text, add_special=True)
            return Prompt(tokens, text, n_restarts=self.n_restarts, whose=whose)
        split = model.split(text, whose)
        known = split.known
        if known.n_cuts:
            tail = await self._tail(split.specials, text, split.cuts[known.n_cuts - 1])
            if tail is None:  # one special token fewer, so this ends
                return await self._tokenize(model, text, whose)
            tokens = known.tokens + tail
        else:
            tokens = await self._server.tokenize(text, add_special=True)
        await self._remember(model, text, tokens, split)
        return Prompt(tokens, text, whole=not known.n_cuts, n_restarts=self.n_restarts, whose=whose)

    async def _tail(self, specials: Specials, text: str, cut: Mark) -> bytes | None:
        """The tokens from the cut on, or None when it turns out that this special token is none to cut at."""
        if cut.id in specials.proved or await specials.prove(text, cut):
            specials.proved.add(cut.id)
            tail = await self._server.tokenize(text[cut.start :], add_special=False)
            if tail[:WIDTH] == pack([cut.id]):
                return tail
        special = text[cut.start : cut.end]
        if specials.drop(special):
            log.warning(
                "tokenizer: cutting prompts at %r changes their tokens: not cut there any more", special
            )
        return None

    async def _remember(self, model: _Model, text: str, tokens: bytes, split: _Split) -> None:
        """Keep the text and its tokens for the texts that go on from it; learn special tokens from what is new in it.

        Failures to learn are no failures of the request: its tokens are there.
        """
        with contextlib.suppress(LlamaslotError):
            await split.specials.learn(text[split.begin :])
        if split.specials.n_version != split.n_version:  # other cuts, also in the part that was known
            split = replace(model.split(text, split.whose), known=Known(b"", ()))
        n_known = count(split.known.tokens)
        fresh = split.marks[bisect_left(split.marks, (split.begin,)) :]
        where = split.specials.locate(fresh, tokens[n_known * WIDTH :], may_add=not n_known)
        if where is not None:
            index = {mark.start: n_known + i for mark, i in zip(fresh, where, strict=True)}
            ends = [*split.known.ends, *(index[cut.start] for cut in split.cuts[split.known.n_cuts :])]
            model.pieces.keep(text, split.cuts, ends, tokens, split.whose)

    def confirm(self, prompt: Prompt, n_server: int) -> bool:
        """Whether the server counted as many tokens in the prompt as we did.

        When not, and the prompt was tokenized in pieces, everything is tokenized whole until ``forget``. Counted in
        ``n_miscounted``, which only tests read; the first is logged. (The server compares tokens itself: no answer was
        wrong.)
        """
        if n_server == prompt.n_tokens:
            return True
        self.n_miscounted += 1
        if not prompt.whole and prompt.n_restarts == self.n_restarts:
            self._model = _Model(self._server, self._cache_bytes, is_whole=True)
        if not self._is_told:
            self._is_told = True
            whole = "; from now on prompts are tokenized whole, which takes longer"
            remedy = whole if self._model.is_whole else ""
            log.warning(
                "tokenizer: llama-server counts %d tokens in a prompt, llamaslot %d%s",
                n_server,
                prompt.n_tokens,
                remedy,
            )
        return False

    def check(self) -> int:
        """How many pieces of text are remembered. Raises AssertionError naming the invariant that does not hold."""
        self._model.pieces.check()
        return len(self._model.pieces)

    async def boundaries(self, body: Mapping[str, Any], prompt: Prompt) -> Boundaries:
        """Where the prompt of a chat body is worth cutting.

        Each is what the prompt has in common with the prompt of a variant of its body: the end of system part and
        tools; the end of the last user message with the role header of the answer. The latter as the next turn will
        have it, and also as this one has it when the template makes more than a header of the difference (it may
        move the tools to the last user message). A variant that the template refuses gives no boundary.
        """
        n_system, *found = await together(self.system_end(body, prompt), *self._question_ends(body, prompt))
        if len(found) == 2 and 0 < found[1] - found[0] <= _HEADER_TOKENS and found[0]:
            del found[1]
        stops = tuple(sorted({n for n in (n_system, *found) if 0 < n < prompt.n_tokens}))
        return Boundaries(n_system if n_system in stops else 0, stops)

    def _question_ends(self, body: Mapping[str, Any], prompt: Prompt) -> list[Coroutine[Any, Any, int]]:
        """Questions for the end of the last user message: as the next turn has it, and as this one has it."""
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
        """What the prompt shares with that of the variant: asked once for each question, however many tools are called
        to answer it. Behind a question that stands at the end templates write the same few tokens each time:
        ``tail_from`` is what those follow from, and once they are known such a prompt costs no question at all. The end
        of the header in front of them must be the same, too: a prompt that has nothing behind it ends so."""
        model, n = self._model, 0
        if tail_from is not None and (tail := model.tails.find(tail_from)) is not None:
            n = prompt.n_tokens - count(tail) + _HEADER_END_TOKENS if prompt.tokens.endswith(tail) else 0
        elif (asked := model.questions.find(made_from)) is not None and prompt.tokens.startswith(asked):
            return count(asked)
        if not n and (n := await self._shared(variant, prompt)) and tail_from is not None:
            tail = prompt.tokens[max(n - _HEADER_END_TOKENS, 0) * WIDTH :]
            if _HEADER_END_TOKENS <= count(tail) <= _HEADER_TOKENS + _HEADER_END_TOKENS:
                model.tails.keep(tail_from, tail)
        if n:
            model.questions.keep(made_from, head(prompt.tokens, n))
        return n

    async def system_end(self, body: Mapping[str, Any], prompt: Prompt) -> int:
        """The end of system part and tools in the prompt of a chat body, in tokens; 0 when it has neither.

        What begins as an earlier body did costs no question: the tokens of the last few are remembered.
        """
        messages = body.get("messages")
        variants = variants_of(body) if isinstance(messages, list) else []
        if not variants or not (len(variants[0]["messages"]) > 1 or body.get("tools")):
            return 0
        shown = {name: body[name] for name in _SHOWN if name in body}
        key = _key([prompt.whose, variants[0]["messages"][:-1], shown])
        systems = self._model.systems
        if (tokens := systems.find(key)) is None:
            tokens = head(prompt.tokens, await self._shared(variants[0], prompt))
            systems.keep(key, tokens)
        return common(tokens, prompt.tokens)

    async def opening(self, body: Mapping[str, Any]) -> tuple[Prompt, int]:
        """A prompt that begins as all conversations with this system part and these tools do, and for how many tokens.

        Without either the whole of ``body`` is what they begin with. Raises OpaquePrompt for media, UpstreamError when
        the template refuses it.
        """
        prompt, other = await together(*(self.chat(variant) for variant in openings(body)))
        return prompt, common(prompt.tokens, other.tokens)

    async def _shared(self, variant: Mapping[str, Any], prompt: Prompt) -> int:
        """The tokens that the prompt has in common with that of the variant, 0 when the template refuses it."""
        try:
            text = await self._server.apply_template(variant)
        except UpstreamError:
            return 0
        return common((await self._of_text(text, prompt.whose)).tokens, prompt.tokens)


def _key(made_from: list[Any]) -> bytes:
    return orjson.dumps(made_from, option=orjson.OPT_SORT_KEYS)


def _pack_wrapping(ids: list[int]) -> bytes:
    """Ids as int32; what does not fit wraps around, as the server's conversion does (and then names it invalid)."""
    try:
        return pack(ids)
    except ValueError:
        return pack([(i + 2**31) % 2**32 - 2**31 for i in ids])
