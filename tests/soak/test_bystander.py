"""A stream beside evictions and restores."""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path

import pytest

from tests.support import models
from tests.support.bystander import Watched, compare_gaps, watch
from tests.support.figures import Figure
from tests.support.stack import Stack

pytestmark = [pytest.mark.soak, pytest.mark.real, pytest.mark.timeout(3600)]

N_PAIRS = 7


async def test_evictions_stop_the_stream_of_a_bystander_for_one_transfer_at_most(
    tmp_path: Path, figure: Figure
) -> None:
    """7 users of 6,500 tokens and a stream, on 4 slots and on 8; of some pairs of runs the median.

    The longest gap between its tokens is at most that with a slot for everybody and the longest single save or restore.
    """
    pairs = await compare_gaps(models.dense(tmp_path, layers=2, width=128), tmp_path, N_PAIRS)
    for pair in pairs:
        figure(pair)
        assert pair.tight.n_errors == pair.roomy.n_errors == 0
        assert pair.tight.n_restores > 0
        assert pair.roomy.n_restores == 0
    excess_s = statistics.median(pair.excess_s for pair in pairs)
    later_s = statistics.median(pair.later_excess_s for pair in pairs)
    figure(f"median above what may be: {excess_s:.3f} s, of follow-up turns {later_s:.3f} s")
    assert excess_s <= 0


async def test_a_landing_place_in_memory_makes_no_longer_gaps(tmp_path: Path, figure: Figure) -> None:
    """Of 7 users and a stream on 4 slots, in turns with a landing place on disk and one on a tmpfs. Files of 7 MB fit
    into the page cache, so a disk is no slower.
    """
    model, runs = models.dense(tmp_path, layers=2, width=128), dict[str, list[Watched]]()
    with tempfile.TemporaryDirectory(dir="/dev/shm") as memory:
        for number in range(4):
            both = {"disk": tmp_path, "memory": Path(memory)}
            for name in sorted(both, reverse=number % 2 == 1):
                where, landing = tmp_path / f"{number}-{name}", both[name] / f"landing-{number}"
                (kept := where / "kept").mkdir(parents=True)
                landing.mkdir()
                settings = {"store": {"directory": str(kept)}}
                async with Stack(
                    model, where, slots=4, batch=512, ubatch=512, settings=settings, save_dir=landing
                ) as stack:
                    run = await watch(
                        stack, n_users=7, n_context=6500, n_turns=3, at_a_time=3, seed=1 + number
                    )
                figure(f"{name}: {run}")
                runs.setdefault(name, []).append(run)
    gaps = {name: statistics.median(run.later_gap_s for run in its) for name, its in runs.items()}
    figure(f"longest gap of follow-up turns, medians: {gaps}")
    assert all(run.n_errors == 0 and run.n_saves and run.n_restores for its in runs.values() for run in its)
    assert gaps["memory"] <= 1.5 * gaps["disk"] + 0.02
