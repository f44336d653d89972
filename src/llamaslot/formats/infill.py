"""Converts a body of ``/infill`` to its exact tokens.

llama-server tokenizes the parts of such a body and joins them, in an order and within limits that depend on the model
and on its flags:

- the tokens that mark prefix, suffix and middle, and whether there are tokens for a repository and its files
- whether the suffix comes first (``--spm-infill``)
- how long a part may be: a quarter of ``--batch-size`` for the suffix, three quarters for the prefix, and for the other
  files the room that ``--ctx-size``, ``--batch-size`` and ``--predict`` leave

llama-server reports none of these. ``learn`` finds them out from two or three short answers, which repeat their prompt
as text, and from two refusals of prompts that are too long, which report their number of tokens.

Source: llama.cpp, tools/server/server-common.cpp, ``format_prompt_infill``; measured on xllamacpp 2026.10.11549;
tests/real/test_infill.py compares with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from msgspec import Struct
from msgspec.structs import replace

from llamaslot.cache.ids import WIDTH, count, head, pack, unpack
from llamaslot.errors import PromptNotTokenizable, Reason
from llamaslot.formats.base import PromptKind
from llamaslot.formats.native import NativeFormat
from llamaslot.formats.stream_to_json import HARMLESS, n_answers

_REPOSITORY, _FILE, _UNNAMED = "myproject\n", "filename\n", "tmp"
_SNIPPET = "\n\n--- snippet ---\n\n"  # before each other file, if the model has no token for that
_WORD = "a\n"  # two tokens with most tokenizers
_LONG_PREFIX = 16_384  # tokens: three quarters of any usual --batch-size
_CACHE_BYTES = 8 << 20
_MAX_PARTS = 512  # of a body; each part is one request to the server, and editors send some dozens


class InfillFormat(NativeFormat):
    """The API ``/infill``, whose answers have the form of ``/completion``."""

    name = "infill"
    prompt_kind = PromptKind.INFILL
    whole_dry_run_path = "/infill"
    known_fields = HARMLESS | {"input_prefix", "input_suffix", "input_extra", "prompt", "response_fields"}

    def n_prompts(self, body: Mapping[str, Any]) -> int:
        """Always 1: ``prompt`` is a part of it."""
        return 1

    def n_to_assemble(self, given: Mapping[str, Any]) -> int | None:
        return n_answers(given)


class InfillServer(Protocol):
    """The routes of llama-server that ``learn`` needs. ``ask`` sends a body and returns status and JSON. ``refusal``
    does the same for a body that should be refused: if it is accepted, ``refusal`` does not wait for the answer.
    """

    async def tokenize(self, content: str, *, add_special: bool, parse_special: bool = True) -> bytes: ...

    async def detokenize(self, tokens: bytes) -> str: ...

    async def ask(self, path: str, body: Mapping[str, Any]) -> tuple[int, Any]: ...

    async def refusal(self, path: str, body: Mapping[str, Any]) -> tuple[int, Any]: ...


class Layout(Struct, frozen=True):
    """How one llama-server combines the parts of an /infill body. Tokens are packed; those that the model lacks are
    empty.

    ``prefix``, ``suffix``, ``middle``, ``file``: the token before each such part. ``repository``: the token before the
    repository's name, and the name. ``quarter``: a quarter of ``--batch-size``, in tokens. ``room``: the limit for all
    other files (``input_extra``) together, in tokens.
    """

    prefix: bytes
    suffix: bytes
    middle: bytes
    bos: bytes
    repository: bytes
    file: bytes
    is_suffix_first: bool
    quarter: int
    room: int


class Infill:
    """Converts /infill bodies to tokens as one llama-server does. The tokens of other files (``input_extra``), which
    editors send again and again, are cached: up to 8 MiB, the most recently used ones.
    """

    def __init__(self, server: InfillServer, layout: Layout) -> None:
        self._server, self.layout = server, layout
        self._known: dict[tuple[str, str], bytes] = {}
        self._n_bytes = 0

    async def tokens(self, body: Mapping[str, Any], whose: str = "") -> bytes:
        """Return the packed tokens of the prompt that llama-server makes of ``body``.

        ``whose``: the namespace of the request. Only texts that were cached for it are used, because the time of a
        cache hit would tell one user what another has sent. Raises PromptNotTokenizable for bodies that llama-server
        refuses: its own answer explains the fault best.
        """
        prefix = await self._text_or_mixed(body.get("input_prefix"))
        suffix = await self._text_or_mixed(body.get("input_suffix"))
        begun = body.get("prompt")
        prompt = await self._plain(begun, parse_special=True) if isinstance(begun, str) else b""
        return self._put(await self.extra(body.get("input_extra"), whose), prefix, suffix, prompt)

    def _put(self, extra: bytes, prefix: bytes, suffix: bytes, prompt: bytes) -> bytes:
        layout = self.layout
        n_suffix = max(0, layout.quarter - (2 + count(prompt)))
        before = layout.prefix + _last(prefix, 3 * layout.quarter) + prompt
        after = layout.suffix + head(suffix, n_suffix)
        whole = (after, before) if layout.is_suffix_first else (before, after)
        return b"".join((_last(extra, layout.room), layout.bos, *whole, layout.middle))

    async def extra(self, chunks: Any, whose: str) -> bytes:
        """Return the packed tokens of ``chunks``, the other files in a body (``input_extra``), each with its mark and
        name before its text. Raises PromptNotTokenizable if ``chunks`` has another form, or more than 512 files.
        """
        layout = self.layout
        parts = [layout.repository]
        if chunks is not None and not isinstance(chunks, list):
            raise PromptNotTokenizable("'input_extra' is no list")
        if len(chunks or ()) > _MAX_PARTS:
            raise PromptNotTokenizable("too many chunks")
        for chunk in chunks or ():
            if not isinstance(chunk, Mapping):
                raise PromptNotTokenizable("a chunk that is no object")
            text, name = chunk.get("text"), chunk.get("filename", _UNNAMED)
            if not isinstance(text, str) or not isinstance(name, str):
                raise PromptNotTokenizable("a chunk without a text, or with a name that is none")
            mark = await self._tokenized(f"{name}\n" if layout.file else _SNIPPET, whose)
            parts += [layout.file, mark, await self._tokenized(text, whose)]
        if layout.file:
            parts += [layout.file, await self._tokenized(_FILE, whose)]
        return b"".join(parts)

    async def _text_or_mixed(self, given: Any) -> bytes:
        """Return the packed tokens of ``given``: a text, or a list of texts and ids, each converted by itself. Special
        tokens in a text are read as plain text.
        """
        parts = []
        is_long = isinstance(given, list) and len(given) > _MAX_PARTS
        if is_long and any(isinstance(part, str) for part in given):
            raise PromptNotTokenizable("too many parts")
        for part in given if isinstance(given, list) else [given]:
            if isinstance(part, str):
                parts.append(await self._plain(part))
            elif isinstance(given, list) and type(part) is int and abs(part) < 2**31:
                parts.append(pack([part]))
            else:
                raise PromptNotTokenizable(
                    "'input_prefix' and 'input_suffix' are texts, or lists of texts and ids"
                )
        return b"".join(parts)

    async def _tokenized(self, text: str, whose: str) -> bytes:
        """Return the tokens of ``text``, from the cache of the namespace ``whose`` if they are there; else they are put
        into it. Raises as ``LlamaServer.tokenize``.
        """
        key = (whose, text)
        if (tokens := self._known.pop(key, None)) is None:
            tokens = await self._plain(text)
            if self._known.pop(key, None) is None:  # another request may have put the same meanwhile
                self._n_bytes += len(text) + len(tokens)
        self._known[key] = tokens  # the most recently used last
        while self._n_bytes > _CACHE_BYTES and len(self._known) > 1:
            oldest = next(iter(self._known))
            self._n_bytes -= len(oldest[1]) + len(self._known.pop(oldest))
        return tokens

    async def _plain(self, text: str, *, parse_special: bool = False) -> bytes:
        if not text:
            return b""
        return await self._server.tokenize(text, add_special=False, parse_special=parse_special)


def _last(tokens: bytes, n: int) -> bytes:
    return tokens[max(0, len(tokens) - n * WIDTH) :]


async def learn(server: InfillServer, slot: int, n_ctx: int) -> Layout:
    """Probe how ``server`` combines the parts of an /infill body. ``n_ctx``: tokens of a slot.

    The probes run in ``slot``, which the caller has leased; afterwards it holds a few meaningless tokens. Raises
    PromptNotTokenizable if the probes do not show the layout. Canceling is safe.
    """
    learning = _Learning(server, slot, n_ctx)
    for layout in await learning.candidates():
        if await learning.fits(layout):
            return await learning.with_limits(layout)
    raise _unknown("its prompts are built in an unknown way")


class _Learning:
    """The probes of ``server`` in ``slot``, and what their answers show of its layout."""

    def __init__(self, server: InfillServer, slot: int, n_ctx: int) -> None:
        self._server, self._n_ctx = server, n_ctx
        self._ours = {"id_slot": slot, "n_predict": 0, "cache_prompt": False}
        self._n_empty = 0  # tokens of an empty prompt

    async def candidates(self) -> list[Layout]:
        """Return the two layouts (suffix last, suffix first) that agree with the answer to an empty prompt.

        That answer shows the tokens for repository and file with their names, BOS, prefix, suffix and middle.
        """
        text, n = await self._prompt({"input_prefix": "", "input_suffix": ""})
        self._n_empty = n
        repository, text = await self._marked(text, _REPOSITORY)
        file, text = await self._marked(text, _FILE)
        ids = unpack(await self._server.tokenize(text, add_special=False))
        if len(ids) not in (3, 4) or count(repository) + count(file) + len(ids) != n:
            raise _unknown("the prompt that it repeats has other tokens than it counts")
        *bos, one, two, three = ids
        return [
            Layout(
                prefix=pack([first]),
                suffix=pack([second]),
                middle=pack([three]),
                bos=pack(bos),
                repository=repository,
                file=head(file, 1),
                is_suffix_first=is_suffix_first,
                quarter=self._n_ctx,
                room=self._n_ctx,
            )
            for is_suffix_first, first, second in ((False, one, two), (True, two, one))
        ]

    async def _marked(self, text: str, name: str) -> tuple[bytes, str]:
        """If ``text`` begins with a mark (one token) and ``name``, return the tokens of both and the rest of ``text``;
        else no tokens and ``text`` itself.

        Mark and name are tokenized separately: if the model puts a space before each piece, both together have other
        tokens.
        """
        tokens = await self._plain(name)
        before, found, behind = text.partition(await self._server.detokenize(tokens))
        if not found:
            return b"", text
        mark = await self._server.tokenize(before, add_special=False)
        if count(mark) != 1:
            raise _unknown("its prompts begin with unknown tokens")
        return mark + tokens, behind

    async def fits(self, layout: Layout) -> bool:
        """True if the server combines a body with all parts in the way that ``layout`` says."""
        body = {
            "input_prefix": "prefix",
            "input_suffix": "suffix",
            "prompt": "begun",
            "input_extra": [{"text": "one", "filename": "of it"}, {"text": "other"}],
        }
        text, n = await self._prompt(body)
        tokens = await Infill(self._server, layout).tokens(body)
        return count(tokens) == n and await self._server.detokenize(tokens) == text

    async def with_limits(self, layout: Layout) -> Layout:
        """Return ``layout`` with its limits. A prompt that is too long for the slot is refused with its number of
        tokens; that shows how much of a long prefix, and of a long other file, llama-server has kept.
        """
        n_prefix = count(await self._plain(_WORD * (_LONG_PREFIX // 2)))
        n_left = await self._n_refused(input_prefix=_WORD * (_LONG_PREFIX // 2)) - self._n_empty
        if not 0 < n_left < n_prefix or n_left % 3:
            raise _unknown("its --batch-size is larger than any that was tried")
        others = [{"text": self._too_long}]
        of_all = Infill(self._server, layout)
        n_extra, n_nothing = [count(await of_all.extra(chunks, "")) for chunks in (others, [])]
        n_taken = await self._n_refused(input_extra=others) - (self._n_empty - n_nothing)
        if not n_nothing <= n_taken <= n_extra:
            raise _unknown("its limit for other files is unknown")
        return replace(layout, quarter=n_left // 3, room=n_taken)

    @property
    def _too_long(self) -> str:
        return _WORD * (self._n_ctx // 2 + 2)

    async def _n_refused(self, **parts: Any) -> int:
        """Return how many tokens ``parts`` add to a prompt, by the count in llama-server's refusal. The prompt also has
        a text that alone is too long for the slot; the tokens of that text are subtracted.
        """
        n_begun = count(await self._server.tokenize(self._too_long, add_special=False))
        # Old builds truncate a prompt that is too long and compute it. With progress events they notice within a
        # batch that the connection is closed.
        body = {"input_prefix": "", "input_suffix": "", "prompt": self._too_long, "stream": True, **parts}
        status, answer = await self._server.refusal(
            "/infill", {**body, **self._ours, "return_progress": True}
        )
        error = answer.get("error") if isinstance(answer, dict) else None
        n_total = error.get("n_prompt_tokens") if isinstance(error, dict) else None
        if n_begun < self._n_ctx or status != 400 or not isinstance(n_total, int):
            raise _unknown("it does not tell how long a prompt was")
        return n_total - n_begun

    async def _plain(self, text: str) -> bytes:
        return await self._server.tokenize(text, add_special=False, parse_special=False)

    async def _prompt(self, body: dict[str, Any]) -> tuple[str, int]:
        status, answer = await self._ask(body)
        if status != 200 or not isinstance(answer, dict):
            raise _unknown(f"it was answered {status}")
        text, n = answer.get("prompt"), answer.get("tokens_evaluated")
        if not isinstance(text, str) or not isinstance(n, int):
            raise _unknown("its answer does not repeat the prompt")
        return text, n

    async def _ask(self, body: dict[str, Any]) -> tuple[int, Any]:
        return await self._server.ask("/infill", {**body, **self._ours})


def _unknown(why: str) -> PromptNotTokenizable:
    return PromptNotTokenizable(f"/infill of this llama-server is not known: {why}", Reason.INFILL)
