"""``--config`` and ``--store``: which llamaslot a command is about."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])

#: Written by ``llamaslot run`` for each model, in that model's part of its store: what it was started with.
RUN_CONFIG = "config.yaml"


def which(command: F) -> F:
    """Adds both options. The command gets the configuration as ``path``."""
    config = click.option(
        "--config",
        "path",
        type=click.Path(path_type=Path),
        default="config.yaml",
        show_default=True,
        callback=lambda context, _, path: context.meta.get(__name__, path),
    )
    store = click.option(
        "--store",
        type=click.Path(path_type=Path, file_okay=False, exists=True),
        metavar="DIR",
        help="Instead of --config: the store of 'llamaslot run', or the part of one model in it.",
        callback=_of_run,
        expose_value=False,
        is_eager=True,
    )
    return config(store(command))


def _of_run(context: click.Context, option: click.Parameter, store: Path | None) -> None:
    from llamaslot.store.shared_store import META

    if store is None:
        return
    found = {path.parent.name: path for path in sorted(store.glob(f"{META}/*/{RUN_CONFIG}"))}
    part = store.parent / META / store.name / RUN_CONFIG
    if part.exists():
        found = {store.name: part}
    if not found:
        raise click.BadParameter(f"no 'llamaslot run' has used {store}", context, option)
    if len(found) > 1:
        there_are = ", ".join(str(store / name) for name in found)
        raise click.BadParameter(f"which model? There are {there_are}", context, option)
    context.meta[__name__] = next(iter(found.values()))
