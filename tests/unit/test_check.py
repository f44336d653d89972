"""``serve --check``: what the user that will serve cannot use, seen as that user, and by root from owners and modes."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner, Result

from llamaslot import cli
from llamaslot.cli.check import check
from llamaslot.store.quota import beyond_disk

SOURCE = Path(__file__).parents[2] / "src"
IS_ROOT = os.geteuid() == 0
for_root = pytest.mark.skipif(not IS_ROOT, reason="only root can check as another user")
SYSTEM_USER = "nobody"


@pytest.fixture
def box() -> Iterator[Path]:
    """A directory that everybody can enter, which those of pytest are not: what the configuration names lies there."""
    directory = Path(tempfile.mkdtemp(prefix="llamaslot-box-"))
    try:
        directory.chmod(0o755)
        for name in ("kv", "meta"):
            (directory / name).mkdir(mode=0o770)
        (directory / "keys.json").write_text("{}")
        (directory / "keys.json").chmod(0o600)
        config = {
            "auth": {"keys_file": "keys.json"},
            "backends": [{"url": "http://127.0.0.1:8080", "slot_save_path": "kv"}],
            "store": {"meta_dir": "meta", "quota": 0},
        }
        (directory / "config.yaml").write_text(yaml.safe_dump(config))
        (directory / "config.yaml").chmod(0o644)
        yield directory
    finally:
        shutil.rmtree(directory)


def give(*paths: Path) -> None:
    """To the user that will serve."""
    for path in paths:
        os.chown(path, pwd.getpwnam(SYSTEM_USER).pw_uid, -1)


def run(box: Path, *flags: str) -> Result:
    return CliRunner().invoke(cli.main, ["serve", "--check", "--config", str(box / "config.yaml"), *flags])


@pytest.fixture
def python(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Python that every user can run, with what this one has; none where there is no such thing."""
    found, packages = Path("/usr/bin/python3"), sysconfig.get_path("purelib")
    monkeypatch.setenv("PYTHONPATH", f"{SOURCE}:{packages}")
    tried = "import llamaslot.cli" if IS_ROOT else "raise SystemExit(1)"
    as_nobody = {"user": SYSTEM_USER, "group": "nogroup", "extra_groups": []} if IS_ROOT else {}
    done = subprocess.run([found, "-c", tried], capture_output=True, check=False, cwd="/", **as_nobody)  # type: ignore[call-overload]
    if done.returncode:
        pytest.skip("no Python here that another user can run with these packages")
    monkeypatch.setattr(sys, "executable", str(found))


def test_limits_of_managed_servers_without_any_are_a_note(box: Path) -> None:
    """A router has its own."""
    config = yaml.safe_load((box / "config.yaml").read_text())
    (box / "config.yaml").write_text(yaml.safe_dump({**config, "managed": {"max_loaded": 1}}))
    assert any("--models-max" in note for note in check(box / "config.yaml").notes)


@for_root
def test_as_the_user_that_serves(box: Path, python: None) -> None:
    """What root can read and write, and that user cannot, is a fault; mended, there is none."""
    give(box / "meta")
    assert (run(box).exit_code, run(box).stdout) == (0, f"{box / 'config.yaml'}: no faults\n")
    result = run(box, "--as", SYSTEM_USER)
    assert (result.exit_code, result.stdout) == (2, "")
    told = f"backends[0].slot_save_path: nobody may not read and write and enter {box / 'kv'} (it belongs to root:root"
    assert f"as nobody: {box / 'config.yaml'}: 2 faults" in result.stderr
    assert f"auth.keys_file: {box / 'keys.json'}: cannot be read: Permission denied" in result.stderr
    assert told in result.stderr

    give(box / "keys.json")
    assert told in run(box, "--as", SYSTEM_USER).stderr

    give(box / "kv")
    result = run(box, "--as", SYSTEM_USER)
    assert (result.exit_code, result.stdout) == (0, f"as nobody: {box / 'config.yaml'}: no faults\n")


@for_root
def test_what_root_has_left_behind(box: Path, python: None) -> None:
    """It was tried once as root: the files of that are not the service's to write."""
    (box / "kv" / ".llamaslot.lock").touch(0o600)
    (box / "meta" / "llama.rates.json").touch(0o600)
    (box / "meta" / "other.txt").touch(0o600)
    give(box / "keys.json", box / "kv", box / "meta")
    result = run(box, "--as", f"{SYSTEM_USER}:nogroup")
    assert result.exit_code == 2
    assert f"slot_save_path: nobody may not use {box / 'kv' / '.llamaslot.lock'}" in result.stderr
    assert f"store.meta_dir: nobody may not use {box / 'meta' / 'llama.rates.json'} (it" in result.stderr


@for_root
def test_owners_and_modes_tell_root_as_well(box: Path) -> None:
    """Without --as nothing is tried, but what nobody except root can use is seen."""
    notes = " ".join(check(box / "config.yaml").only_root)
    for told in ("auth.keys_file: only root can read", "store.meta_dir: only root can write to"):
        assert told in notes
    assert "--as USER checks as the user that will serve" in notes
    give(box / "keys.json", box / "kv", box / "meta")
    notes = " ".join(check(box / "config.yaml").only_root)
    assert "keys_file" not in notes
    assert "meta_dir" not in notes


@for_root
def test_a_python_that_the_user_cannot_run(box: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A venv made with a Python in root's home: systemd would say no more than "Permission denied"."""
    (box / "home").mkdir(mode=0o700)
    python = box / "home" / "python3"
    python.symlink_to(sys.executable)
    closed = box / "home" / "python3.real"
    shutil.copyfile("/bin/sh", closed)
    closed.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(closed))
    result = run(box, "--as", SYSTEM_USER)
    assert result.exit_code == 2
    assert f"nobody cannot run {closed}, the Python of this llamaslot: make its venv with" in result.stderr
    assert f"only root can run {closed}" in " ".join(check(box / "config.yaml").only_root)


def test_a_directory_that_is_missing(box: Path) -> None:
    """Is one for any user; what llamaslot makes by itself is none."""
    (box / "kv").rmdir()
    (box / "meta").rmdir()
    (fault,) = check(box / "config.yaml").faults
    assert fault.startswith(
        f"backends[0].slot_save_path: there is no {box / 'kv'}: make it, or mount it here."
    )
    assert run(box).exit_code == 2


def test_who_may_be_checked_as(box: Path) -> None:
    """A user of this machine, by root; and only --check does that."""
    assert "there is no user or group 'nosuchuser'" in run(box, "--as", "nosuchuser").stderr
    result = CliRunner().invoke(
        cli.main, ["serve", "--as", SYSTEM_USER, "--config", str(box / "config.yaml")]
    )
    assert (result.exit_code, "--as is for --check" in result.stderr) == (2, True)


# -- a quota that the disk does not have ---------------------------------------------------------------------------


def test_a_quota_beyond_the_disk_is_told(box: Path) -> None:
    """With what is free, and what is there already: those bytes are no new ones."""
    found = os.statvfs(box)
    n_free = found.f_bavail * found.f_frsize
    assert beyond_disk(n_free // 2, 0, box, 0) is None
    assert beyond_disk(2 * n_free, 0, box, 2 * n_free) is None
    assert "store.quota is" in str(beyond_disk(2 * n_free, 0, box, 1 << 20))
    assert "1.0 MiB are there" in str(beyond_disk(2 * n_free, 0, box, 1 << 20))
    assert "The least valuable are evicted" in str(beyond_disk(n_free // 2, n_free, box, 0)), (
        "what is left to others is not ours"
    )
    assert "min_free" not in str(beyond_disk(2 * n_free, 0, box, 0)), "all of the disk is ours"
    assert beyond_disk(0, n_free, box, 0) is None


def test_the_check_tells_it(box: Path) -> None:
    """As a note: it serves all the same."""
    raw = yaml.safe_load((box / "config.yaml").read_text())
    raw["store"]["quota"] = "900TB"
    (box / "config.yaml").write_text(yaml.safe_dump(raw))
    result = run(box)
    assert result.exit_code == 0
    assert f"note: store.quota is 819 TiB, but {box / 'kv'} has room for" in result.stderr
