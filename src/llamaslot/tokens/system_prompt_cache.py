"""A cache of the tokens of system prompts and tools, by what they are made from."""

from __future__ import annotations

from hashlib import blake2b

_LIMIT_BYTES = 32 << 20  # entries of 60 kB as a rule: five hundred users with an agent of their own
_OVERHEAD = 200  # bytes of an entry besides its tokens, roughly


class SystemPromptCache:
    """A least-recently-used cache. Keys are stored as hashes: a wrong hit would only cut a prompt elsewhere."""

    def __init__(self, limit_bytes: int = _LIMIT_BYTES) -> None:
        self._limit_bytes = limit_bytes
        self._known: dict[bytes, bytes] = {}  # the most recently used last
        self.size_bytes = 0

    def __len__(self) -> int:
        return len(self._known)

    def find(self, made_from: bytes) -> bytes | None:
        """Its tokens, or None."""
        if (tokens := self._known.pop(key := _key(made_from), None)) is not None:
            self._known[key] = tokens
        return tokens

    def keep(self, made_from: bytes, tokens: bytes) -> None:
        self._drop(key := _key(made_from))  # another request may have put the same meanwhile
        self._known[key] = tokens
        self.size_bytes += len(tokens) + _OVERHEAD
        while self.size_bytes > self._limit_bytes and len(self._known) > 1:
            self._drop(next(iter(self._known)))

    def _drop(self, key: bytes) -> None:
        if (tokens := self._known.pop(key, None)) is not None:
            self.size_bytes -= len(tokens) + _OVERHEAD


def _key(made_from: bytes) -> bytes:
    return blake2b(made_from, digest_size=32).digest()
