"""The report of a benchmark: one HTML file with the table and the plots, which loads nothing from elsewhere.

The plots are plotly's (the extra ``bench``), written here as its JSON.
"""

from __future__ import annotations

import html
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

from llamaslot import __version__
from llamaslot.bench.result import Figures, Request, Result, Side, figures, rows, verdict, waits_by_user

_COLORS = ("#0072b2", "#d55e00")  # told apart by all eyes (Okabe and Ito)
_PALE = ("#9ecae1", "#fdc9a0")
_GREY = "#8a8f98"
_FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif"

Trace = dict[str, Any]


def is_available() -> bool:
    """True if plotly is installed, which the plots need."""
    from importlib.util import find_spec

    return find_spec("plotly") is not None


def report(result: Result) -> str:
    """Return the report as one HTML page. Raises ImportError if plotly is not installed."""
    from plotly.io import to_html
    from plotly.offline import get_plotlyjs

    plots = [
        f"<section><h2>{html.escape(title)}</h2><p>{html.escape(text)}</p>"
        + to_html(figure, full_html=False, include_plotlyjs=False, validate=False, config=_CONFIG)
        + "</section>"
        for title, text, figure in _plots(result.sides)
    ]
    return _PAGE.format(
        style=_STYLE,
        plotly=get_plotlyjs(),
        title=html.escape(" and ".join(side.name for side in result.sides)),
        verdict="".join(f"<li>{html.escape(line)}</li>" for line in verdict(result.sides)),
        table=_table(result.sides),
        errors=_errors(result.sides),
        plots="\n".join(plots),
        about="".join(
            f"<li><b>{html.escape(side.name)}</b>: {html.escape(side.url)}, model {html.escape(side.model)}"
            f"{html.escape(f' ({side.about})' if side.about else '')}, {len(side.runs)} "
            f"run{'s' * (len(side.runs) != 1)}</li>"
            for side in result.sides
        ),
        workload=html.escape(result.workload),
        at=html.escape(result.at),
        version=html.escape(__version__),
    )


def _plots(sides: Sequence[Side]) -> Iterator[tuple[str, str, Trace]]:
    of = [figures(side) for side in sides]
    yield (
        "First tokens",
        "The share of requests whose first token had come after so many seconds (the further left, the better). Solid: "
        "follow-ups; dotted: first turns, of which a cache knows the system prompt at most.",
        _first_tokens(sides, of),
    )
    if any(measured.n_reused is not None for measured in of):
        yield (
            "Reuse",
            "Prompt tokens of a request by its turn, on average: reused from a cache, and computed again.",
            _reuse(sides),
        )
    yield (
        "Until the last answer",
        "Requests answered so far, in the first run of each. The end of a line is the end of the work.",
        _makespan(sides),
    )
    yield (
        "Who waited when",
        "Each user's requests in the first run: dark until the first token, pale while the answer comes.",
        _timeline(sides),
    )
    yield (
        "Fairness",
        "Every wait for a first token, by user. Where users are treated alike, all look alike.",
        _fairness(sides),
    )


def _first_tokens(sides: Sequence[Side], of: Sequence[Figures]) -> Trace:
    traces = []
    for number, (side, measured) in enumerate(zip(sides, of, strict=True)):
        for waits, what, dash in (
            (measured.follow_up_s, "follow-ups", "solid"),
            (measured.first_s, "first turns", "dot"),
        ):
            if waits:
                traces.append(
                    {
                        "type": "scatter",
                        "mode": "lines",
                        "line": {
                            "shape": "hv",
                            "color": _COLORS[number],
                            "dash": dash,
                            "width": 2.5 if dash == "solid" else 1.5,
                        },
                        "x": [waits[0], *waits],
                        "y": [0.0, *((i + 1) / len(waits) for i in range(len(waits)))],
                        "name": f"{side.name}, {what}",
                        "hovertemplate": "%{y:.0%} within %{x:.3g} s<extra>%{fullData.name}</extra>",
                    }
                )
    return _figure(
        traces,
        xaxis={
            "title": {"text": "seconds until the first token"},
            "type": "log",
            "tickvals": [step * 10**power for power in range(-3, 4) for step in (1, 2, 5)],
            "tickformat": ".3~g",
            "minor": {"showgrid": True},
        },
        yaxis={"title": {"text": "of the requests"}, "tickformat": ".0%", "range": [0, 1.02]},
    )


def _reuse(sides: Sequence[Side]) -> Trace:
    traces: list[Trace] = []
    for number, side in enumerate(sides):
        turns: dict[int, list[Request]] = defaultdict(list)
        for request in _answered(side):
            turns[request.turn].append(request)
        turn_numbers = sorted(turns)
        reused = [sum(r.n_reused or 0 for r in turns[t]) / len(turns[t]) for t in turn_numbers]
        prompt = [sum(r.n_prompt for r in turns[t]) / len(turns[t]) for t in turn_numbers]
        computed = [whole - part for whole, part in zip(prompt, reused, strict=True)]
        for values, what, colors in ((computed, "computed", _COLORS), (reused, "reused", _PALE)):
            traces.append(
                {
                    "type": "bar",
                    "x": [f"turn {t}" for t in turn_numbers],
                    "offsetgroup": str(number),
                    "y": values,
                    "name": f"{side.name}: {what}",
                    "marker": {"color": colors[number]},
                    "hovertemplate": "%{y:,.0f} tokens<extra>%{fullData.name}</extra>",
                }
            )
    return _figure(
        traces, barmode="stack", bargap=0.25, yaxis={"title": {"text": "prompt tokens"}, "tickformat": ",.0f"}
    )


def _makespan(sides: Sequence[Side]) -> Trace:
    traces = []
    for number, side in enumerate(sides):
        ends = (
            sorted(request.end_s for request in side.runs[0].requests if not request.error)
            if side.runs
            else []
        )
        traces.append(
            {
                "type": "scatter",
                "mode": "lines",
                "line": {"shape": "hv", "color": _COLORS[number], "width": 2.5},
                "x": [0.0, *ends],
                "y": list(range(len(ends) + 1)),
                "name": side.name,
                "hovertemplate": "%{y} answered after %{x:.1f} s<extra>%{fullData.name}</extra>",
            }
        )
    return _figure(
        traces,
        xaxis={"title": {"text": "seconds"}, "rangemode": "tozero"},
        yaxis={"title": {"text": "requests answered"}, "rangemode": "tozero"},
    )


def _bars(number: int, side: Side, what: str, color: str) -> Trace:
    """Return the bars of a timeline: for each request of ``side`` when, and for how long, it was waiting or answering
    (``what``).
    """
    starts, lasts, names, texts = [], [], [], []
    for request in side.runs[0].requests if side.runs else []:
        begins = request.sent_s if what == "waiting" else request.first_s
        ends = request.end_s if what == "answering" or request.first_s is None else request.first_s
        if begins is None:
            continue
        starts.append(begins)
        lasts.append(max(0.0, ends - begins))
        names.append(request.user)
        reused = "" if request.n_reused is None else f", {request.n_reused:,} reused"
        texts.append(
            f"turn {request.turn}: {what} {ends - begins:.2f} s; {request.n_prompt:,} tokens{reused}"
            + (f"; {request.error}" if request.error else "")
        )
    return {
        "type": "bar",
        "orientation": "h",
        "base": starts,
        "x": lasts,
        "y": names,
        "xaxis": "x" if number == 0 else "x2",
        "yaxis": "y" if number == 0 else "y2",
        "marker": {"color": color, "line": {"width": 0}},
        "name": f"{side.name}: {what}",
        "text": texts,
        "textposition": "none",
        "hovertemplate": "%{text}<extra>%{y}</extra>",
    }


def _timeline(sides: Sequence[Side]) -> Trace:
    traces = [
        _bars(number, side, what, colors[number])
        for number, side in enumerate(sides)
        for what, colors in (("waiting", _COLORS), ("answering", _PALE))
    ]
    users = list(
        dict.fromkeys(request.user for side in sides for run in side.runs[:1] for request in run.requests)
    )
    order = sorted(users, key=_by_number, reverse=True)
    last_s = max((run.makespan_s for side in sides for run in side.runs[:1]), default=1.0)
    layout: dict[str, Any] = {
        "barmode": "overlay",
        "bargap": 0.35,
        "height": 120 + 22 * len(users) * len(sides),
    }
    gap = 0.04
    for number in range(len(sides)):
        suffix = "" if number == 0 else "2"
        top = 1 - number / len(sides) - (gap if number else 0)
        bottom = 1 - (number + 1) / len(sides) + (gap if number + 1 < len(sides) else 0)
        is_last = number + 1 == len(sides)
        layout[f"yaxis{suffix}"] = {
            "domain": [bottom, top],
            "anchor": f"x{suffix}",
            "categoryorder": "array",
            "categoryarray": order,
            "showgrid": False,
            "automargin": True,
        }
        layout[f"xaxis{suffix}"] = {
            "anchor": f"y{suffix}",
            "range": [0, last_s * 1.02],
            "title": {"text": "seconds"} if is_last else None,
            "showticklabels": is_last,
        }
    return _figure(traces, **layout)


def _fairness(sides: Sequence[Side]) -> Trace:
    traces = []
    for number, side in enumerate(sides):
        waits = waits_by_user(_answered(side))
        users = sorted(waits, key=_by_number)
        traces.append(
            {
                "type": "box",
                "x": [user for user in users for _ in waits[user]],
                "y": [wait for user in users for wait in waits[user]],
                "name": side.name,
                "boxpoints": "all",
                "boxmean": True,
                "jitter": 0.4,
                "pointpos": 0,
                "line": {"width": 1, "color": _COLORS[number]},
                "fillcolor": "rgba(0,0,0,0)",
                "marker": {"color": _COLORS[number], "size": 5, "opacity": 0.7},
                "hovertemplate": "%{y:.3g} s<extra>%{x}</extra>",
            }
        )
    return _figure(
        traces,
        boxmode="group",
        yaxis={"title": {"text": "seconds until the first token"}, "rangemode": "tozero"},
    )


def _by_number(user: str) -> tuple[str, int, str]:
    """Return a sort key with which ``user2`` comes before ``user10``."""
    letters = user.rstrip("0123456789")
    return letters, int(user[len(letters) :] or 0), user


def _answered(side: Side) -> list[Request]:
    return [request for run in side.runs for request in run.requests if not request.error]


def _figure(traces: list[Trace], **layout: Any) -> Trace:
    axis = {"gridcolor": "#e5e7eb", "zeroline": False, "linecolor": "#c8ccd2", "title": {"standoff": 12}}
    for name in ("xaxis", "yaxis", "xaxis2", "yaxis2"):
        if name in layout or name in ("xaxis", "yaxis"):
            own = layout.get(name, {})
            title = {**axis["title"], **(own.get("title") or {})} if isinstance(axis["title"], dict) else {}
            layout[name] = {**axis, **own, "title": title}
    return {
        "data": traces,
        "layout": {
            "paper_bgcolor": "rgba(0,0,0,0)",
            "plot_bgcolor": "rgba(0,0,0,0)",
            "font": {"family": _FONT, "size": 13, "color": "#1f2328"},
            "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
            "margin": {"l": 70, "r": 20, "t": 20, "b": 60},
            "height": 380,
            "hovermode": "closest",
            **layout,
        },
    }


_CONFIG = {"displaylogo": False, "responsive": True, "displayModeBar": False}


def _table(sides: Sequence[Side]) -> str:
    is_pair = len(sides) == 2
    heads = [side.name for side in sides] + (["ratio"] if is_pair else [])
    lines = ["<tr><th></th>" + "".join(f"<th>{html.escape(head)}</th>" for head in heads) + "</tr>"]
    for row in rows(sides):
        cells = [*row.cells, *([row.ratio] if is_pair else [])]
        lines.append(
            f"<tr><td>{html.escape(row.name)}</td>"
            + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells)
            + "</tr>"
        )
    return "<table>" + "\n".join(lines) + "</table>"


def _errors(sides: Sequence[Side]) -> str:
    lines = [
        f"<li>{html.escape(side.name)}: {n} times <code>{html.escape(error)}</code></li>"
        for side in sides
        for error, n in figures(side).errors.items()
    ]
    return f"<ul class=errors>{''.join(lines)}</ul>" if lines else "<p>None: every request was answered.</p>"


_STYLE = f"""
:root {{ color-scheme: light }}
body {{ margin: 0 auto; max-width: 66rem; padding: 1.5rem 1.5rem 4rem; font: 15px/1.5 {_FONT};
  color: #1f2328; background: #fff }}
h1 {{ font-size: 1.6rem; margin: 0 0 .8rem }}
h2 {{ font-size: 1.15rem; margin: 2.4rem 0 .3rem }}
p, .about li {{ color: #57606a; margin: .2rem 0 .6rem; max-width: 48rem }}
ul.verdict {{ font-size: 1.05rem; padding-left: 1.2rem }}
ul.verdict li {{ margin: .3rem 0 }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums }}
td, th {{ padding: .28rem 1.4rem .28rem 0; text-align: right; border-bottom: 1px solid #e5e7eb; white-space: nowrap }}
td:first-child {{ text-align: left; padding-right: 2.5rem }}
td:last-child {{ color: {_GREY} }}
.wide {{ overflow-x: auto }}
code {{ font-size: .9em; background: #f3f4f6; padding: .1em .3em; border-radius: 3px }}
.errors li {{ color: #b42318 }}
footer {{ margin-top: 3rem; color: {_GREY}; font-size: .85rem }}
"""

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>llamaslot bench: {title}</title>
<link rel="icon" href="data:,">
<style>{style}</style>
<script>{plotly}</script>
</head>
<body>
<h1>llamaslot bench: {title}</h1>
<ul class="verdict">{verdict}</ul>
<div class="wide">{table}</div>
{plots}
<section><h2>Errors</h2>{errors}</section>
<section class="about"><h2>How it was measured</h2>
<p>{workload}</p>
<ul>{about}</ul>
<p>Both sides get prompts of the same lengths and different words, none of which was sent before. Tokens are those
that the servers' answers tell; the counter is the difference of the server's own over the runs.</p>
</section>
<footer>{at}, llamaslot {version}</footer>
</body>
</html>
"""
