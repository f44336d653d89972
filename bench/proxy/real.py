"""The same in front of the real llama.cpp, with a tiny model: what is left of llamaslot's own time beside its work."""

from __future__ import annotations

import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

from bench.proxy.scenarios import MS, Bench, Measured, Row
from bench.proxy.targets import Kind, Target

_CHARACTERS = 4  # of the client's words; this model takes each for a token
_CONTEXT = 36_000


def real(bench: Bench) -> Measured:
    """Real llama.cpp, 2 layers of width 64: a short request, and a follow-up of 30,000 tokens."""
    from tests.support import models  # with the gguf package, of the tests

    short = Row("real llama.cpp, 50 tokens: first token", "ms")
    hot = Row("real llama.cpp, follow-up of 30,000 tokens: first token", "ms")
    with tempfile.TemporaryDirectory(prefix="llamaslot-bench-") as tmp, ExitStack() as stack:
        model = models.dense(Path(tmp))
        kinds: tuple[Kind, ...] = ("direct", "llamaslot", "against")
        targets = []
        for kind in kinds:
            if kind == "against" and bench.against is None:
                continue
            directory = Path(tmp, kind)
            directory.mkdir()
            target = Target(kind, directory, n_slots=4, source=bench.against if kind == "against" else None)
            target.upstream_command = [
                *(sys.executable, "-m", "llamaslot.llama.managed.embedded", "-m", str(model), "-t", "1"),
                *("--port", str(target.upstream_port), "-np", "4", "-c", str(4 * _CONTEXT)),
                *("--no-kv-unified", "--cache-ram", "0", "--no-cache-idle-slots", "--jinja"),
                *("--slot-save-path", str(target.save_dir)),
            ]
            stack.callback(target.stop)
            target.start()
            targets.append(target)
            bench.do(target, "talk", n_tokens=29_000 // _CHARACTERS)
            bench.do(target, "short", n=10, at_once=1, n_tokens=14)

        def work(target: Target) -> dict[str, float]:
            quick = bench.do(target, "short", n=bench.scaled(40), at_once=1, n_tokens=14)
            bench.do(target, "follow", n=1, n_tokens=20)
            follow = bench.do(target, "follow", n=bench.scaled(8), n_tokens=20)
            return {"short": quick["first_s"] * MS, "hot": follow["first_s"] * MS}

        bench.rounds(targets, {"short": short, "hot": hot}, work)
        for target in targets:
            bench.load.do("forget", port=target.port)
    measured = Measured([short, hot])
    for row, bound in ((short, 2.5), (hot, 1.04)):
        mine, direct = row.median("llamaslot"), row.median("direct")
        if mine and direct:
            measured.goal(f"{row.what}, of direct", "times", mine / direct, bound)
    return measured
