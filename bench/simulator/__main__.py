"""``python -m bench.simulator``: policies compared on seeded traces, or on one from a file."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import orjson

from bench.simulator.generate import Recipe, crew, generate, scaled
from bench.simulator.machine import Hardware
from bench.simulator.result import Result, table
from bench.simulator.run import LEFT, Policy, Setting, simulate
from bench.simulator.trace import Trace
from llamaslot.scheduling.settings import PrefillSettings, SchedulingSettings

QUARTER = 0.25  # of all contexts: what ``--disk 1`` means


SHARED, LEFT_ALONE = "shared", "left"
SWEPT = ("chunk_threshold_s", *PrefillSettings.__struct_fields__)


@dataclass(frozen=True, slots=True)
class _Task:
    """One run. The trace is made, or read, by the process that runs it."""

    trace: Path | Recipe
    name: str
    seed: int
    setting: Setting


@lru_cache(maxsize=2)
def _trace(trace: Path | Recipe, name: str, seed: int) -> Trace:
    return Trace.read(trace) if isinstance(trace, Path) else generate(seed, trace, name)


def _perform(task: _Task) -> Result:
    return simulate(_trace(task.trace, task.name, task.seed), task.setting)


def _recipe(options: argparse.Namespace) -> tuple[Recipe, str]:
    """And its name, which says in what it differs from the default."""
    recipe, name = Recipe(), "default"
    if options.users or options.hours:
        recipe = crew(options.users or recipe.n_users, options.hours or recipe.day_s / 3600)
        name = f"{recipe.n_users} users, {recipe.day_s / 3600:g} h"
    if options.together:
        recipe = replace(recipe, p_together=options.together)
        name += f", {options.together:g} together"
    return scaled(options.scale, recipe), name if options.scale == 1 else f"{name} x {options.scale}"


def _chunked_prefill(options: argparse.Namespace) -> Iterator[tuple[str, SchedulingSettings]]:
    """The settings for long prompts that are compared, by their names."""
    for name in options.prefill:
        yield name, SchedulingSettings() if name == SHARED else LEFT
    if options.sweep:
        setting, *values = options.sweep
        for value in map(float, values):
            changed = {setting: value}
            is_own = setting == "chunk_threshold_s"
            settings = (
                SchedulingSettings(chunk_threshold_s=value)
                if is_own
                else SchedulingSettings(prefill=PrefillSettings(**changed))
            )
            yield f"{setting} {value:g}", settings


def _tasks(options: argparse.Namespace) -> list[_Task]:
    hardware = replace(Hardware(), save_bytes_per_s=options.save * 1e9).times(options.scale)
    recipe, name = _recipe(options)
    return [
        _Task(
            options.trace or recipe,
            name,
            seed,
            Setting(
                policy,
                disk * QUARTER if disk else None,
                options.slots * options.scale,
                hardware,
                settings,
                prefill,
            ),
        )
        for seed in ([0] if options.trace else options.seeds)
        for disk in options.disk
        for policy in options.policies
        for prefill, settings in (
            [("-", SchedulingSettings())] if policy is Policy.ORIGINAL else _chunked_prefill(options)
        )
    ]


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.simulator", description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1], help="of generated traces")
    parser.add_argument("--users", type=int, help="of the generated trace; 60 if not given")
    parser.add_argument("--hours", type=float, help="of the generated trace; 8 if not given")
    parser.add_argument(
        "--together",
        type=float,
        default=0.0,
        help="share of a user's rounds in which four conversations begin alike",
    )
    parser.add_argument("--trace", type=Path, help="a file in place of a generated trace")
    parser.add_argument(
        "--write", type=Path, help="write the trace of the first seed there, and do nothing else"
    )
    parser.add_argument(
        "--disk", type=float, nargs="+", default=[1.0], help="in quarters of all contexts; 0: unlimited"
    )
    parser.add_argument("--policies", type=Policy, nargs="+", default=list(Policy), help=", ".join(Policy))
    parser.add_argument(
        "--prefill",
        nargs="*",
        choices=[SHARED, LEFT_ALONE],
        default=[SHARED],
        help="long prompts: computed in chunks that give way (shared), or left to llama-server (left)",
    )
    parser.add_argument(
        "--sweep",
        nargs="+",
        metavar=("SETTING", "VALUE"),
        help=f"and with each of these values of one setting for them: {', '.join(SWEPT)}",
    )
    parser.add_argument("--slots", type=int, default=4)
    parser.add_argument(
        "--save", type=float, default=1.0, help="GB/s of a save: 1 to a disk, 8 to a landing place in memory"
    )
    parser.add_argument(
        "--scale",
        type=int,
        default=1,
        help="times the users, the slots and the server's speeds (16: 960 users)",
    )
    parser.add_argument("--jobs", type=int, help="processes; as many as there are cores if not given")
    parser.add_argument("--json", type=Path, help="write all figures there as well")
    options = parser.parse_args(arguments)
    if options.sweep and options.sweep[0] not in SWEPT:
        parser.error(f"--sweep: one of {', '.join(SWEPT)}")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options(arguments)
    if options.write:
        _trace(*_recipe(options), options.seeds[0]).write(options.write)
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
