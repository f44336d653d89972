"""``python -m llamaslot.bench.simulator``: policies compared on seeded traces, or on one from a file."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import orjson

from llamaslot.bench.simulator.generate import generate, scaled
from llamaslot.bench.simulator.machine import Hardware
from llamaslot.bench.simulator.result import Result, table
from llamaslot.bench.simulator.run import Policy, Setting, simulate
from llamaslot.bench.simulator.trace import Trace

QUARTER = 0.25  # of all contexts: what ``--disk 1`` means


@dataclass(frozen=True, slots=True)
class _Task:
    """One run. The trace is made, or read, by the process that runs it."""

    file: Path | None
    seed: int
    scale: int
    setting: Setting


@lru_cache(maxsize=2)
def _trace(file: Path | None, seed: int, scale: int) -> Trace:
    if file is not None:
        return Trace.read(file)
    name = "default" if scale == 1 else f"default x {scale}"
    return generate(seed, scaled(scale), name)


def _perform(task: _Task) -> Result:
    return simulate(_trace(task.file, task.seed, task.scale), task.setting)


def _tasks(options: argparse.Namespace) -> list[_Task]:
    hardware = Hardware().times(options.scale)
    seeds = [0] if options.trace else options.seeds
    return [
        _Task(
            options.trace,
            seed,
            options.scale,
            Setting(policy, disk * QUARTER if disk else None, options.slots * options.scale, hardware),
        )
        for seed in seeds
        for disk in options.disk
        for policy in options.policies
    ]


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m llamaslot.bench.simulator", description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1], help="of generated traces")
    parser.add_argument("--trace", type=Path, help="a file in place of a generated trace")
    parser.add_argument(
        "--write", type=Path, help="write the trace of the first seed there, and do nothing else"
    )
    parser.add_argument(
        "--disk", type=float, nargs="+", default=[1.0], help="in quarters of all contexts; 0: unlimited"
    )
    parser.add_argument("--policies", type=Policy, nargs="+", default=list(Policy), help=", ".join(Policy))
    parser.add_argument("--slots", type=int, default=4)
    parser.add_argument(
        "--scale",
        type=int,
        default=1,
        help="times the users, the slots and the server's speeds (16: 960 users)",
    )
    parser.add_argument("--jobs", type=int, help="processes; as many as there are cores if not given")
    parser.add_argument("--json", type=Path, help="write all figures there as well")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options(arguments)
    if options.write:
        _trace(None, options.seeds[0], options.scale).write(options.write)
        return 0
    tasks = _tasks(options)
    with ProcessPoolExecutor(options.jobs) as pool:
        results = list(pool.map(_perform, tasks))
    sys.stdout.write(table(results))
    if options.json:
        options.json.write_bytes(
            orjson.dumps([result.to_json() for result in results], option=orjson.OPT_INDENT_2)
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
