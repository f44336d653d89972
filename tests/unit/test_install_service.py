"""``llamaslot install-service``: the units of docs/, and those of other configurations."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result

from llamaslot import cli
from llamaslot.cli.install_service import Options, remarks, units
from llamaslot.config.load import Config

DOCS = Path(__file__).parents[2] / "docs"
CONFIG = {
    "backends": [{"name": "gpu0", "url": "http://127.0.0.1:8080", "slot_save_path": "/var/lib/llamaslot/kv"}],
    "store": {"meta_dir": "/var/lib/llamaslot"},
}


def made(settings: object = CONFIG, *, is_new: bool = False, **options: Any) -> dict[str, str]:
    config = Config.model_validate(settings)
    chosen = Options(program="/opt/llamaslot/bin", **options)
    return dict(units(Path("/etc/llamaslot/config.yaml"), config, chosen, is_new=is_new))


def test_the_units_of_the_docs_are_made_by_it() -> None:
    """There are no two truths. If this fails: write them again, as docs/guides/service.md says."""
    assert made() == {
        name: (DOCS / name).read_text() for name in ("llama-server.service", "llamaslot.service")
    }


def test_what_would_keep_them_from_working_is_said() -> None:
    """A machine without systemd, files in a home (ProtectHome), users and groups that there are not."""
    config = Config.model_validate(CONFIG)
    there = Options(user="no-user", server_user="root", group="no-group", program="/home/me/bin")
    path = Path("/root/config.yaml")
    assert list(remarks(path, config, there, has_systemd=False)) == [
        "systemd does not run here: for a machine where it does; here: llamaslot serve --config /root/config.yaml",
        "/home/me/bin is in a home, which the service does not see (ProtectHome): move it elsewhere",
        "/root/config.yaml is in a home, which the service does not see (ProtectHome): move it elsewhere",
        "there is no user no-user: useradd --system --gid no-group no-user",
        "there is no group no-group: groupadd --system no-group",
    ]
    here = Options(program="/opt/bin", user="root", server_user="root", group="root")
    assert not [*remarks(Path("/etc/c.yaml"), config, here, has_systemd=True)]


def test_units_fit_their_configuration() -> None:
    """Ports, directories, times, and one unit for each llama-server of this machine."""
    backends = [
        {"name": "a", "url": "http://127.0.0.1:8090", "slot_save_path": "/srv/kv/a"},
        {"name": "b", "url": "http://localhost:8091", "slot_save_path": "/srv/kv/b"},
        {"name": "far", "url": "http://10.0.0.7:8080"},
    ]
    settings = {**CONFIG, "backends": backends, "shutdown": {"drain_s": 100, "save_s": 300}}
    found = made(settings, has_socket=True, is_new=True, user="u", group="g", slots=2, context=1000)
    assert list(found) == [
        "llama-server-a.service",
        "llama-server-b.service",
        "llamaslot.service",
        "llamaslot.socket",
    ]
    assert "--port 8090 " in found["llama-server-a.service"]
    assert "-np 2 -c 2000 " in found["llama-server-a.service"]
    assert "ReadWritePaths=/srv/kv/b\n" in found["llama-server-b.service"]
    for line in (
        "After=network-online.target llama-server-a.service llama-server-b.service", "Requires=llamaslot.socket",
        "Type=notify-reload", "User=u", "Group=g", "ReadWritePaths=/srv/kv/a /srv/kv/b", "TimeoutStopSec=560",
    ):  # fmt: skip
        assert f"\n{line}\n" in found["llamaslot.service"], line
    assert "ExecReload" not in found["llamaslot.service"].replace("no ExecReload", "")
    assert "ListenStream=127.0.0.1:8081\n" in found["llamaslot.socket"]


def test_llama_server_may_write_where_what_does_not_fit_in_memory_goes() -> None:
    """Through a link to the store."""
    backend = {"url": "http://127.0.0.1:8080", "slot_save_path": "/run/llamaslot"}
    unit = made({"backends": [backend], "store": {"directory": "/srv/kv"}})["llama-server.service"]
    assert "\nReadWritePaths=/run/llamaslot\nReadWritePaths=/srv/kv\nRuntimeDirectory=llamaslot\n" in unit


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
def test_systemd_accepts_the_socket(tmp_path: Path) -> None:
    """And the service that belongs to it."""
    for name, text in made(has_socket=True).items():
        (tmp_path / name).write_text(text)
    done = subprocess.run(
        [
            "systemd-analyze",
            "verify",
            "--man=no",
            tmp_path / "llamaslot.socket",
            tmp_path / "llamaslot.service",
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, "llamaslot" in done.stderr) == (0, False), done.stderr


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
def test_paths_may_have_blanks_quotes_and_signs(tmp_path: Path) -> None:
    """Each stays one word for systemd, which expands none of it."""
    directory = '/srv/my "kv"/100% $HOME'
    config = Config.model_validate(
        {
            "backends": [{"name": "gpu0", "url": "http://127.0.0.1:8080", "slot_save_path": directory}],
            "store": {"meta_dir": "/srv/meta dir"},
        }
    )
    options = Options(program="/opt/my programs", model="/models/a b.gguf")
    for name, text in units(Path("/etc/llama slot/it's.yaml"), config, options):
        (tmp_path / name).write_text(text)
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", *tmp_path.glob("*.service")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, "llama" in done.stderr) == (0, False), done.stderr
    server, own = [(tmp_path / name).read_text() for name in ("llama-server.service", "llamaslot.service")]
    assert '-m "/models/a b.gguf"' in server
    assert r'--slot-save-path "/srv/my \"kv\"/100%% $$HOME"' in server
    assert r'ReadWritePaths="/srv/my \"kv\"/100%% $HOME"' in server
    assert '--config "/etc/llama slot/it\'s.yaml"' in own
    assert 'Environment="PATH=/opt/my programs:/usr/local/bin:' in own


def test_what_is_there_is_not_replaced(tmp_path: Path) -> None:
    """It is shown what differs; --force replaces it."""
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(CONFIG))

    def run(*flags: str) -> Result:
        words = ["install-service", "--config", str(path), "--write", str(tmp_path), *flags]
        return CliRunner().invoke(cli.main, words)

    assert run().exit_code == 0
    unit = tmp_path / "llamaslot.service"
    text = unit.read_text()
    assert run().exit_code == 0
    unit.write_text(text.replace("User=llamaslot", "User=me"))
    result = run()
    assert (result.exit_code, "-User=me" in result.stdout, "+User=llamaslot" in result.stdout) == (
        2,
        True,
        True,
    )
    assert run("--force").exit_code == 0
    assert unit.read_text() == text


def test_a_directory_that_may_not_be_written(tmp_path: Path) -> None:
    """One line says which file, and nothing else."""
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(CONFIG))
    (tmp_path / "llamaslot.service").mkdir()
    result = CliRunner().invoke(
        cli.main, ["install-service", "--config", str(path), "--write", str(tmp_path)]
    )
    assert result.exit_code == 2
    assert result.stderr.endswith(f"{tmp_path}/llamaslot.service: Is a directory\n")
