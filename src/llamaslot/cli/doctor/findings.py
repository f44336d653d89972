"""What ``llamaslot doctor`` finds, and how it is printed."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Literal

from msgspec import Struct

#: ok       as it should be
#: warning  it works, and costs something
#: fault    contexts are lost, or llamaslot cannot serve
#: note     may be one of these for another user
#: skipped  not tried; the text says why
State = Literal["ok", "warning", "fault", "note", "skipped"]

_MARKS: dict[State, str] = {"ok": "ok", "warning": "WARN", "fault": "FAULT", "note": "note", "skipped": "-"}
_NARROWEST = 20  # columns of a text that is broken


class Finding(Struct, frozen=True):
    """One line of the report. ``check``: what was checked. ``text``: what was found, and what it costs. ``remedy``: the
    flag, line of configuration or command that mends it.
    """

    check: str
    state: State
    text: str
    remedy: str = ""

    @property
    def is_found(self) -> bool:
        return self.state in ("warning", "fault")


def lines(findings: Sequence[Finding], columns: int | None = None) -> list[str]:
    """Return the lines of the report: for each finding its text, with the remedy below it; then a line with the
    numbers. ``columns``: the width at which texts are broken; None: they are not broken.
    """
    width = max(len(finding.check) for finding in findings)
    said = []
    for finding in findings:
        said += _broken(f"{_MARKS[finding.state]:5}  {finding.check:{width}}  ", finding.text, columns)
        if finding.remedy:
            said += _broken(f"{'':5}  {'':{width}}  -> ", finding.remedy, columns)
    n_found = sum(finding.is_found for finding in findings)
    n_skipped = sum(finding.state == "skipped" for finding in findings)
    not_tried = f", {n_skipped} not tried" if n_skipped else ""
    return [*said, f"{n_found or 'nothing'} found in {len(findings)} checks{not_tried}"]


def _broken(heading: str, text: str, columns: int | None) -> list[str]:
    """Return ``text`` after its heading, broken into lines between words. A path or command is not broken at its
    hyphens.
    """
    if columns is None or columns - len(heading) < _NARROWEST:
        return [heading + text]
    return textwrap.wrap(
        text,
        columns,
        initial_indent=heading,
        subsequent_indent=" " * len(heading),
        break_long_words=False,
        break_on_hyphens=False,
    )
