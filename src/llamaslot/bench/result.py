"""The result of a benchmark, and the figures that follow from it. It is saved as JSON, and a later benchmark can be
compared with it.
"""

from __future__ import annotations

import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import msgspec
from msgspec import Struct, field

FORMAT = 1


class Request(Struct):
    """One request and its answer. ``sent_s``, ``first_s`` (first token of the answer, None if none came) and ``end_s``
    are seconds since the run began. ``n_prompt``, ``n_reused``, ``n_answer``: tokens of the prompt, those reused (None
    if the server does not report them), and tokens of the answer.

    ``n_unlimited``: tokens that a cache of unlimited size would have reused: those of the conversation's previous
    prompt and answer, 0 for the first turn. ``error``: what went wrong, in few words; empty if nothing did.
    """

    user: str
    turn: int
    sent_s: float
    first_s: float | None = None
    end_s: float = 0.0
    n_prompt: int = 0
    n_reused: int | None = None
    n_answer: int = 0
    n_unlimited: int = 0
    error: str = ""

    @property
    def wait_s(self) -> float | None:
        """The seconds from sending the request to the first token; None if no token came."""
        return None if self.first_s is None else self.first_s - self.sent_s


class Run(Struct):
    """One pass of the workload. ``makespan_s``: seconds from the first request to the last answer. ``n_counted``:
    prompt tokens that the server computed meanwhile, by its own metric ``counter``; None if it has none.
    """

    makespan_s: float
    requests: list[Request]
    n_counted: int | None = None
    counter: str = ""


class Side(Struct):
    """One of the servers that were compared, and its runs. ``about``: slots, context and build, in words. ``n_ctx``:
    tokens of a slot's context, None if unknown.
    """

    name: str
    url: str
    model: str
    about: str = ""
    n_ctx: int | None = None
    runs: list[Run] = field(default_factory=list)


class Result(Struct):
    """The result of a benchmark. ``workload``: its description in words. ``at``: the date and time of its end."""

    workload: str
    at: str
    sides: list[Side]
    format: int = FORMAT


def save(result: Result, path: Path) -> None:
    path.write_bytes(msgspec.json.format(msgspec.json.encode(result), indent=1))


def load(path: Path) -> Result:
    """Read a saved result. Raises OSError, and ValueError if the file is no result of this version."""
    try:
        result = msgspec.json.decode(path.read_bytes(), type=Result)
    except msgspec.MsgspecError as error:
        raise ValueError(f"{path} is no result of llamaslot bench --json: {error}") from None
    if result.format != FORMAT or not result.sides:
        raise ValueError(f"{path} is a result of another llamaslot bench: measure it again")
    return result


class Figures(Struct):
    """The measures of one server, over all its runs. A measure that is not known is None."""

    n_answered: int
    n_failed: int
    n_prompt: int
    n_reused: int | None
    n_unlimited: int
    follow_up_reuse: float | None  # of ``n_unlimited``
    n_counted: int | None
    first_s: list[float]  # of first turns, sorted
    follow_up_s: list[float]
    makespan_s: float  # mean of the runs
    answer_per_s: float
    unfairness: float | None  # the slowest user's mean wait, in that of the median user
    errors: dict[str, int]

    @property
    def n_computed(self) -> int | None:
        return None if self.n_reused is None else self.n_prompt - self.n_reused

    @property
    def reuse(self) -> float | None:
        return None if self.n_reused is None or not self.n_prompt else self.n_reused / self.n_prompt

    @property
    def disagreement(self) -> float | None:
        """The relative difference of computed prompt tokens: the server's own counter over what its answers report,
        less 1. None if one of them is unknown.
        """
        if self.n_counted is None or not self.n_computed:
            return None
        return self.n_counted / self.n_computed - 1


def figures(side: Side) -> Figures:
    every = [request for run in side.runs for request in run.requests]
    answered = [request for request in every if not request.error]
    told = [request.n_reused for request in answered if request.n_reused is not None]
    follow_ups = [request for request in answered if request.n_unlimited]
    n_unlimited = sum(request.n_unlimited for request in follow_ups)
    n_found = sum(min(request.n_reused or 0, request.n_unlimited) for request in follow_ups)
    counted = [run.n_counted for run in side.runs if run.n_counted is not None]
    total_s = sum(run.makespan_s for run in side.runs)
    return Figures(
        n_answered=len(answered),
        n_failed=len(every) - len(answered),
        n_prompt=sum(request.n_prompt for request in answered),
        n_reused=sum(told) if told else None,
        n_unlimited=n_unlimited,
        follow_up_reuse=n_found / n_unlimited if told and n_unlimited else None,
        n_counted=sum(counted) if len(counted) == len(side.runs) else None,
        first_s=_waits(request for request in answered if request.turn == 1),
        follow_up_s=_waits(request for request in answered if request.turn > 1),
        makespan_s=total_s / max(1, len(side.runs)),
        answer_per_s=sum(request.n_answer for request in answered) / total_s if total_s else 0.0,
        unfairness=_unfairness(answered),
        errors=dict(Counter(request.error for request in every if request.error).most_common()),
    )


def _waits(requests: Iterable[Request]) -> list[float]:
    return sorted(wait for request in requests if (wait := request.wait_s) is not None)


def waits_by_user(requests: Iterable[Request]) -> dict[str, list[float]]:
    waits: dict[str, list[float]] = defaultdict(list)
    for request in requests:
        if (wait := request.wait_s) is not None:
            waits[request.user].append(wait)
    return dict(waits)


def _unfairness(requests: Sequence[Request]) -> float | None:
    means = [statistics.mean(waits) for waits in waits_by_user(requests).values()]
    if len(means) < 2 or not statistics.median(means):
        return None
    return max(means) / statistics.median(means)


def percentile(ordered: Sequence[float], part: float) -> float | None:
    """Return the value that a fraction ``part`` (0 to 1) of the sorted values do not exceed; None if there are no
    values.
    """
    return ordered[min(int(len(ordered) * part), len(ordered) - 1)] if ordered else None


class Row(Struct):
    """A line of the table: the value of each server as text, and the ratio of the first to the second."""

    name: str
    cells: list[str]
    ratio: str = ""


def rows(sides: Sequence[Side]) -> list[Row]:
    """Return the table of all measures of a benchmark, one row each."""
    of = [figures(side) for side in sides]

    def row(name: str, value: Callable[[Figures], float | None], show: Callable[[float], str]) -> Row:
        values = [value(side) for side in of]
        cells = ["?" if one is None else show(one) for one in values]
        both = len(values) == 2 and values[0] is not None and values[1]
        return Row(name, cells, f"{values[0] / values[1]:.2f}" if both and values[0] and values[1] else "")

    return [
        Row("requests answered", [f"{side.n_answered:,}" for side in of]),
        Row("requests failed", [f"{side.n_failed:,}" for side in of]),
        row("follow-up: first token, median", lambda side: percentile(side.follow_up_s, 0.5), seconds),
        row("follow-up: first token, 95 % within", lambda side: percentile(side.follow_up_s, 0.95), seconds),
        row("first turn: first token, median", lambda side: percentile(side.first_s, 0.5), seconds),
        row("first turn: first token, 95 % within", lambda side: percentile(side.first_s, 0.95), seconds),
        row("until the last answer", lambda side: side.makespan_s, seconds),
        row("answer tokens per second", lambda side: side.answer_per_s, lambda v: f"{v:,.1f}"),
        row("prompt tokens", lambda side: side.n_prompt, lambda v: f"{v:,.0f}"),
        row("prompt tokens computed", lambda side: side.n_computed, lambda v: f"{v:,.0f}"),
        row("... by the server's own counter", lambda side: side.n_counted, lambda v: f"{v:,.0f}"),
        row("prompt tokens reused", lambda side: side.reuse, lambda v: f"{v:.3f}"),
        row(
            "follow-ups: of what an unlimited cache reuses",
            lambda side: side.follow_up_reuse,
            lambda v: f"{v:.3f}",
        ),
        row(
            "slowest user's mean wait, of the median user's",
            lambda side: side.unfairness,
            lambda v: f"{v:.2f}",
        ),
    ]


def seconds(value: float) -> str:
    return f"{value * 1000:.0f} ms" if value < 1 else f"{value:.1f} s" if value < 100 else f"{value:,.0f} s"


def verdict(sides: Sequence[Side]) -> list[str]:
    """Return the sentences that a reader should see first: the main results, and what makes them doubtful."""
    of = [figures(side) for side in sides]
    said = []
    if len(sides) == 2:
        said += _compared([side.name for side in sides], of)
    for side, measured in zip(sides, of, strict=True):
        if measured.n_failed:
            share = measured.n_failed / (measured.n_failed + measured.n_answered)
            failed = f"{measured.n_failed} request{'s' * (measured.n_failed > 1)} failed ({share:.0%})"
            said.append(f"{side.name}: {failed}: {next(iter(measured.errors))}")
        if measured.n_reused is None and measured.n_answered:
            said.append(f"{side.name} does not tell what it reused: only times are compared")
        if (off := measured.disagreement) is not None and abs(off) > 0.02:
            said.append(
                f"{side.name}: its own counter ({measured.n_counted:,} prompt tokens computed) is {abs(off):.0%} "
                f"{'above' if off > 0 else 'below'} what its answers tell ({measured.n_computed:,}): other clients used"
                " it meanwhile, or several servers are behind the address"
            )
    return said


def _compared(names: list[str], of: list[Figures]) -> list[str]:
    first, second = names
    times = (percentile(of[0].follow_up_s, 0.5), percentile(of[1].follow_up_s, 0.5))
    said = []
    if times[0] and times[1]:
        said.append(
            f"The median follow-up gets its first token after {seconds(times[0])} from {first} and {seconds(times[1])} "
            f"from {second}: {_times(times[1] / times[0])}."
        )
    if all(measured.n_answered for measured in of):
        said.append(
            f"The whole took {seconds(of[0].makespan_s)} with {first} and {seconds(of[1].makespan_s)} with {second}."
        )
    reuse = (of[0].follow_up_reuse, of[1].follow_up_reuse)
    if reuse[0] is not None and reuse[1] is not None:
        said.append(
            f"Of what an unlimited cache would reuse on follow-ups, {first} reused {reuse[0]:.1%} and {second} "
            f"{reuse[1]:.1%}."
        )
    return said


def _times(ratio: float) -> str:
    if 0.95 <= ratio <= 1.05:
        return "no difference"
    return f"{ratio:.1f} times sooner" if ratio > 1 else f"{1 / ratio:.1f} times later"
