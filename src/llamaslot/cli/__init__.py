"""The command line: ``llamaslot serve --config config.yaml``; ``llamaslot run -- llama-server …`` without a file;
``llamaslot doctor`` finds what is wrong; ``llamaslot bench`` measures what llamaslot saves; ``llamaslot drain`` for one
of several backends; ``llamaslot snapshots`` for the snapshots on disk; ``llamaslot keys`` for the keys of clients.
"""

from __future__ import annotations

import gc
import io
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

import llamaslot
from llamaslot.cli.bench import bench
from llamaslot.cli.commands import Commands, LateGroup
from llamaslot.cli.demo import demo
from llamaslot.cli.doctor import doctor
from llamaslot.cli.install_service import install_service
from llamaslot.cli.output import fail, run_to_end
from llamaslot.cli.run import run
from llamaslot.cli.running import drain, reload, undrain
from llamaslot.cli.status import status, top
from llamaslot.errors import ConfigError

# Slow imports are made where they are needed: with all of them ``--help`` takes 0.8 s instead of 0.1.
if TYPE_CHECKING:
    from llamaslot.config.load import Config

# It would look for some in every installed package: 15 ms.
_NO_PLUGINS = {"PYDANTIC_DISABLE_PLUGINS": "__all__"}

_MONITORING = {
    "dashboard": "grafana-dashboard.json",
    "alerts": "prometheus-alerts.yaml",
    "scrape": "prometheus-scrape.yaml",
}


@click.group(cls=Commands, name="main", context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(llamaslot.__version__, prog_name="llamaslot", message="%(prog)s %(version)s")
def main() -> None:
    """A proxy in front of llama-server that finds the KV cache of each prompt, in a slot or on disk."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a locale that is not UTF-8 lacks some characters


main.add_command(run)
main.add_command(bench)
main.add_command(demo)
main.add_command(drain)
main.add_command(undrain)
main.add_command(LateGroup("snapshots", help="List, check and remove the snapshots on disk."))
main.add_command(doctor)
main.add_command(status)
main.add_command(reload)
main.add_command(install_service)
main.add_command(top)
main.add_command(LateGroup("keys", help="Make, list and revoke the keys of clients."))


@main.command()
@click.option("--config", "path", type=click.Path(path_type=Path), default="config.yaml", show_default=True)
@click.option(
    "--check", "is_check", is_flag=True, help="Only check the configuration; exit code 2 if it has faults."
)
@click.option(
    "--as", "who", metavar="USER[:GROUP]", help="With --check, as root: check what this user may use."
)
def serve(path: Path, is_check: bool, who: str | None) -> None:
    """Serve clients until SIGTERM or SIGINT.

    Then running answers get time to end, and unsaved contexts are saved.
    """
    if who is not None and not is_check:
        raise click.UsageError("--as is for --check; the user that serves is set by the service manager")
    gc.disable()  # it takes a fifth of the imports' time; the application begins with it again
    try:
        _serve(path, is_check, who)
    finally:
        gc.enable()


def _serve(path: Path, is_check: bool, who: str | None) -> None:
    from llamaslot.config.load import Config
    from llamaslot.llama.transport.quick_import import environment

    try:
        if is_check:
            _check(path, who)
            return
        with environment(_NO_PLUGINS):
            config = Config.load(path)
    except ConfigError as error:
        fail([str(error)])
    from llamaslot.cli.log_lines import set_up_logging

    set_up_logging(config.log.level, config.log.format)
    _run(config, path)


def _check(path: Path, who: str | None) -> None:
    """Check the configuration and print notes and the result; with ``who`` as that user, whose exit code ends this
    process. Raises ConfigError with the faults.
    """
    from llamaslot.cli.check import check, check_as

    if who is not None:
        code, said = check_as(path, who)
        click.echo(f"as {who}: {said.rstrip()}", err=code != 0)
        sys.exit(code)
    checked = check(path)
    for note in (*checked.notes, *checked.only_root):
        click.echo(f"note: {note}", err=True)
    if checked.faults:
        raise ConfigError(str(path), checked.faults)
    click.echo(f"{path}: no faults")


def _run(config: Config, path: Path) -> None:
    from llamaslot.http.serve import serve as serve_app

    run_to_end(serve_app(config, path), config.listen)


@main.command(short_help="Print a dashboard, alert rules or lines for Prometheus.")
@click.argument("what", type=click.Choice(list(_MONITORING)))
def monitoring(what: str) -> None:
    """Print a file for monitoring: Grafana's dashboard, Prometheus' alert
    rules, or the lines with which Prometheus reads llamaslot's metrics.
    """
    import importlib.resources

    click.echo((importlib.resources.files("llamaslot") / "data" / _MONITORING[what]).read_text(), nl=False)


if __name__ == "__main__":
    main()
