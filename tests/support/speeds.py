"""Models of three speeds and three kinds. One more request is worth its cost on one of them, and not on another."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from tests.support import models

Kind = Literal["dense", "swa", "recurrent"]
Speed = Literal["2x64", "2x128", "4x256"]
KINDS: tuple[Kind, ...] = ("dense", "swa", "recurrent")
SPEEDS: tuple[Speed, ...] = ("2x64", "2x128", "4x256")


def model_of(kind: Kind, speed: Speed, directory: Path) -> Path:
    """A model with the layers and width of ``speed``; one with a sliding window always has six layers."""
    layers, width = map(int, speed.split("x"))
    if kind == "dense":
        return models.dense(directory, layers=layers, width=width)
    if kind == "swa":
        return models.swa(directory, width=width)
    return models.recurrent(directory, layers=layers, width=width)
