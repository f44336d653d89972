"""Models of three speeds and three kinds: what is worth a request more on one of them is not on another."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from tests.support import models

Kind = Literal["dense", "swa", "recurrent"]
Speed = Literal["2x64", "2x128", "4x256"]
KINDS: tuple[Kind, ...] = ("dense", "swa", "recurrent")
SPEEDS: tuple[Speed, ...] = ("2x64", "2x128", "4x256")


def model_of(kind: Kind, speed: Speed, directory: Path) -> Path:
    """Layers and width as ``speed`` says, but for the six layers that a sliding window takes."""
    layers, width = map(int, speed.split("x"))
    if kind == "dense":
        return models.dense(directory, layers=layers, width=width)
    if kind == "swa":
        return models.swa(directory, width=width)
    return models.recurrent(directory, layers=layers, width=width)
