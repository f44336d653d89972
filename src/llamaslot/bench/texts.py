"""Texts of a wanted length, from a folder or made up. Where a conversation has them from does not repeat."""

from __future__ import annotations

import random
from pathlib import Path

#: Characters of a folder that are used, at most.
_MOST_READ = 64 << 20
_SUFFIXES, _NOUNS, _VERBS, _ADJECTIVES = map(
    str.split,
    (
        ".c .cc .cpp .cs .css .go .h .hpp .html .java .js .json .kt .lua .md .php .py .rb .rs .rst .scala .sh .sql"
        " .swift .toml .ts .tsx .txt .yaml .yml",
        "cache slot server request token prompt answer model file table index stream client user queue batch context"
        " prefix error result value function module test buffer line system message record key path branch commit",
        "reads writes keeps moves returns checks sends loads saves copies finds counts waits opens closes compares",
        "first last long short empty shared local remote small large old new slow quick open busy idle",
    ),
)


class Texts:
    """Characters of a folder, or sentences of random words. ``folder`` without any text raises ValueError."""

    def __init__(self, folder: Path | None = None) -> None:
        self._source = _read(folder) if folder is not None else ""

    def take(self, n_chars: int, rng: random.Random) -> str:
        """A text of exactly so many characters."""
        if not self._source:
            return _made_up(n_chars, rng)
        pieces, n = [], 0
        while n < n_chars:
            start = rng.randrange(len(self._source))
            piece = self._source[start : start + n_chars - n]
            pieces.append(piece)
            n += len(piece)
        return "".join(pieces)


def _read(folder: Path) -> str:
    files = (
        [folder]
        if folder.is_file()
        else sorted(path for path in folder.rglob("*") if path.suffix in _SUFFIXES)
    )
    pieces, n = [], 0
    for path in files:
        if n >= _MOST_READ:
            break
        if path.is_file():
            text = path.read_text(errors="ignore")
            pieces.append(f"\n# {path.name}\n{text}")
            n += len(text)
    if n < 1000:
        raise ValueError(f"{folder}: less than 1,000 characters of text are in it")
    return "".join(pieces)


def _made_up(n_chars: int, rng: random.Random) -> str:
    sentences, n = [], 0
    while n < n_chars:
        adjectives, nouns = rng.choices(_ADJECTIVES, k=2), rng.choices(_NOUNS, k=2)
        does = f"{rng.choice(_VERBS)} {rng.randrange(1000)}"
        sentence = f"The {adjectives[0]} {nouns[0]} {does} of the {adjectives[1]} {nouns[1]}. "
        sentences.append(sentence)
        n += len(sentence)
    return "".join(sentences)[:n_chars]
