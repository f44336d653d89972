"""How long llamaslot takes until it answers: ``--help``, and ``serve`` with nothing and with many snapshots."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from bench.proxy.scenarios import Bench, Measured, Row
from bench.proxy.targets import Kind, Load, Process, Target, cpu_s, environment, until_healthy
from bench.proxy.upstream import N_VOCAB, slot_file
from llamaslot.store.snapshot import digest_of

N_SNAPSHOTS = 10_000
_KINDS: tuple[Kind, ...] = ("llamaslot", "against")


def help_(bench: Bench) -> Measured:
    """``llamaslot --help``."""
    wall, cpu = Row("`--help`", "s"), Row("`--help`: CPU", "s")
    with tempfile.TemporaryDirectory(prefix="llamaslot-bench-") as tmp:
        for target in _targets(bench, Path(tmp)):
            command = [*target.program(), "--help"]
            env = environment({"PYTHONPATH": str(target.source / "src")})
            for n in range(2 * bench.n_rounds + 1):
                before, start = os.times(), time.perf_counter()
                subprocess.run(command, env=env, check=True, stdout=subprocess.DEVNULL)
                took_s, after = time.perf_counter() - start, os.times()
                if n:
                    wall.values.setdefault(target.kind, []).append(took_s)
                    cpu.values.setdefault(target.kind, []).append(
                        after.children_user
                        + after.children_system
                        - before.children_user
                        - before.children_system
                    )
    measured = Measured([wall, cpu])
    measured.goal("`--help`", "s", wall.median("llamaslot"), 0.15)
    return measured


def start(bench: Bench) -> Measured:
    """From the start of ``serve`` to the first answer 200 of ``/health``."""
    rows = {
        "nothing": Row("start with nothing", "s"),
        "nothing: CPU": Row("start with nothing: CPU", "s"),
        "many": Row(f"start with {N_SNAPSHOTS:,} snapshots", "s"),
        "many: CPU": Row(f"start with {N_SNAPSHOTS:,} snapshots: CPU", "s"),
        "killed": Row(f"start with {N_SNAPSHOTS:,} snapshots, killed before", "s"),
    }
    with tempfile.TemporaryDirectory(prefix="llamaslot-bench-") as tmp, ExitStack() as stack:
        empty = [(target, target.directory) for target in _targets(bench, Path(tmp, "empty"))]
        full = _targets(bench, Path(tmp, "full"))
        for target in [*(target for target, _ in empty), *full]:
            stack.callback(target.stop)
            target.start_upstream()
        for target in full:
            _fill(target)
        rng = random.Random(2)
        for _ in range(bench.n_rounds):
            for target, _ in empty:
                shutil.rmtree(target.directory / "meta", ignore_errors=True)
                _measured_start(target, rows["nothing"], rows["nothing: CPU"]).end()
            for target in full:
                _measured_start(target, rows["many"], rows["many: CPU"]).end()
                # In the middle of a start, and some time after one: both are unprepared ends.
                _launch(target, rng.uniform(0.1, 1.0)).end(signal.SIGKILL)
                running = _measured_start(target, rows["killed"])
                time.sleep(rng.uniform(0.0, 1.0))
                running.end(signal.SIGKILL)
                _measured_start(target, rows["killed"]).end()
    measured = Measured(list(rows.values()))
    measured.goal("start with nothing", "s", rows["nothing"].median("llamaslot"), 0.4)
    measured.goal(f"start with {N_SNAPSHOTS:,} snapshots", "s", rows["many"].median("llamaslot"), 0.7)
    slowest = max(rows["killed"].values.get("llamaslot", [0.0]))
    measured.goal("… after a SIGKILL, the slowest", "s", slowest, 0.7)
    return measured


def _targets(bench: Bench, directory: Path) -> list[Target]:
    targets = []
    for kind in _KINDS:
        if (kind == "against" and bench.against is None) or (
            bench.only is not None and kind not in bench.only
        ):
            continue
        (directory / kind).mkdir(parents=True)
        source = bench.against if kind == "against" else None
        target = Target(kind, directory / kind, n_slots=4, source=source)
        (target.directory / "config.yaml").write_text(json.dumps(target.config))
        targets.append(target)
    return targets


def _process(target: Target) -> Process:
    command = [*target.program(), "serve", "--config", str(target.directory / "config.yaml")]
    return Process(command, target.directory / "proxy.log", {"PYTHONPATH": str(target.source / "src")})


def _launch(target: Target, seconds: float) -> Process:
    process = _process(target)
    time.sleep(seconds)
    return process


def _measured_start(target: Target, wall: Row, cpu: Row | None = None) -> Process:
    begin = time.perf_counter()
    process = _process(target)
    until_healthy(process.popen, target.port, process.log)
    wall.values.setdefault(target.kind, []).append(time.perf_counter() - begin)
    if cpu is not None:
        cpu.values.setdefault(target.kind, []).append(cpu_s(process.pid))
    return process


def _fill(target: Target) -> None:
    """Snapshots as llamaslot would have saved them: the first by itself, the others made after it. Then a start that
    reads them all, to its clean end.
    """
    settings = target.config | {"shutdown": {"save_s": 30, "drain_s": 0}}
    path = target.directory / "config.yaml"
    path.write_text(json.dumps(settings))
    process = _process(target)
    until_healthy(process.popen, target.port, process.log)
    load = Load()
    load.do("talk", port=target.port, n_tokens=2_000)
    load.close()
    process.end()
    [noted] = (json.loads(path.read_text()) for path in target.save_dir.glob("ls-*.json"))
    rng = np.random.default_rng(3)
    common = rng.integers(16, N_VOCAB, 300, np.int32).tobytes()
    for number in range(N_SNAPSHOTS - 1):
        n_tokens = int(rng.integers(500, 2_000))
        tokens = common + rng.integers(16, N_VOCAB, n_tokens - 300, np.int32).tobytes()
        data = slot_file(tokens)
        id_ = f"ls-{number:016x}"
        (target.save_dir / f"{id_}.kv").write_bytes(data)
        mine = noted | {
            "id": id_,
            "n_tokens": n_tokens,
            "size_bytes": len(data),
            "boot": None,
            "checkpoints": [],
            "digest": digest_of(tokens),
        }
        (target.save_dir / f"{id_}.json").write_text(json.dumps(mine))
    path.write_text(json.dumps(target.config))
    process = _process(target)
    until_healthy(process.popen, target.port, process.log)
    end = time.monotonic() + 60.0
    meta = target.directory / "meta"
    made = meta / "gpu0.sidecars", meta / "gpu0.index"
    while time.monotonic() < end and not all(path.exists() for path in made):
        time.sleep(0.1)
    process.end()
    if (n := len(list(target.save_dir.glob("*.kv")))) != N_SNAPSHOTS:
        raise RuntimeError(f"of {N_SNAPSHOTS} snapshots {n} were taken:\n{process.log.read_text()[-2_000:]}")
