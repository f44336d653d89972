"""Writes llamaslot's man page, made of the help texts of its commands: python .ci/man.py FILE."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import click

import llamaslot
from llamaslot import cli


def commands(command: click.Command, name: str) -> Iterator[tuple[str, click.Command, click.Context]]:
    context = click.Context(command, info_name=name, **command.context_settings)
    yield name, command, context
    if isinstance(command, click.Group):
        for its in command.list_commands(context):
            if (below := command.get_command(context, its)) is not None and not below.hidden:
                yield from commands(below, f"{name} {its}")


def escaped(text: str) -> str:
    """Text as roff takes it: dashes can be copied, no line is a request."""
    text = text.replace("\\", "\\e").replace("-", "\\-").replace("\b", "")
    return re.sub(r"^([.'])", r"\\&\1", text, flags=re.M)


def page() -> str:
    lines = [
        f'.TH LLAMASLOT 1 "" "llamaslot {llamaslot.__version__}" "User Commands"',
        ".SH NAME",
        "llamaslot \\- a streaming proxy that finds the KV cache of a prompt in front of llama\\-server",
        ".SH SYNOPSIS",
        ".B llamaslot",
        "COMMAND [OPTIONS] [ARGUMENTS]",
        ".SH DESCRIPTION",
        escaped((cli.main.help or "").strip()),
        ".SH COMMANDS",
    ]
    for name, command, context in commands(cli.main, "llamaslot"):
        if command is cli.main or isinstance(command, click.Group):
            continue
        usage = " ".join(command.collect_usage_pieces(context))
        lines += [f".SS {escaped(name)} {escaped(usage)}"]
        lines += [
            escaped(re.sub(r"\n\s*\n", "\n.PP\n", re.sub(r"(?m)^\s+", "", (command.help or "").strip())))
        ]
        for parameter in command.get_params(context):
            if isinstance(parameter, click.Option) and (record := parameter.get_help_record(context)):
                lines += [".TP", f".B {escaped(record[0])}", escaped(record[1] or "\\&")]
    lines += [
        ".SH EXIT STATUS",
        "0 stopped as asked; 1 a fault in llamaslot; 2 restarting does not help (configuration, port, directory).",
        ".SH SEE ALSO",
        "The documents of the repository, docs/.",
    ]
    return "\n".join(lines).replace("\\&.PP", ".PP") + "\n"


if __name__ == "__main__":
    path = Path(sys.argv[1])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page())
