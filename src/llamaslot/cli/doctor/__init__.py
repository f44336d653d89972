"""``llamaslot doctor``: one line per check, what a fault costs, and what mends it."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import click

from llamaslot.cli.output import EXIT_FAULT, report_faults

EXIT_FOUND = 1
_BUDGET_S = 30.0


@click.command(short_help="Find what costs reuse or speed, and how to mend it.")
@click.option("--config", "path", type=click.Path(path_type=Path), default="config.yaml", show_default=True)
@click.option("--as", "who", metavar="USER[:GROUP]", help="As root: check as this user, who will serve.")
@click.option("--deep", is_flag=True, help="Fill a slot to its end, however long that takes.")
@click.option("--json", "is_json", is_flag=True, help="Print JSON.")
def doctor(path: Path, who: str | None, deep: bool, is_json: bool) -> None:
    """Find what makes reuse or speed worse than it could be, and how to mend it.

    Exit code 0: nothing found; 1: something found; 2: the configuration has faults.

    It is safe while llama-server works. If a llamaslot serves this configuration, doctor asks it. Else it tries
    llama-server in one or two idle slots: it saves their contexts first, and restores them at the end.
    """
    # Slow imports are made where they are needed.
    import orjson
    from msgspec.structs import asdict

    from llamaslot.cli.check import run_as
    from llamaslot.cli.doctor.examine import examined
    from llamaslot.cli.doctor.findings import lines
    from llamaslot.config.load import Config

    if who is not None:
        flags = (*(("--deep",) if deep else ()), *(("--json",) if is_json else ()))
        with report_faults():
            code, said = run_as(who, path, "doctor", *flags)
        click.echo(said, nl=False, err=code == EXIT_FAULT)
        sys.exit(code)
    with report_faults():
        config = Config.load(path)
        findings = list(examined(path, config, None if deep else _BUDGET_S))
    if is_json:
        told = {"config": str(path), "findings": [asdict(finding) for finding in findings]}
        click.echo(orjson.dumps(told, option=orjson.OPT_INDENT_2).decode())
    else:
        for line in lines(findings, shutil.get_terminal_size().columns if sys.stdout.isatty() else None):
            click.echo(line)
    sys.exit(EXIT_FOUND if any(finding.is_found for finding in findings) else 0)
