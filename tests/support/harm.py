"""The same users with and without llamaslot, on a server that was started with some flags: does llamaslot do harm?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.rival import Pair, run
from tests.support.stack import Stack

#: Of llama-server, for as many slots as ``RealServer`` is asked for.
DEFAULTS = ("--kv-unified", "--cache-ram", "8192", "--cache-idle-slots")
RAM_ONLY = ("--no-kv-unified", "--cache-ram", "8192", "--no-cache-idle-slots")
RAM_COPIES = ("--no-kv-unified", "--cache-ram", "8192", "--cache-idle-slots")


@dataclass(frozen=True, slots=True)
class Flags:
    """The flags of a llama-server, and whether llamaslot can place requests on it."""

    name: str
    extra: Sequence[str]
    saves: bool
    is_assisted: bool
    is_shared: bool = True  # backends[0].slot_save_path is llama-server's own


KINDS = (
    Flags("defaults, with a save path", DEFAULTS, saves=True, is_assisted=False),
    Flags("defaults", DEFAULTS, saves=False, is_assisted=False),
    Flags("a RAM cache, with a save path", RAM_ONLY, saves=True, is_assisted=True),
    Flags("a RAM cache", RAM_ONLY, saves=False, is_assisted=False),
    Flags("a RAM cache, another save path", RAM_ONLY, saves=True, is_assisted=False, is_shared=False),
    Flags("a RAM cache with copies of idle slots", RAM_COPIES, saves=False, is_assisted=False),
    Flags("defaults, --no-slots", (*DEFAULTS, "--no-slots"), saves=True, is_assisted=False),
    Flags("recommended", (), saves=True, is_assisted=True),
)


def front(model: Path, directory: Path, flags: Flags, *, alone: bool, **more: Any) -> Stack:
    settings = None
    if not flags.is_shared:
        (elsewhere := directory / "elsewhere").mkdir(parents=True)
        settings = {"backends": [{"slot_save_path": str(elsewhere)}]}
    return Stack(
        model, directory, alone=alone, extra=flags.extra, saves=flags.saves, settings=settings, **more
    )


async def compare(model: Path, directory: Path, flags: Flags, n_pairs: int, **sizes: Any) -> list[Pair]:
    """Pairs of runs on fresh servers, one through llamaslot and one directly; who goes first alternates."""
    pairs = []
    for number in range(n_pairs):
        runs = {}
        for alone in (True, False) if number % 2 else (False, True):
            where = directory / f"{number}-{'alone' if alone else 'through'}"
            async with front(model, where, flags, alone=alone) as stack:
                runs[alone] = await run(stack, **sizes)
                if not alone:
                    status = await stack.status()
                    assert status["backends"][0]["assist"]["is_on"] is flags.is_assisted, status["backends"][
                        0
                    ]
        pairs.append(Pair(through=runs[False], alone=runs[True]))
    return pairs
