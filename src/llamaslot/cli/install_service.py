"""``llamaslot install-service``: systemd units for llamaslot and its llama-servers, fitted to a configuration."""

from __future__ import annotations

import grp
import pwd
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from llamaslot.cli.output import fail, report_faults

# Slow imports are made where they are needed.
if TYPE_CHECKING:
    from llamaslot.config.load import Config
    from llamaslot.config.sections import BackendConfig

_MARGIN_S = 60.0
_STATE = Path("/var/lib/llamaslot")  # StateDirectory=
_NOTIFY_RELOAD = 253  # the first systemd with it
_TYPES = {
    True: "Type=notify-reload",
    False: "Type=notify\nExecReload=/bin/kill -HUP $$MAINPID",
}


class Options(NamedTuple):
    """The options of the command, which the units need beside the configuration. ``program``: the directory of the
    llamaslot program; None: that of the running one.
    """

    has_socket: bool = False
    user: str = "llamaslot"
    server_user: str = "llama"
    group: str = "llama"
    program: str | None = None
    model: str = "/models/model.gguf"
    slots: int = 4
    context: int = 65_536

    @property
    def program_directory(self) -> Path:
        return Path(self.program) if self.program is not None else Path(sys.argv[0]).absolute().parent


_DEFAULT = Options()


@click.command("install-service", short_help="Print systemd units for llamaslot and llama-server.")
@click.option("--config", "path", type=click.Path(path_type=Path), default="config.yaml", show_default=True)
@click.option(
    "--write",
    "directory",
    type=click.Path(path_type=Path, file_okay=False, exists=True),
    metavar="DIR",
    help="Write the units to DIR (/etc/systemd/system) instead of printing them.",
)
@click.option("--force", is_flag=True, help="Replace existing files that differ.")
@click.option(
    "--socket",
    "has_socket",
    is_flag=True,
    help="Add a socket unit: systemd listens, and a restart refuses no connection.",
)
@click.option("--user", default=_DEFAULT.user, show_default=True, help="User of llamaslot.")
@click.option("--server-user", default=_DEFAULT.server_user, show_default=True, help="User of llama-server.")
@click.option("--group", default=_DEFAULT.group, show_default=True, help="Group of both users.")
@click.option(
    "--program",
    default=None,
    metavar="DIR",
    help="Directory of the program llamaslot.  [default: that of this one]",
)
@click.option("--model", default=_DEFAULT.model, show_default=True, help="Path of llama-server's GGUF.")
@click.option(
    "--slots",
    type=click.IntRange(1),
    default=_DEFAULT.slots,
    show_default=True,
    help="Slots of llama-server.",
)
@click.option(
    "--context",
    type=click.IntRange(1),
    default=_DEFAULT.context,
    show_default=True,
    help="Context of each slot, in tokens.",
)
def install_service(path: Path, directory: Path | None, force: bool, **given: Any) -> None:
    """Print systemd units for llamaslot and for each llama-server on this machine.

    Users, group, umask, directories and ports agree with each other and with the
    configuration. For an existing file that differs the difference is shown, and the file is kept.
    """  # fmt: skip
    from llamaslot.config.load import Config

    version, options = _systemd(), Options(**given)
    with report_faults():
        config = Config.load(path)
        made = dict(units(path.absolute(), config, options, is_new=version >= _NOTIFY_RELOAD))
    for remark in remarks(path.absolute(), config, options, has_systemd=version > 0):
        click.echo(f"# {remark}", err=True)
    if directory is None:
        for name, text in made.items():
            click.echo(f"# --- {name}\n{text}")
        return
    import difflib

    differing = []
    with report_faults():
        for name, text in made.items():
            file = directory / name
            old = file.read_text() if file.exists() else None
            if old not in (None, text) and not force:
                differing.append(str(file))
                lines = old.splitlines(True), text.splitlines(True)
                click.echo("".join(difflib.unified_diff(*lines, str(file), "new")))
                continue
            file.write_text(text)
            file.chmod(0o644)
            click.echo(f"{file}: {'unchanged' if old == text else 'written'}", err=True)
    if differing:
        fail([f"not replaced, see above: {', '.join(differing)}; --force replaces them"])
    if version:
        click.echo(f"systemctl daemon-reload && systemctl enable --now {' '.join(made)}", err=True)


def remarks(path: Path, config: Config, options: Options, *, has_systemd: bool) -> Iterator[str]:
    """Yield one line for each thing on this machine that would keep the units from working. ``has_systemd``: systemd
    runs.
    """
    if not has_systemd:
        yield f"systemd does not run here: for a machine where it does; here: llamaslot serve --config {path}"
    for file in dict.fromkeys(
        (options.program_directory, path, config.store.meta_dir, *_directories(config))
    ):
        if file.absolute().is_relative_to("/root") or file.absolute().is_relative_to("/home"):
            yield f"{file.absolute()} is in a home, which the service does not see (ProtectHome): move it elsewhere"
    here = any(backend.url is not None and _is_here(backend.url) for backend in config.backends)
    user, group = options.user, options.group
    for name in dict.fromkeys((user, options.server_user) if here else (user,)):
        if not _is_known(pwd.getpwnam, name):
            yield f"there is no user {name}: useradd --system --gid {group} {name}"
    if not _is_known(grp.getgrnam, group):
        yield f"there is no group {group}: groupadd --system {group}"


def _is_known(find: Callable[[str], object], name: str) -> bool:
    try:
        find(name)
    except KeyError:
        return False
    return True


def units(path: Path, config: Config, options: Options, *, is_new: bool = False) -> Iterator[tuple[str, str]]:
    """Yield the file name and the text of each unit. ``is_new``: systemd knows ``Type=notify-reload``
    (253 and later).
    """
    local = [backend for backend in config.backends if backend.url is not None and _is_here(backend.url)]
    names = {
        backend.name: "llama-server" if len(local) == 1 else f"llama-server-{backend.name}"
        for backend in local
    }
    for backend in local:
        yield f"{names[backend.name]}.service", _of_server(backend, config, options)
    shutdown, written = config.shutdown, dict.fromkeys((config.store.meta_dir, *_directories(config)))
    elsewhere = [str(directory) for directory in written if not directory.is_relative_to(_STATE)]
    has_managed = any(backend.managed is not None for backend in config.backends)
    yield (
        "llamaslot.service",
        _filled(
            "llamaslot.service",
            servers=" ".join(f"{name}.service" for name in names.values()) or "network.target",
            needs="Requires=llamaslot.socket\n" if options.has_socket else "",
            type=Template(_TYPES[is_new]).substitute(),
            path=_word(f"PATH={options.program_directory}:/usr/local/bin:/usr/bin:/bin"),
            config=_word(path, is_command=True), user=options.user, group=options.group,
            writes=f"ReadWritePaths={' '.join(map(_word, elsewhere))}\n" if elsewhere else "",
            drain_s=f"{shutdown.drain_s:g}", save_s=f"{shutdown.save_s:g}",
            stop_s=f"{2 * shutdown.drain_s + shutdown.save_s + _MARGIN_S:.0f}",
            devices=f"{'#' if has_managed else ''}PrivateDevices=yes",
        ),
    )  # fmt: skip
    if options.has_socket:
        host = f"[{config.listen.host}]" if ":" in config.listen.host else config.listen.host
        yield "llamaslot.socket", _filled("llamaslot.socket", address=f"{host}:{config.listen.port}")


def _of_server(backend: BackendConfig, config: Config, options: Options) -> str:
    from urllib.parse import urlsplit

    url, key, n_slots = urlsplit(backend.url or ""), backend.api_key_file, options.slots
    directory = backend.slot_save_path or _STATE / "kv"
    return _filled(
        "llama-server.service",
        model=_word(options.model, is_command=True), host=url.hostname, port=url.port or 80,
        slots=n_slots, context=n_slots * options.context,
        directory=_word(directory, is_command=True), writable=_word(directory),
        server_user=options.server_user, group=options.group,
        writes=f"ReadWritePaths={_word(config.store.directory)}\n" if config.store.directory else "",
        runtime=_in_memory(backend.slot_save_path),
        key=f" \\\n  --api-key-file {_word(key, is_command=True)}" if key is not None else "",
    )  # fmt: skip


def _word(value: object, *, is_command: bool = False) -> str:
    """Return ``value`` as one word of a unit's setting (systemd.syntax(7)): escaped, and in quotes if it has blanks.
    ``is_command``: the setting is a command, in which ``$`` names a variable.
    """
    text = str(value).replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%")
    if is_command:
        text = text.replace("$", "$$")
    return f'"{text}"' if re.search(r"[\s\"']", text) else text


def _in_memory(directory: Path | None) -> str:
    """Return the lines of a unit that make ``directory`` for llama-server and llamaslot, if it is below /run; else
    none.
    """
    if directory is None or not directory.is_relative_to("/run") or directory == Path("/run"):
        return ""
    name = _word(directory.relative_to("/run"))
    return f"RuntimeDirectory={name}\nRuntimeDirectoryMode=2770\nRuntimeDirectoryPreserve=yes\n"


def _directories(config: Config) -> Iterator[Path]:
    if config.store.directory is not None:
        yield config.store.directory
    for backend in config.backends:
        if backend.slot_save_path is not None:
            yield backend.slot_save_path


def _filled(name: str, **values: object) -> str:
    from importlib import resources

    text = (resources.files("llamaslot.cli") / "units" / name).read_text()
    return Template(text).substitute(values)


def _is_here(url: str) -> bool:
    from urllib.parse import urlsplit

    return urlsplit(url).hostname in ("127.0.0.1", "localhost", "::1")


def _systemd() -> int:
    """Return the version of systemd on this machine; 0 if there is none."""
    try:
        said = subprocess.run(["systemctl", "--version"], capture_output=True, text=True, check=False).stdout
    except OSError:
        return 0
    found = re.match(r"systemd (\d+)", said)
    return int(found[1]) if found else 0
