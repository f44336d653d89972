"""Rules for system prompts: what they change, what they leave alone, and when they are given up."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest

from llamaslot.config.load import Config
from llamaslot.errors import ConfigError
from llamaslot.formats import FORMATS
from llamaslot.formats.rewrite_rules import READY, Rewriter, RewriteRule, Rewriting

CLAUDE = Rewriter(READY["claude-code-attribution"])
DATE = RewriteRule(name="date", pattern=r"\d{4}-\d\d-\d\d", replace="today")
MOVES = "It is 2026-11-26."


# -- Claude Code ---------------------------------------------------------------------------------------------------

ATTRIBUTIONS = [
    "x-anthropic-billing-header: cc_version=2.1.37.0d9; cc_entrypoint=cli; cch=fa690;",
    "x-anthropic-billing-header: cc_version=2.1.119.af2; cc_entrypoint=sdk-cli; cch=97bd6;",
    "x-anthropic-billing-header: cc_version=2.1.119.af2; cc_entrypoint=claude-vscode;",
    "x-anthropic-billing-header: cc_version=2.1.119.af2; cc_entrypoint=cli; cc_workload=cron; cch=00000",
    "x-anthropic-billing-header: cc_version=2.1.197.a5a; cc_entrypoint=sdk-cli;",
    "x-anthropic-billing-header: cc_version=2.1.197.560; cc_entrypoint=sdk-cli; cc_is_subagent=true;",
]


@pytest.mark.parametrize("rest", ["", "You are Claude Code.", "\nYou are Claude Code.", " And more."])
def test_attributions_become_one(rest: str) -> None:
    """Whatever stands behind it, on the same line too, is left as it is."""
    lines = [line for line in ATTRIBUTIONS if line.endswith(";") or not rest.startswith("Y")]
    assert {CLAUDE.rewrite(line + rest) for line in lines} == {
        "x-anthropic-billing-header: cch=fffff;" + rest
    }


@pytest.mark.parametrize("text", ["", "You: " + ATTRIBUTIONS[0], "x-anthropic-billing-header: none"])
def test_what_is_no_attribution_is_left_alone(text: str) -> None:
    """A prompt that speaks of it, for one."""
    assert CLAUDE.rewrite(text) is text


# -- which texts ---------------------------------------------------------------------------------------------------

PART = {"type": "text", "text": MOVES, "cache_control": {"type": "ephemeral"}}
SYSTEMS: list[tuple[str, dict[str, Any], int]] = [
    ("chat", {"messages": [{"role": "system", "content": MOVES}]}, 1),
    ("chat", {"messages": [{"role": "developer", "content": [PART, PART]}]}, 2),
    ("chat", {"messages": [{"role": "user", "content": "x"}, {"role": "system", "content": MOVES}]}, 1),
    ("messages", {"system": MOVES, "messages": []}, 1),
    ("messages", {"system": [PART, PART], "messages": [{"role": "system", "content": MOVES}]}, 3),
    ("responses", {"instructions": MOVES, "input": MOVES.replace("2026", "year")}, 1),
    ("responses", {"input": [{"role": "developer", "content": [{"type": "input_text", "text": MOVES}]}]}, 1),
]


@pytest.mark.parametrize(("kind", "body", "n"), SYSTEMS)
def test_every_text_of_the_system_prompt_is_rewritten(kind: str, body: dict[str, Any], n: int) -> None:
    """Wherever the format has it, and nothing else of the body changes."""
    made = copy.deepcopy(body)
    assert Rewriting((DATE,)).apply(made, FORMATS[kind]) == (["date"], [])
    assert str(made).count("It is today.") == n
    assert str(made).replace("It is today.", MOVES) == str(body)


OTHERS: list[tuple[str, dict[str, Any]]] = [
    ("chat", {"messages": [{"role": "user", "content": MOVES}, {"role": "assistant", "content": MOVES}]}),
    ("chat", {"messages": [{"role": "tool", "content": MOVES}], "tools": [{"description": MOVES}]}),
    ("messages", {"messages": [{"role": "user", "content": [PART]}]}),
    ("responses", {"input": MOVES}),
    ("responses", {"input": [{"role": "user", "content": MOVES}, {"type": "reasoning", "content": MOVES}]}),
    ("openai-completion", {"prompt": MOVES, "system": MOVES, "messages": [{"role": "system"}]}),
    ("native-completion", {"prompt": [MOVES]}),
    ("chat", {"messages": "system"}),
    ("chat", {"messages": [None, {"role": ["system"], "content": MOVES}, {"role": "system", "content": {}}]}),
    ("messages", {"system": {"text": MOVES}}),
    ("responses", {"instructions": [None, {"text": 2026}]}),
]


@pytest.mark.parametrize(("kind", "body"), OTHERS)
def test_no_other_text_is_looked_at(kind: str, body: dict[str, Any]) -> None:
    """Questions, answers, tools, plain prompts, and bodies of a shape that llama-server will refuse."""
    made = copy.deepcopy(body)
    assert Rewriting((DATE,)).apply(made, FORMATS[kind]) == ([], [])
    assert made == body


def test_a_rule_is_for_the_formats_that_it_names() -> None:
    """Others pass."""
    rewriting = Rewriting((DATE.model_copy(update={"formats": ("messages",)}),))
    assert rewriting.apply({"messages": [{"role": "system", "content": MOVES}]}, FORMATS["chat"]) == ([], [])
    assert rewriting.apply({"system": MOVES}, FORMATS["messages"]) == (["date"], [])


# -- what a rule does ----------------------------------------------------------------------------------------------


def test_rules_see_what_those_before_have_left() -> None:
    """And only those that have changed something are named and counted."""
    rules = (
        RewriteRule(name="first", pattern="one", replace="two"),
        RewriteRule(name="never", pattern="one", replace="three"),
        RewriteRule(name="same", pattern="t(w)o", replace=r"t\1o"),
        RewriteRule(name="last", pattern="two", replace="four"),
    )
    rewriting, body = Rewriting(rules), {"system": "one one"}
    assert rewriting.apply(body, FORMATS["messages"]) == (["first", "last"], [])
    assert body == {"system": "four four"}
    assert [rewriter.n_fired for rewriter in rewriting.rewriters] == [1, 0, 0, 1]


def test_only_the_beginning_is_looked_at() -> None:
    """What may be cut by the end of that is left as it is: half a number is no number."""
    rewriter = Rewriter(RewriteRule(name="n", pattern=r"\d+", replace="#", max_chars=10))
    assert rewriter.rewrite("12 34 5678 9") == "# # 5678 9"
    assert rewriter.rewrite("12 34 5678") == "# # #"


def test_matches_of_nothing_are_passed_over() -> None:
    """A pattern may look ahead and take nothing; it changes nothing then."""
    assert Rewriter(RewriteRule(name="n", pattern="(?=b)b?|(?<=a)", replace="#")).rewrite("ab a") == "a# a"


@pytest.mark.parametrize(
    "pattern", ["x{e}", "{id}: x", "x{s<=2:[a-z]}", "[{d}]x{1,2}", r"\N{BULLET}{e}", r"\{e}\\{i}"]
)
def test_braces_are_what_they_are_in_re(pattern: str) -> None:
    """Not limits of errors, with which everything would be replaced."""
    text = "x{e} {id}: x x{s<=2:a} dxx yy \u2022{e} {e}\\{i}"
    rewriter = Rewriter(RewriteRule(name="n", pattern=pattern, replace="#"))
    assert rewriter.rewrite(text) == re.sub(pattern, "#", text) != text


def test_a_pattern_that_does_not_end_is_given_up() -> None:
    """The request is served as it is, and the rules behind it hold."""
    endless = RewriteRule(name="endless", pattern="(a+)+$", replace="")
    rewriting = Rewriting((endless, DATE))
    body = {
        "messages": [{"role": "system", "content": "a" * 4000 + "b"}, {"role": "system", "content": MOVES}]
    }
    assert rewriting.apply(body, FORMATS["chat"]) == (["date"], ["endless"])
    assert body["messages"][0]["content"] == "a" * 4000 + "b"
    assert rewriting.rewriters[0].n_given_up == 1


# -- the configuration ---------------------------------------------------------------------------------------------


def load(directory: Path, rules: str) -> Config:
    path = directory / "config.yaml"
    path.write_text(f"backends: [{{url: 'http://127.0.0.1:8080'}}]\nrewrite: {rules}\n")
    return Config.load(path)


def test_a_ready_rule_is_named_and_others_are_written_out(tmp_path: Path) -> None:
    """In their order."""
    rules = load(
        tmp_path, r"[claude-code-attribution, {name: date, pattern: '\d+', replace: '\g<0>!'}]"
    ).rewrite
    assert [rule.name for rule in rules] == ["claude-code-attribution", "date"]
    assert load(tmp_path, "").rewrite == ()


def test_ready_rules_are_in_force(tmp_path: Path) -> None:
    """Without a word in the file, ahead of others; once where they are named; not where a line says so, nor where a
    rule of the same name stands for it."""
    other = "{name: date, pattern: x, replace: y}"
    mine = "{name: claude-code-attribution, pattern: x, replace: y}"
    assert [rule.name for rule in load(tmp_path, "").rules] == list(READY)
    assert [rule.name for rule in load(tmp_path, f"[{other}]").rules] == [*READY, "date"]
    assert [rule.name for rule in load(tmp_path, f"[{other}, claude-code-attribution]").rules] == [
        "date",
        *READY,
    ]
    assert [rule.pattern for rule in load(tmp_path, f"[{mine}]").rules] == ["x"]
    off = f"[{other}]\nrewrite_off: [claude-code-attribution]"
    assert [rule.name for rule in load(tmp_path, off).rules] == ["date"]
    assert load(tmp_path, "[]\nrewrite_off:").rules == tuple(READY.values())


def test_a_ready_rule_leaves_other_bodies_alone() -> None:
    """Nothing is written anew for it: most clients send no such line."""
    body = {"system": [{"type": "text", "text": "You are Claude Code. x-anthropic-billing-header: cch=0a1;"}]}
    before = copy.deepcopy(body)
    assert Rewriting(tuple(READY.values())).apply(body, FORMATS["messages"]) == ([], [])
    assert body == before


@pytest.mark.parametrize(
    ("rules", "fault"),
    [
        ("\nrewrite_off: [date]", "rewrite_off[0]: there is no ready rule 'date': there is claude-code-attribution"),
        ("[clod]", "rewrite[0]: there is no ready rule 'clod': there is claude-code-attribution; a rule of"),
        ("[{name: a, pattern: '(', replace: b}]", "rewrite[0].pattern: is not a valid regular expression"),
        ("[{name: a, pattern: 'x*', replace: b}]", "rewrite[0].pattern: matches the empty text too"),
        (r"[{name: a, pattern: x, replace: '\1'}]", "rewrite[0]: replace: invalid group reference 1"),
        (r"[{name: a, pattern: x, replace: '\g<y>'}]", "rewrite[0]: replace: unknown group name 'y'"),
        ("[{name: a, pattern: x, replace: 2026}]", "rewrite[0].replace: should be text; put it in quotes"),
        ("[{name: 'a b', pattern: x, replace: b}]", "rewrite[0].name: should be letters, digits"),
        ("[{name: a, pattern: x, replace: b, formats: []}]", "rewrite[0].formats: should not be empty"),
        ("[{name: a, pattern: x, replace: b, formats: [chats]}]", "rewrite[0].formats[0]: should be 'chat', "),
        ("[{name: a, pattern: x, replace: b, max_chars: 0}]", "rewrite[0].max_chars: should be at least 1"),
        ("[{name: a, pattern: x}]", "rewrite[0].replace: is missing"),
        ("[{name: a, patern: x, pattern: x, replace: b}]", "rewrite[0].patern: unknown key; did you mean pattern?"),
        ("[{name: a, pattern: x, replace: b}, {name: a, pattern: y, replace: b}]", "rewrite: two rules are named a"),
    ],
)  # fmt: skip
def test_faults_of_rules_are_told(tmp_path: Path, rules: str, fault: str) -> None:
    """With their place, and what would be right."""
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, rules)
    (told,) = caught.value.faults
    assert told.startswith(fault)
