"""Conversations on the real llama-server, stored as extents, and slot files made from these for any number
of tokens.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from llamaslot.cache.ids import WIDTH, common, unpack
from llamaslot.store.assemble import StateAt, assemble
from llamaslot.store.extent import Piece, differing_tokens, write_extent
from llamaslot.store.slot_layout import read_layout
from tests.support.real import RealServer
from tests.support.users import words


@dataclass(slots=True)
class Chain:
    """The extents of one conversation, as a store keeps them: each save adds what the earlier saves lack."""

    directory: Path
    tokens: bytes = b""
    pieces: list[Piece] = field(default_factory=list)
    states: dict[int, StateAt] = field(default_factory=dict)
    bytes_written: int = 0
    n_different: int = 0
    has_states: bool = False

    def branch(self) -> Chain:
        """Return another conversation that has had the same tokens so far."""
        return replace(
            self, pieces=list(self.pieces), states=dict(self.states), bytes_written=0, n_different=0
        )

    def take_in(self, landing: Path, seed: int = 0) -> None:
        """Store what the slot file ``landing`` has in addition to the earlier saves, with all its states. A sample of
        the other rows is compared with the stored ones.
        """
        layout = read_layout(landing)
        self.has_states = layout.shape.has_states
        known = common(self.tokens, layout.tokens)
        self.pieces = [
            Piece(piece.path, piece.start, min(known, piece.end))
            for piece in self.pieces
            if piece.start < known
        ]
        self.states = {n: at for n, at in self.states.items() if n <= known}
        self.n_different += differing_tokens(landing, layout, self.pieces, seed=seed)
        keep = [state.n_tokens for state in layout.states if state.n_tokens > known]
        path = self.directory / f"{len(list(self.directory.iterdir()))}.extent"
        extent = write_extent(landing, layout, known, layout.n_tokens, keep, path)
        self.bytes_written += path.stat().st_size
        self.tokens = layout.tokens
        self.pieces.append(Piece(path, extent.start, extent.end))
        self.states |= {n: StateAt(path, n) for n in keep}

    def stops(self) -> list[int]:
        """The numbers of tokens at which the conversation can be cut."""
        return sorted(self.states) if self.has_states else list(range(1, len(self.tokens) // WIDTH + 1))

    def cut(self, n_tokens: int, target: Path) -> int:
        """Make a slot file of the first ``n_tokens`` tokens, with every state up to there. Returns its size
        in bytes.
        """
        pieces = [
            Piece(piece.path, piece.start, min(n_tokens, piece.end))
            for piece in self.pieces
            if piece.start < n_tokens
        ]
        earlier = [self.states[n] for n in sorted(self.states) if n < n_tokens]
        return assemble(pieces, self.states.get(n_tokens), earlier, target)


@dataclass(slots=True)
class Conversation:
    """A chat in one slot, saved into ``chain`` after each answer."""

    server: RealServer
    slot: int
    messages: list[dict[str, str]]
    chain: Chain

    async def turn(self, text: str, n_predict: int = 24) -> None:
        self.messages.append({"role": "user", "content": text})
        body = {"messages": self.messages, "max_tokens": n_predict, "temperature": 0, "id_slot": self.slot}
        answer = await self.server.post("/v1/chat/completions", body)
        self.messages.append({"role": "assistant", "content": answer["choices"][0]["message"]["content"]})
        await self.server.post(f"/slots/{self.slot}?action=save", {"filename": "landing.kv"})
        self.chain.take_in(self.server.save_dir / "landing.kv")

    def branch(self, slot: int, n_messages: int) -> Conversation:
        """Return another conversation, in another slot, that goes on after the first ``n_messages`` messages of this
        one.
        """
        return Conversation(self.server, slot, self.messages[:n_messages], self.chain.branch())


@dataclass(frozen=True, slots=True)
class Cut:
    """The result of a restored cut file of ``n_tokens`` tokens. ``n_reused``: how many of them llama-server reused, by
    its own counter.

    ``rounding``: for an answer that differs from the cold one, the differences in the log-probabilities of the first
    token: cut against cold, and for comparison the same prompt computed in two steps without any file against cold.
    """

    n_tokens: int
    n_reused: int
    text: str
    cold_text: str
    rounding: tuple[float, float] | None = None


class Cutter:
    """Restores cut files, and has the same prompts computed cold. Uses two slots of its own."""

    def __init__(self, server: RealServer, rng: random.Random, slots: tuple[int, int] = (0, 1)) -> None:
        self._server, self._rng, self._slots = server, rng, slots

    async def cut(self, chain: Chain, n_tokens: int, n_predict: int = 16) -> Cut:
        """Cut ``chain`` at ``n_tokens``, restore the file, and continue it with a text of its own."""
        here, cold = self._slots
        chain.cut(n_tokens, self._server.save_dir / "cut.kv")
        begun = unpack(chain.tokens[: n_tokens * WIDTH])
        prompt = begun + [ord(letter) for letter in words(self._rng, 30)]
        await self._restore(n_tokens)
        before = await self._n_computed()
        text = await self._text(prompt, here, n_predict)
        n_reused = len(prompt) - (await self._n_computed() - before)
        await self._erase(cold)
        cold_text = await self._text(prompt, cold, n_predict)
        if text == cold_text:
            return Cut(n_tokens, n_reused, text, cold_text)
        await self._restore(n_tokens)
        of_cut = await self._first_token(prompt, here)
        await self._erase(cold)
        of_cold = await self._first_token(prompt, cold)
        await self._erase(here)
        await self._text(begun, here, 1)
        in_two_steps = await self._first_token(prompt, here)
        rounding = _distance(of_cut, of_cold), _distance(in_two_steps, of_cold)
        return Cut(n_tokens, n_reused, text, cold_text, rounding)

    async def _restore(self, n_tokens: int) -> None:
        await self._erase(self._slots[0])
        path = f"/slots/{self._slots[0]}?action=restore"
        restored = await self._server.post(path, {"filename": "cut.kv"})
        assert restored["n_restored"] == n_tokens

    async def _erase(self, slot: int) -> None:
        await self._server.post(f"/slots/{slot}?action=erase", {})

    async def _n_computed(self) -> int:
        return round((await self._server.metrics())["llamacpp:prompt_tokens_total"])

    async def _text(self, prompt: list[int], slot: int, n_predict: int) -> str:
        body: dict[str, Any] = {"prompt": prompt, "n_predict": n_predict, "temperature": 0, "id_slot": slot}
        return str((await self._server.post("/completion", body))["content"])

    async def _first_token(self, prompt: list[int], slot: int) -> dict[int, float]:
        body = {"prompt": prompt, "n_predict": 1, "n_probs": 8, "temperature": 0, "id_slot": slot}
        answer = await self._server.post("/completion", body)
        top = answer["completion_probabilities"][0]["top_logprobs"]
        return {token["id"]: token["logprob"] for token in top}


def _distance(a: dict[int, float], b: dict[int, float]) -> float:
    """The largest difference between the log-probabilities of a token that both have."""
    return max((abs(a[id_] - b[id_]) for id_ in a.keys() & b.keys()), default=float("inf"))
