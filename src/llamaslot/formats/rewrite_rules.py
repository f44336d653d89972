"""Rules that make changing parts of a system prompt constant, so that the prefix after them stays reusable.

A system prompt comes first: a date, a random id or a checksum in it changes with each request or each day, and no token
after it can be reused. A rule replaces each match of its pattern by a constant text. Rules change system prompts only,
never the texts of users, answers and tools.
"""

from __future__ import annotations

import re
import time
from collections.abc import Collection, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from llamaslot.formats import FORMATS
from llamaslot.formats.base import Format

LIMIT_S = 0.05  # of computing, for each rule and request
MAX_CHARS = 4096

#: The names of the formats that have a system prompt.
SPOKEN = tuple(name for name, each in FORMATS.items() if each.messages_key or each.system_key)
if TYPE_CHECKING:
    import regex  # imported only where a rule is compiled: it takes 12 ms

    Spoken = str
else:
    Spoken = Literal[SPOKEN]


class RewriteRule(BaseModel):
    """One entry of ``rewrite``. ``pattern``: in the syntax of Python's ``re``. ``max_chars``: how many characters at
    the beginning of each text are searched.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True, defer_build=True)

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")]
    pattern: Annotated[str, Field(min_length=1)]
    replace: str
    formats: tuple[Spoken, ...] = SPOKEN
    max_chars: Annotated[int, Field(ge=1, strict=True)] = MAX_CHARS

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, pattern: str) -> str:
        import regex

        try:
            matches_nothing = re.compile(pattern).search("") is not None
            _compiled(pattern)
        except (re.error, regex.error, OverflowError, RecursionError) as error:
            raise ValueError(f"is not a valid regular expression: {error}") from None
        if matches_nothing:
            raise ValueError("matches the empty text too, and so everywhere: require at least one character")
        return pattern

    @field_validator("formats")
    @classmethod
    def _is_for_something(cls, formats: tuple[Spoken, ...]) -> tuple[Spoken, ...]:
        if not formats:
            raise ValueError(f"should not be empty; leave it out for all of {', '.join(SPOKEN)}")
        return formats

    @model_validator(mode="after")
    def _has_its_groups(self) -> RewriteRule:
        try:
            re.compile(self.pattern).sub(self.replace, "")
        except (re.error, IndexError) as error:
            raise ValueError(f"replace: {error}; write a literal backslash twice") from None
        return self


_BRACE = re.compile(r"(\\N\{|\\.)|\{(?!\d*,?\d*\})", re.DOTALL)


def _compiled(pattern: str) -> regex.Pattern[str]:
    """Compile ``pattern`` with the library ``regex``, whose search can be stopped after a time.

    A brace that repeats nothing is escaped first, because ``re`` takes it as a plain character. ``regex`` would read
    ``{e}`` and the like as permitted errors, and then anything matches.
    """
    import regex

    return regex.compile(_BRACE.sub(lambda found: found[1] or r"\{", pattern))


#: Rules that are active unless ``rewrite_off`` names them. Each is for a text that is known to change and that no
#: model needs. A body without that text stays unchanged, byte for byte.
READY = {
    # Claude Code's first system block: ``x-anthropic-billing-header: cc_version=2.1.37.0d9; cc_entrypoint=cli;
    # cch=fa690;``, from 2.1.197 on (or earlier) without ``cch``, and with ``cc_is_subagent=true;`` in subagents
    # (measured). ``cch`` changes with each request, the end of ``cc_version`` with each conversation and subagent.
    # Newer builds of llama-server make ``cch`` constant (``formats/messages.py``); no build does that for
    # ``cc_version``. They leave the text below unchanged. The fields are named one by one: where a client joins its
    # blocks, text follows on the same line.
    "claude-code-attribution": RewriteRule.model_construct(
        name="claude-code-attribution",
        pattern=r"\Ax-anthropic-billing-header:(?:[ \t]*[A-Za-z_][A-Za-z0-9_]*=[^;\s]*(?:;|(?=\s|\Z)))+",
        replace="x-anthropic-billing-header: cch=fffff;",
    )
}


def ready(value: object) -> object:
    """Return the rule of ``READY`` if ``value`` is a string, which must be its name; else ``value`` itself. Raises
    ValueError with the known names.
    """
    if isinstance(value, str):
        if value not in READY:
            raise ValueError(f"{_unknown(value)}; a rule of your own has the keys name, pattern and replace")
        return READY[value]
    return value


def is_ready(name: str) -> str:
    """Return ``name`` if it is the name of a ready rule. Raises ValueError with the known names if not."""
    if name not in READY:
        raise ValueError(f"{_unknown(name)}; to turn off a rule of your own, remove it from rewrite")
    return name


def _unknown(name: str) -> str:
    return f"there is no ready rule {name!r}: there is {', '.join(READY)}"


def in_force(rules: Sequence[RewriteRule], off: Collection[str]) -> tuple[RewriteRule, ...]:
    """Return the rules that apply: those of ``READY`` that ``off`` does not name, then ``rules``. A rule in ``rules``
    with the name of a ready rule replaces that.
    """
    named = {rule.name for rule in rules} | set(off)
    return (*(rule for name, rule in READY.items() if name not in named), *rules)


def distinct(rules: tuple[RewriteRule, ...]) -> tuple[RewriteRule, ...]:
    """Return ``rules`` if no two of them have the same name. Raises ValueError if they have."""
    names = [rule.name for rule in rules]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"two rules are named {', '.join(twice)}")
    return rules


@dataclass(slots=True)
class Rewriter:
    """One rule and its counters since the start. ``n_fired``: requests that the rule has changed; ``n_given_up``:
    requests for which it was stopped after ``LIMIT_S``.
    """

    rule: RewriteRule
    n_fired: int = 0
    n_given_up: int = 0
    _pattern: regex.Pattern[str] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._pattern = _compiled(self.rule.pattern)

    def rewrite(self, text: str, limit_s: float = LIMIT_S) -> str:
        """Return ``text`` with every match in its first ``max_chars`` characters replaced. Raises TimeoutError after
        ``limit_s`` of computing.

        If ``text`` is longer, a match that ends just at ``max_chars`` is not replaced, because it may be incomplete.
        """
        looked_at, rest = text[: self.rule.max_chars], text[self.rule.max_chars :]

        def replaced(match: regex.Match[str]) -> str:
            if match.end() == match.start() or (rest and match.end() == len(looked_at)):
                return match[0]
            return match.expand(self.rule.replace)

        made = self._pattern.sub(replaced, looked_at, timeout=limit_s)
        return text if made == looked_at else made + rest


class Rewriting:
    """Applies all rules in order: each rule gets the result of the one before."""

    def __init__(self, rules: tuple[RewriteRule, ...] = ()) -> None:
        self.rules, self.rewriters = rules, [Rewriter(rule) for rule in rules]

    def apply(self, body: MutableMapping[str, Any], format_: Format) -> tuple[list[str], list[str]]:
        """Apply the rules to the system prompts in ``body``, in place. Returns the names of the rules that have changed
        something, and of the rules that were stopped after ``LIMIT_S``.
        """
        fired, given_up = list[str](), list[str]()
        for rewriter in self.rewriters:
            if format_.name not in rewriter.rule.formats:
                continue
            has_fired, began = False, time.perf_counter()
            for holder, key in format_.system_texts(body):
                try:
                    left_s = began + LIMIT_S - time.perf_counter()
                    if left_s <= 0:
                        raise TimeoutError
                    text = rewriter.rewrite(holder[key], left_s)
                except TimeoutError:
                    rewriter.n_given_up += 1
                    given_up.append(rewriter.rule.name)
                    break
                if text is not holder[key]:
                    holder[key], has_fired = text, True
            if has_fired:
                rewriter.n_fired += 1
                fired.append(rewriter.rule.name)
        return fired, given_up
