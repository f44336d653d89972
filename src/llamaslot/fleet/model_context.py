"""What llamaslot knows of the model that a pool serves: all that is needed to convert a body to a request. It does not
depend on a backend. For each shape of a body it remembers if llamaslot's conversion gives as many tokens as
llama-server counts.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Mapping
from typing import Any

from msgspec import Struct

from llamaslot.cache.namespaces import Namespace
from llamaslot.cache.reuse import CacheKind, RewindModel
from llamaslot.errors import Reason
from llamaslot.fleet.infill_prompts import InfillPrompts
from llamaslot.formats.base import Format, PromptKind
from llamaslot.observe.metrics import UntokenizedRequests
from llamaslot.scheduling.request import User
from llamaslot.scheduling.settings import SchedulingSettings
from llamaslot.tokens.tokenizer import Prompt, Tokenizer

_SLACK_TOKENS = 8  # so many tokens before a medium may differ, because the text continues behind it

#: Fields in which names and values are the client's own: arguments of calls, and their descriptions.
_OWN = {"input_schema", "parameters", "metadata", "chat_template_kwargs", "arguments"}
_MAX_SHAPES = 1024
_COUNT = "/v1/messages/count_tokens"


def shape_of(body: Mapping[str, Any]) -> frozenset[tuple[str, str]]:
    """Return the shape of a body, as a key: the names of its fields, together with the types and roles of the parts
    that have them.
    """
    found = set[tuple[str, str]]()
    left: list[Any] = [body]
    while left:
        part = left.pop()
        if isinstance(part, list):
            left += part
        elif isinstance(part, Mapping):
            # Values that are no names are visited below and may be large: formatting them at each level takes far too
            # long.
            names = [part.get("type"), part.get("role")]
            kind = " ".join(name[:64] if isinstance(name, str) else "" for name in names)
            for name, value in part.items():
                found.add((kind, str(name)[:64]))
                if name not in _OWN and not (name == "input" and part is not body):  # of a call
                    left.append(value)
    return frozenset(found)


class ConversionChecks:
    """Remembers for each shape of a body if its conversion gives as many tokens as llama-server counts. ``ask`` posts
    a body to a path of llama-server, and returns status and JSON.
    """

    def __init__(self, ask: Callable[[str, Mapping[str, Any]], Awaitable[tuple[int, Any]]]) -> None:
        self._ask = ask
        self._is_right: dict[frozenset[tuple[str, str]], bool] = {}

    def learn(self, body: Mapping[str, Any], *, is_right: bool) -> None:
        """Record whether llama-server has counted as many tokens in ``body`` as its conversion gives. A shape with one
        wrong count stays wrong.
        """
        shape = shape_of(body)
        self._is_right[shape] = self._is_right.pop(shape, True) and is_right
        if len(self._is_right) > _MAX_SHAPES:
            del self._is_right[next(iter(self._is_right))]

    def known(self, body: Mapping[str, Any]) -> bool | None:
        """True if conversions of bodies of this shape are right, False if not, None if unknown."""
        return self._is_right.get(shape_of(body)) if self._is_right else None

    async def check(self, body: Mapping[str, Any], n_tokens: int) -> bool:
        """Return True if llama-server counts ``n_tokens`` in ``body``, a body of /v1/messages whose shape is not
        ``known``.

        Returns False if llama-server refuses the body; it will usually refuse the request too, and the next body of
        this shape is checked again. Returns True on a build without the route that counts; then the count in the
        answer decides. Raises BackendDown.
        """
        status, counted = await self._ask(_COUNT, body)
        if status == 404:
            return True
        if status != 200 or not isinstance(counted, Mapping):
            return False
        is_right = counted.get("input_tokens") == n_tokens
        self.learn(body, is_right=is_right)
        return is_right


class ModelContext(Struct, eq=False):
    """One model, as long as any llama-server of the pool runs it. When all are gone, the next process gets a new
    context, because it may have another model or other flags. A request that was tokenized with the old one is
    tokenized again.

    ``n_ctx``: the context of one slot in tokens. ``n_slots``: the slots of one backend; a request for more answers to
    one prompt is refused. ``media_markers`` returns the placeholders of a medium in a plain prompt, one for each
    backend. ``modalities``: the media that the model reads; None if llama-server does not tell.
    """

    name: str
    n_ctx: int
    n_slots: int
    settings: SchedulingSettings
    rewind_model: RewindModel
    tokenizer: Tokenizer
    conversions: ConversionChecks
    infill: InfillPrompts
    untokenized: UntokenizedRequests
    media_markers: Callable[[], Collection[str]] = lambda: ("",)
    modalities: Mapping[str, bool] | None = None

    def __repr__(self) -> str:
        return f"<ModelContext {self.name} {self.cache_kind.value} {self.n_ctx} tok>"

    @property
    def cache_kind(self) -> CacheKind:
        return self.rewind_model.cache_kind

    def namespace(self, user: User, lora: str = "") -> Namespace:
        """Return the namespace of a request of ``user`` with the LoRA scales ``lora``."""
        return self.settings.namespace(user, lora)

    def reads_media(self, kinds: set[str]) -> bool:
        """True if the model reads media of all these kinds (``vision``, ``audio``), or llama-server does not tell."""
        return self.modalities is None or all(map(self.modalities.get, kinds))

    def compare(self, format_: Format, body: Mapping[str, Any], prompt: Prompt, n_told: int) -> None:
        """Compare the number of tokens in ``prompt``, made from a ``body`` of this format, with ``n_told``,
        llama-server's count.

        If they differ, and not only because the text was tokenized in pieces, the tokens of similar bodies count as
        unknown from now on.
        """
        if self.tokenizer.confirm(prompt, n_told):
            return
        self.untokenized.count(format_.name, Reason.MISCOUNTED)
        if format_.prompt_kind is PromptKind.INFILL:
            self.infill.miscounted()
        elif format_.prompt_kind is PromptKind.CONVERTED and prompt.whole:
            self.conversions.learn(body, is_right=False)

    def compare_head(self, format_: Format, n_ahead: int, n_found: int) -> None:
        """Compare the ``n_ahead`` tokens that were computed ahead of a medium with the ``n_found`` tokens that
        llama-server then found in the slot. If more than a few are missing, the request counts as one whose tokens
        were not known.
        """
        if n_found < n_ahead - _SLACK_TOKENS:
            self.untokenized.count(format_.name, Reason.TEMPLATE)
