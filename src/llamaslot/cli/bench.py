"""``llamaslot bench URL [--vs URL]``: measures with a team's workload what llamaslot saves."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llamaslot.cli.output import EXIT_FAULT, about_file, fail, several
from llamaslot.errors import how_to_add

# Slow imports are made where they are needed.
if TYPE_CHECKING:
    from llamaslot.bench.result import Request, Result, Side
    from llamaslot.bench.target import Target
    from llamaslot.bench.workload import Texts, Workload

_REPORT = Path("llamaslot-bench.html")
_SHARED = 1000


@click.command(short_help="Measure how long a team waits, and what is reused.")
@click.argument("url")
@click.option(
    "--vs", metavar="URL|FILE", help="Compare with another base URL, or with a file written by --json."
)
@click.option("--name", default="llamaslot", show_default=True, help="Name of URL in the report.")
@click.option("--vs-name", help="Name of --vs in the report.  [default: its address]")
@click.option("--model", help="Model to ask; needed if URL serves several.")
@click.option("--vs-model", help="Model to ask of --vs.")
@click.option(
    "--key",
    "keys",
    multiple=True,
    envvar="LLAMASLOT_BENCH_KEY",
    help="API key. If repeated, the users share the keys out.",
)
@click.option(
    "--vs-key",
    "vs_keys",
    multiple=True,
    envvar="LLAMASLOT_BENCH_VS_KEY",
    help="API key for --vs.  [default: --key]",
)
@click.option(
    "--users",
    type=click.IntRange(1, 1000),
    default=8,
    show_default=True,
    help="Users that ask at the same time.",
)
@click.option(
    "--turns", type=click.IntRange(1, 1000), default=4, show_default=True, help="Requests of each user."
)
@click.option(
    "--context",
    type=click.IntRange(16),
    default=8000,
    show_default=True,
    help="Tokens of a user's first prompt, on average.",
)
@click.option(
    "--shared",
    type=click.IntRange(0),
    help="Tokens of these in a system prompt that all users share.  [default: 1000, or half of --context]",
)
@click.option(
    "--question",
    type=click.IntRange(8),
    default=300,
    show_default=True,
    help="Tokens of each later question.",
)
@click.option(
    "--answer", type=click.IntRange(1), default=60, show_default=True, help="Most tokens of an answer."
)
@click.option(
    "--think",
    type=click.FloatRange(0),
    default=5.0,
    show_default=True,
    help="Seconds between an answer and the next question, on average.",
)
@click.option(
    "--shape",
    type=click.File("rb"),
    help="File with a journal: its users, times and lengths are used instead of --users to --think.",
)
@click.option(
    "--longest-pause",
    type=click.FloatRange(0),
    default=10.0,
    show_default=True,
    help="With --shape: seconds; longer times without a request are shortened to this.",
)
@click.option(
    "--text",
    "folder",
    type=click.Path(exists=True, path_type=Path),
    help="Folder or file to take texts from.  [default: made-up texts]",
)
@click.option(
    "--rounds",
    type=click.IntRange(1, 20),
    default=1,
    show_default=True,
    help="Runs on each server, alternating.",
)
@click.option("--seed", type=int, default=1, show_default=True, help="Seed of the random lengths and pauses.")
@click.option(
    "--timeout",
    "timeout_s",
    type=click.FloatRange(1),
    default=600.0,
    show_default=True,
    help="A request fails after this many seconds without a byte.",
)
@click.option(
    "--report",
    type=click.Path(path_type=Path, dir_okay=False),
    default=_REPORT,
    show_default=True,
    help="File for the report: HTML with plots.",
)
@click.option(
    "--json",
    "json_path",
    type=click.Path(path_type=Path, dir_okay=False),
    help="File for the result as JSON, for a later --vs.",
)
def bench(url: str, vs: str | None, **options: Any) -> None:
    """Measure how long a team waits for a server, and how many tokens it reuses.

    Several users send growing conversations to URL, any OpenAI base URL, and
    then to the one of --vs. Reused tokens are those that the servers report.
    """
    import asyncio

    from llamaslot.bench.report import is_available, report
    from llamaslot.bench.result import Row, rows, save, verdict
    from llamaslot.bench.target import BenchError
    from llamaslot.cli.output import table

    has_plots = is_available()
    if not has_plots and options["report"] != _REPORT:
        fail([f"--report needs plotly: {how_to_add('plotly')}"])
    for path in (options["report"], options["json_path"]):
        if path is not None and not os.access(path.absolute().parent, os.W_OK):
            fail([f"{path} cannot be written"])
    try:
        other = _earlier(vs)
        result = asyncio.run(_Comparison(url, None if other else vs, options).run())
        if other is not None:
            _add_earlier(result, other)
    except (BenchError, ValueError, OSError) as error:
        fail([about_file(error) if isinstance(error, OSError) and error.filename else str(error)])
    except KeyboardInterrupt:
        sys.exit(130)
    every: list[Row] = rows(result.sides)
    heads = ["", *(side.name for side in result.sides), *(["ratio"] if len(result.sides) == 2 else [])]
    lines = [[row.name, *row.cells, *([row.ratio] if len(result.sides) == 2 else [])] for row in every]
    click.echo("\n".join(["", *table(heads, lines, heads[1:]), "", *verdict(result.sides)]))
    if options["json_path"] is not None:
        save(result, options["json_path"])
    if has_plots:
        options["report"].write_text(report(result))
        click.echo(f"\nThe report: {options['report']}")
    else:
        click.echo(f"\nA report with plots needs plotly: {how_to_add('plotly')}", err=True)
    if any(all(request.error for run in side.runs for request in run.requests) for side in result.sides):
        sys.exit(EXIT_FAULT)


def _earlier(vs: str | None) -> Result | None:
    """Return the result saved in the file ``vs``. None if ``vs`` is None or an address: it has ``://``, or it
    is no file and does not end with ``.json``. Raises OSError, and ValueError if the file is no result.
    """
    from llamaslot.bench.result import load

    if vs is None or "://" in vs or not (vs.endswith(".json") or Path(vs).is_file()):
        return None
    return load(Path(vs))


def _add_earlier(result: Result, earlier: Result) -> None:
    """Add the first server of a saved result to ``result``, with a note if it was measured with another workload."""
    side = earlier.sides[0]
    if earlier.workload != result.workload:
        note = f"{side.name} was measured with another workload: {earlier.workload}"
        click.echo(f"note: {note}", err=True)
        result.workload += f". {note}"
    result.sides.append(side)


class _Comparison:
    """The runs of a benchmark on the server at ``url``, or alternating on that one and the one at ``vs``."""

    def __init__(self, url: str, vs: str | None, options: dict[str, Any]) -> None:
        self._url, self._vs, self._options = url, vs, options

    async def run(self) -> Result:
        """Run the benchmark and return its result. If a server refuses a prompt as too long, all begins again with
        shorter texts. Raises BenchError if a server cannot be measured, ValueError if the workload cannot be made, and
        OSError if a file of texts cannot be read. Canceling ends all requests.
        """
        import contextlib
        import time

        from llamaslot.bench.result import Result, Side
        from llamaslot.bench.target import BenchError, ContextTooSmall
        from llamaslot.bench.workload import Texts, chars_per_token

        options, texts = self._options, Texts(self._options["folder"])
        workload = _workload(options)
        async with contextlib.AsyncExitStack() as stack:
            targets = [await stack.enter_async_context(target) for target in self._targets()]
            for target in targets:
                await target.look()
            chars = [await chars_per_token(target, texts, _salt()) for target in targets]
            smallest = min((target.n_ctx for target in targets if target.n_ctx), default=None)
            while True:
                if smallest is not None:
                    workload = _fitted(workload, smallest)
                sides = [Side(t.name, t.base, t.model, t.about, t.n_ctx) for t in targets]
                said = _in_words(workload, options)
                click.echo(f"{said}\n", err=True)
                try:
                    await self._measure(targets, sides, workload, texts, chars)
                except ContextTooSmall as error:
                    if smallest is not None and error.n_ctx >= smallest:
                        raise BenchError(
                            f"a prompt did not fit into {error.n_ctx:,} tokens although its length was chosen for it: "
                            "tell a smaller --context"
                        ) from None
                    smallest = error.n_ctx
                    continue
                return Result(said, time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()), sides)

    def _targets(self) -> list[Target]:
        from llamaslot.bench.target import Target

        options, timeout_s = self._options, self._options["timeout_s"]
        found = [
            Target(
                self._url,
                name=options["name"],
                keys=options["keys"],
                model=options["model"],
                timeout_s=timeout_s,
            )
        ]
        if self._vs is not None:
            keys = options["vs_keys"] or options["keys"]
            name = (
                options["vs_name"] or self._vs.partition("://")[2].rstrip("/").removesuffix("/v1") or self._vs
            )
            found.append(
                Target(
                    self._vs,
                    name=name,
                    keys=keys,
                    model=options["vs_model"],
                    timeout_s=timeout_s,
                    key_flag="--vs-key",
                )
            )
        return found

    async def _measure(
        self,
        targets: Sequence[Target],
        sides: Sequence[Side],
        workload: Workload,
        texts: Texts,
        chars: Sequence[float],
    ) -> None:
        """Run the workload on each target ``rounds`` times and add the runs to ``sides``. The servers take turns in
        being first. ``chars``: characters per token of each target. Raises ContextTooSmall.
        """
        from llamaslot.bench.workload import Measurement

        rounds = self._options["rounds"]
        n_all = workload.n_requests * len(targets) * rounds
        with click.progressbar(
            length=n_all, file=sys.stderr, show_pos=True, item_show_func=lambda text: text or ""
        ) as bar:
            for round_ in range(rounds):
                numbers = range(len(targets)) if round_ % 2 == 0 else reversed(range(len(targets)))
                for number in numbers:
                    target = targets[number]

                    def tell(request: Request, name: str = target.name) -> None:
                        wait_s = request.wait_s
                        what = request.error or (
                            f"first token after {wait_s:.2f} s" if wait_s is not None else ""
                        )
                        bar.update(1, f"{name}: {request.user}, turn {request.turn}: {what}"[:78])

                    measurement = Measurement(
                        target, workload, texts, chars=chars[number], salt=_salt(), on_answer=tell
                    )
                    sides[number].runs.append(await measurement.run())


def _salt() -> str:
    import secrets

    return secrets.token_hex(6)


def _workload(options: dict[str, Any]) -> Workload:
    """Return the workload that the options describe. Raises ValueError if the file of --shape is no journal, or
    --shared is too large.
    """
    from llamaslot.bench.workload import recorded, team

    if (shape := options["shape"]) is None:
        names = ("users", "turns", "context", "question", "answer", "seed")
        shared, most = options["shared"], options["context"] // 2
        if shared is None:
            shared = min(_SHARED, most)
        if shared > most:
            raise ValueError(
                f"--shared {shared}: at most {most}, half of --context {options['context']}: the shortest first prompt"
            )
        return team(think_s=options["think"], shared=shared, **{name: options[name] for name in names})
    try:
        journal = json.load(shape)
        decisions = journal["decisions"] if isinstance(journal, dict) else journal
        return recorded(decisions, answer=options["answer"], longest_pause_s=options["longest_pause"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"--shape: {shape.name} is no journal (/llamaslot/journal?n=1000): {error}"
        ) from None


def _fitted(workload: Workload, n_ctx: int) -> Workload:
    """Return ``workload`` with texts so short that each conversation fits into ``n_ctx`` tokens; print a note if they
    are shortened. Raises ValueError if the answers alone do not fit.
    """
    fitted = workload.fitted(n_ctx)
    if fitted is not workload:
        click.echo(
            f"The longest conversation would need {workload.n_context:,} tokens, and a context has {n_ctx:,}: "
            f"texts are shortened, conversations to {fitted.n_context / workload.n_context:.0%}.",
            err=True,
        )
    return fitted


def _in_words(workload: Workload, options: dict[str, Any]) -> str:
    """Return a description of the workload in words."""
    where = f"text from {options['folder']}" if options["folder"] else "made-up text"
    firsts = [conversation.turns[0].n_new + workload.n_shared for conversation in workload.conversations]
    if options["shape"] is not None:
        how = f"the shape of a journal: {workload.n_users} users, {len(workload.conversations)} conversations"
    else:
        how = f"{several(workload.n_users, 'user', 'users')} with {several(options['turns'], 'turn', 'turns')} each"
    how += f", {several(workload.n_requests, 'request', 'requests')}"
    return (
        f"{how}; first prompts of {min(firsts):,} to {max(firsts):,} tokens "
        f"({workload.n_shared:,} shared), answers of {options['answer']}, {where}; "
        f"{workload.n_prompt:,} prompt tokens in all"
    )
