"""What was measured, as text for a terminal and as ``docs/performance.md``."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import subprocess
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bench.proxy.scenarios import Goal, Measured, Row
from bench.proxy.targets import KINDS, REPOSITORY

_NAMES = {
    "direct": "direct",
    "llamaslot": "llamaslot",
    "against": "other checkout",
    "nginx": "nginx",
    "aiohttp": "aiohttp, 30 lines",
    "litellm": "LiteLLM",
}


def number(value: float) -> str:
    """Three digits that count."""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def table(rows: Iterable[Row]) -> list[str]:
    """Medians of all targets that were measured, as lines of markdown."""
    rows = list(rows)
    kinds = [kind for kind in KINDS if any(row.values.get(kind) for row in rows)]
    lines = ["| | " + " | ".join(_NAMES[kind] for kind in kinds) + " |", "|---" * (len(kinds) + 1) + "|"]
    for row in rows:
        cells = [number(median) if (median := row.median(kind)) is not None else "" for kind in kinds]
        lines.append(f"| {row.what}, {row.unit} | " + " | ".join(cells) + " |")
    return lines


def goals(found: Iterable[Goal]) -> list[str]:
    lines = ["| What | Must be | Measured |", "|---|---|---|"]
    for goal in found:
        relation, value = "≥" if goal.at_least else "≤", number(goal.value)
        value = value if goal.is_met else f"**{value}**"
        lines.append(f"| {goal.what} | {relation} {number(goal.bound)} {goal.unit} | {value} |")
    return lines


def machine() -> str:
    model = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.machine(),
    )
    return (
        f"{os.cpu_count()} cores of {model}, Linux {platform.release()}, Python {platform.python_version()}"
    )


def commit() -> str:
    """The commit of this checkout; with a plus if files have changed since."""

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", *arguments], cwd=REPOSITORY, capture_output=True, text=True, check=False
        )
        return done.stdout.strip()

    return git("rev-parse", "--short=10", "HEAD") + (
        "+" if git("status", "--porcelain", "src", "bench") else ""
    )


def to_json(measured: Measured, n_rounds: int) -> dict[str, Any]:
    now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M")
    return {**dataclasses.asdict(measured), "rounds": n_rounds, "commit": commit(), "at": now}


def from_json(raw: Mapping[str, Any]) -> Measured:
    return Measured([Row(**row) for row in raw["rows"]], [Goal(**goal) for goal in raw["goals"]])


def load(path: Path) -> dict[str, Any]:
    """Results by scenario; none if there is no such file."""
    return dict(json.loads(path.read_text())) if path.exists() else {}


def page(results: Mapping[str, Mapping[str, Any]], order: Iterable[str], note: str = "") -> str:
    """``docs/performance.md``. ``note``: what else is to be said of this measurement."""
    there = [name for name in order if name in results]
    measured = {name: from_json(results[name]) for name in there}
    commits = sorted({str(results[name]["commit"]) for name in there})
    n_rounds = sorted({int(results[name]["rounds"]) for name in there})
    lines = [
        "# What llamaslot costs",
        "",
        "Written by `make bench` (ten minutes; `python -m bench.proxy --help`: single scenarios, another checkout"
        " beside this one). In front of a stand-in for llama-server that answers at once; one client process; each"
        " proxy has its turn alone; medians of"
        f" {'/'.join(map(str, n_rounds))} interleaved rounds, CPU as the kernel counts it. *aiohttp, 30 lines*:"
        " `bench/proxy/simple.py`. Ratios hold elsewhere, times do not.",
        "",
        f"{machine()}; commit {', '.join(commits)}; {max(str(results[name]['at']) for name in there)} UTC."
        + f" {note}".rstrip(),
        "",
        "## Goals",
        "",
        *goals(goal for name in there for goal in measured[name].goals),
        "",
        "## All figures",
        "",
        *table(row for name in there for row in measured[name].rows),
        "",
    ]
    return "\n".join(lines)
