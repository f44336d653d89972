"""What is known of the model that a pool serves: all that is needed to make a request of a body. No backend is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from llamaslot.cache.namespaces import Namespace
from llamaslot.cache.reuse import CacheKind, RewindModel
from llamaslot.errors import Reason
from llamaslot.formats.base import Format, PromptKind
from llamaslot.observe.metrics import UntokenizedRequests
from llamaslot.scheduling.placement import Rules
from llamaslot.scheduling.request import User
from llamaslot.tokens.conversion_checks import ConversionChecks
from llamaslot.tokens.tokenizer import Prompt, Tokenizer

_SLACK_TOKENS = 8  # at the end of the text before a medium, which may tokenize differently in context


class InfillPrompts(Protocol):
    """The prompts that bodies of /infill become."""

    async def prompt(self, body: Mapping[str, Any], whose: str) -> Prompt:
        """The tokens of ``body``. Raises OpaquePrompt, BackendDown, BackendRestarted, QueueFull. Canceling is safe."""
        ...

    def miscounted(self) -> None:
        """llama-server has counted other tokens in a body."""
        ...


@dataclass(slots=True, eq=False, repr=False)
class ModelContext:
    """One model, as long as any llama-server of the pool runs it. A new one is made for a new process, which may have
    another model or other flags; what was tokenized with the old one is tokenized again.

    ``n_ctx``: of one slot, in tokens. ``n_slots``: of one backend; more answers to one prompt are refused.
    ``rewind_model``: what a prompt can go back to. ``media_marker`` stands for a medium in a plain prompt.
    ``modalities``: what media the model reads; None where llama-server does not tell.
    """

    name: str
    n_ctx: int
    n_slots: int
    rules: Rules
    rewind_model: RewindModel
    tokenizer: Tokenizer
    conversions: ConversionChecks
    infill: InfillPrompts
    untokenized: UntokenizedRequests
    media_marker: str = ""
    modalities: Mapping[str, bool] | None = None

    def __repr__(self) -> str:
        return f"<ModelContext {self.name} {self.memory.value} {self.n_ctx} tok>"

    @property
    def memory(self) -> CacheKind:
        return self.rewind_model.memory

    def space(self, user: User, lora: str = "") -> Namespace:
        """Where a request of ``user`` computes. ``lora``: the scales that it sets."""
        return self.rules.space(user, lora)

    def reads_media(self, kinds: set[str]) -> bool:
        """Whether the model takes media of all these kinds (``vision``, ``audio``), as far as llama-server tells."""
        return self.modalities is None or all(map(self.modalities.get, kinds))

    def compare(self, format_: Format, body: Mapping[str, Any], prompt: Prompt, n_told: int) -> None:
        """llama-server has counted ``n_told`` tokens in ``prompt``, made of a ``body`` of that format. Where
        llamaslot has others, and that is no matter of where the text was cut, bodies like that are not taken for known
        any more."""
        if self.tokenizer.confirm(prompt, n_told):
            return
        self.untokenized.count(format_.name, Reason.MISCOUNTED)
        if format_.prompt_kind is PromptKind.INFILL:
            self.infill.miscounted()
        elif format_.prompt_kind is PromptKind.CONVERTED and prompt.whole:
            self.conversions.learn(body, is_right=False)

    def compare_head(self, format_: Format, n_ahead: int, n_found: int) -> None:
        """Of ``n_ahead`` tokens, computed ahead of a medium, llama-server has found ``n_found``. It must find all, but
        for what the end of a text may cost."""
        if n_found < n_ahead - _SLACK_TOKENS:
            self.untokenized.count(format_.name, Reason.TEMPLATE)
