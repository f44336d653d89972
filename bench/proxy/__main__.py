"""``python -m bench.proxy``: what llamaslot adds, beside nginx, a small aiohttp proxy and LiteLLM."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

from bench.proxy import real, report, scenarios, starts
from bench.proxy.scenarios import Bench, Measured
from bench.proxy.targets import KINDS, Load, LoadFailed

SCENARIOS: dict[str, Callable[[Bench], Measured]] = {
    "short": scenarios.short,
    "hot": scenarios.hot,
    "paced": scenarios.paced,
    "viewers": scenarios.viewers,
    "flood": scenarios.flood,
    "crowd": scenarios.crowd,
    "whole": scenarios.whole,
    "filled": scenarios.filled,
    "beside": scenarios.beside,
    "health": scenarios.health,
    "help": starts.help_,
    "start": starts.start,
    "real": real.real,
}


def _parsed(arguments: list[str] | None) -> argparse.Namespace:
    about = "; ".join(f"{name}: {(work.__doc__ or '').split('.')[0]}" for name, work in SCENARIOS.items())
    parser = argparse.ArgumentParser(prog="python -m bench.proxy", description=__doc__, epilog=about)
    parser.add_argument("--only", nargs="*", choices=SCENARIOS, metavar="NAME", default=list(SCENARIOS))
    parser.add_argument("--rounds", type=int, default=0, help="each target has so many turns (5; 3 if quick)")
    parser.add_argument("--quick", action="store_true", help="fewer requests, for orientation")
    parser.add_argument("--proxies", nargs="+", choices=KINDS, help="these only")
    parser.add_argument(
        "--against", type=Path, help="another checkout with its venv, measured in turns with this one"
    )
    parser.add_argument("--results", type=Path, help="keep the figures here, with those of earlier runs")
    parser.add_argument("--write", type=Path, help="write the page about all that --results has")
    parser.add_argument("--note", default="", help="a sentence about this measurement, for that page")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """1 if a goal is missed."""
    options = _parsed(arguments)
    n_rounds = options.rounds or (3 if options.quick else 5)
    results = report.load(options.results) if options.results is not None else {}
    load, is_met = Load(), True
    against = options.against.resolve() if options.against is not None else None
    only = frozenset(options.proxies) if options.proxies else None
    bench = Bench(load, n_rounds, options.quick, against, only)
    try:
        for name in options.only:
            began = time.monotonic()
            try:
                measured = SCENARIOS[name](bench)
            except LoadFailed as error:
                sys.stdout.write(f"\n## {name}: not measured: {error}\n")
                is_met = False
                continue
            took_s = time.monotonic() - began
            lines = [
                f"\n## {name} ({took_s:.0f} s)\n",
                *report.table(measured.rows),
                "",
                *report.goals(measured.goals),
            ]
            sys.stdout.write("\n".join(lines) + "\n")
            sys.stdout.flush()
            is_met &= all(goal.is_met for goal in measured.goals)
            results[name] = report.to_json(measured, n_rounds)
            if options.results is not None:
                options.results.write_text(json.dumps(results))
    finally:
        load.close()
    if options.write is not None:
        options.write.write_text(report.page(results, SCENARIOS, options.note))
    return 0 if is_met else 1


if __name__ == "__main__":
    sys.exit(main())
