"""What the documents say is there: links, metrics, options, make targets, log lines, tables taken from the code."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import click
import pytest

from llamaslot import cli
from llamaslot.config.load import Config
from llamaslot.fleet.registry import Registry
from llamaslot.http.admin import Status
from llamaslot.http.body_changes import SystemPrompts
from llamaslot.http.reload import Reload
from llamaslot.http.service_manager import ServiceManager
from llamaslot.llama.managed.process import recommended_flags
from llamaslot.observe.journal import Decision
from llamaslot.observe.metrics import Metrics
from llamaslot.scheduling.slots import SlotState
from tests.support.source import MODULES, REPOSITORY, SOURCE, SOURCE_GROUP, parsed

GUIDES = sorted((REPOSITORY / "docs/guides").glob("*.md"))
PAGES = [
    *(REPOSITORY / "README.md", REPOSITORY / "README.ru.md", REPOSITORY / "CHANGELOG.md"),
    *sorted((REPOSITORY / "docs").glob("*.md")),
    *GUIDES,
]
MAKEFILE = (REPOSITORY / "Makefile").read_text()
pytestmark = SOURCE_GROUP

GAP = "\0"  # where a message has something that is known only when it is said
FORMAT = r"%[-+ #0]*\d*(?:\.\d+)?[a-z]"


def name_of(page: Path) -> str:
    return str(page.relative_to(REPOSITORY))


def page(name: str) -> str:
    return (REPOSITORY / name).read_text()


def section(text: str, heading: str) -> str:
    """What stands below a heading of the second level."""
    found = re.search(rf"^## {re.escape(heading)}$(.*?)(?=^## |\Z)", text, re.M | re.S)
    assert found, f"there is no section {heading!r}"
    return found[1]


def rows(text: str) -> list[list[str]]:
    """The cells of each row of the tables in a text, their headings left out."""
    lines = [line.strip() for line in text.splitlines() if line.lstrip().startswith("|")]
    ruled = [i for i, line in enumerate(lines) if set(line) <= set("|-: ")]
    body = [line for i, line in enumerate(lines) if not {i, i + 1} & set(ruled)]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in body]


def in_code(text: str) -> list[str]:
    """What stands between backticks."""
    return re.findall(r"`([^`]+)`", text)


# --- links


def without_code(text: str) -> str:
    return re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)


def anchors(text: str) -> set[str]:
    """The names that GitHub gives to a page's headings."""
    headings = re.findall(r"^#+ +(.+?) *$", without_code(text), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("where", PAGES, ids=name_of)
def test_links_lead_somewhere(where: Path) -> None:
    """To a file that is there, and to a heading that it has."""
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(where.read_text())):
        path, _, anchor = target.partition("#")
        if "://" in target:
            continue
        file = where.parent / path if path else where
        if not file.exists() or (anchor and anchor not in anchors(file.read_text())):
            broken.append(target)
    assert broken == []


def test_every_page_is_reached_from_the_readme() -> None:
    """Directly or over other pages."""
    reached, todo = set[Path](), [REPOSITORY / "README.md"]
    while todo:
        if (at := todo.pop()) not in reached:
            reached.add(at)
            links = re.findall(r"\]\(([^)\s#]+\.md)", at.read_text())
            todo += [(at.parent / link).resolve() for link in links if "://" not in link]
    assert set(PAGES) <= reached


# --- length


def test_the_pages_stay_short() -> None:
    """The README is read in four minutes. What is added to the other pages takes the place of something else; but
    for the page of figures that ``make bench`` writes. Guides are for new users, and have a limit of their own. Rules
    and dashes of tables are no words."""
    words = {
        where: sum(any(map(str.isalnum, word)) for word in where.read_text().split())
        for where in PAGES
        if where.name not in ("CHANGELOG.md", "README.ru.md", "performance.md")
    }
    in_guides = sum(n for where, n in words.items() if where in GUIDES)
    assert words[REPOSITORY / "README.md"] <= 850
    assert in_guides <= 7_000
    assert sum(words.values()) - in_guides <= 19_000


# --- other languages


def test_the_russian_readme_says_the_same() -> None:
    """What is in README.md is in README.ru.md, in the same order: sections, tables, blocks of code, links. Whoever
    changes one changes the other."""
    pages = [page("README.md").partition("\n## ")[2], page("README.ru.md").partition("\n## ")[2]]
    for pattern in (r"^(##)(?= )", r"^\|", r"^```.*?^```", r"\]\(([^)\s]+)\)", r"^(- )"):
        english, russian = (re.findall(pattern, text, re.M | re.S) for text in pages)
        assert english == russian
    # Names that are no words, whatever stands around them.
    english_code, russian_code = (sorted(in_code(without_code(text))) for text in pages)
    assert english_code == russian_code


# --- the glossary

GLOSSARY = REPOSITORY / "docs/glossary.md"


def terms() -> list[str]:
    return re.findall(r"^## (.+)$", GLOSSARY.read_text(), re.M)


def glossary_links(where: Path) -> list[str]:
    """The terms that a page links to, by their anchors."""
    own = r"\]\(#" if where == GLOSSARY else r"\]\((?:docs/|\.\./)?glossary\.md#"
    return re.findall(own + r"([\w-]+)\)", where.read_text())


def test_the_glossary_is_short_and_sorted() -> None:
    assert len(terms()) <= 40
    assert terms() == sorted(terms(), key=str.lower)


def test_every_term_is_linked_from_a_page() -> None:
    """No reader finds a term that no page links to."""
    linked = {term for where in PAGES if where != GLOSSARY for term in glossary_links(where)}
    assert anchors(GLOSSARY.read_text()) - linked == {"glossary"}


@pytest.mark.parametrize("where", [page for page in PAGES if page != GLOSSARY], ids=name_of)
def test_a_page_links_each_term_once(where: Path) -> None:
    """Where it is first used."""
    linked = glossary_links(where)
    assert sorted(linked) == sorted(set(linked))


# --- commands


def commands() -> Iterator[tuple[str, click.Command]]:
    assert isinstance(cli.main, click.Group)
    yield "", cli.main
    for name, command in cli.main.commands.items():
        yield name, command
        if isinstance(command, click.Group):
            context = click.Context(command)
            for its in command.list_commands(context):
                below = command.get_command(context, its)
                assert below is not None
                yield f"{name} {its}", below


def options(command: click.Command) -> set[str]:
    context = click.Context(command, **command.context_settings)
    return {name for option in command.get_params(context) for name in option.opts}


def test_mentioned_commands_and_options_exist() -> None:
    """Whatever follows ``llamaslot`` on a line of a page."""
    known = dict(commands())
    wrong = []
    for where in PAGES:
        for line in re.findall(
            r"llamaslot ((?:bench|demo|monitoring|serve|run|snapshots|keys)\b[^`\n#|]*|(?<![\w/]llamaslot )--[a-z]+)",
            where.read_text(),
        ):
            words = line.partition(" -- ")[0].split()  # behind it stands another program's line
            if words[0] in ("snapshots", "keys"):
                words = [" ".join(words[:2]), *words[2:]]
            command = known[""] if words[0].startswith("-") else known.get(words[0])
            named = {word.partition("=")[0] for word in words if re.match(r"--?[a-z]", word)}
            if command is None or not named <= options(command):
                wrong.append(f"{where.name}: llamaslot {line}")
    assert wrong == []


def test_every_option_is_mentioned() -> None:
    """An option that no page knows is found by nobody."""
    text = "\n".join(where.read_text() for where in PAGES)
    missing = [name for command, its in commands() for name in options(its) if command and name not in text]
    assert set(missing) <= {"-h", "--help"}


def targets() -> set[str]:
    return set(re.findall(r"^([a-z][a-z0-9-]*):", MAKEFILE, re.M))


def test_mentioned_make_targets_exist() -> None:
    """In code of the pages and in the Makefile's own words."""
    mentioned = set[str]()
    for text in (MAKEFILE, *(where.read_text() for where in PAGES)):
        mentioned |= set(re.findall(r"(?:^|`|# +|, )make ([a-z][a-z0-9-]*)", text, re.M))
    assert mentioned
    assert mentioned <= targets()


def test_every_make_target_is_mentioned() -> None:
    """At the head of the Makefile."""
    head = MAKEFILE.partition("\n\n")[0]
    assert {target for target in targets() if f"make {target}" not in head} == set()


# --- what is seen while it runs


def test_every_metric_is_documented() -> None:
    """docs/operations.md has a row for each, and none for one that is not there."""
    metrics = Metrics()
    metrics.of_backend("gpu0")
    exposed = re.findall(r"^# TYPE (llamaslot_\w+)", metrics.exposition().decode(), re.M)
    told = {name for row in rows(section(page("docs/operations.md"), "Metrics")) for name in in_code(row[0])}
    assert told == {name for name in exposed if not name.endswith("_created")}


async def test_every_field_of_the_status_is_documented(tmp_path: Path) -> None:
    """Those of the whole, and those of the backend."""
    path = tmp_path / "config.yaml"
    path.write_text(f"backends: [{{url: 'http://127.0.0.1:9'}}]\nstore: {{meta_dir: '{tmp_path}'}}")
    config = Config.load(path)
    registry = Registry.of(config, {"llama": "http://127.0.0.1:9"})
    prompts = SystemPrompts((), registry.metrics)
    reload = Reload(path, config, registry, ServiceManager())
    status: dict[str, Any] = Status(registry, prompts, reload).status()
    fields = {
        *(f"backends[].{field}" for field in status.pop("backends")[0]),
        *status,
    }
    told = rows(section(page("docs/operations.md"), "`/llamaslot/status`"))
    assert {name for row in told for name in in_code(row[0])} == fields


def test_every_field_of_a_decision_is_documented() -> None:
    """What stands in the journal, and nothing that does not."""
    told = rows(section(page("docs/operations.md"), "`/llamaslot/journal`"))
    fields = set(Decision("req-1", 0.0, 1).to_json())
    assert {name for row in told for name in in_code(row[0])} == fields


@cache
def messages() -> tuple[str, ...]:
    """Every string of the source, with a gap where something is filled in."""
    found = set[str]()
    for tree in map(parsed, MODULES):
        for node in ast.walk(tree):
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else GAP for part in node.values]
                found.add("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.add(re.sub(FORMAT, GAP, node.value))
    return tuple(found)


def pattern_of(message: str) -> str:
    """Each part between two dots of omission, in this order."""
    return ".*".join(re.escape(part.strip()) for part in message.split("…"))


def is_said(message: str) -> bool:
    """Whether the source has it."""
    first = max((part.strip() for part in message.split("…")), key=len)  # looking for it is quick
    return any(first in text and re.search(pattern_of(message), text, re.S) for text in messages())


@pytest.mark.parametrize(
    ("where", "heading"),
    [
        ("docs/operations.md", "The log"),
        ("docs/operations.md", "Warnings"),
    ],
)
def test_lines_that_are_explained_are_said(where: str, heading: str) -> None:
    """The words that an operator looks up are those that the code says."""
    lines = [line for row in rows(section(page(where), heading)) for line in in_code(row[0])]
    assert lines
    assert [line for line in lines if not is_said(line)] == []


@cache
def constants() -> dict[str, str]:
    """Texts that the source names: each upper-case name of a module and its string."""
    named = dict[str, str]()
    for tree in map(parsed, MODULES):
        for node in tree.body:
            match node:
                case ast.Assign(targets=[ast.Name(id=name)], value=ast.Constant(value=str(text))):
                    named[name] = text
                case _:
                    pass
    return named


def logged() -> Iterator[str]:
    """What goes to the log above debug, as it is written in the source, or in a constant that is logged. Lines that are
    all gap are passed over."""
    for tree in map(parsed, MODULES):
        for node in ast.walk(tree):
            if not (isinstance(node, ast.Call) and node.args and isinstance(node.func, ast.Attribute)):
                continue
            if (said := ast.unparse(node.func)) not in _LOUD:
                continue
            names = [part.id for arg in node.args for part in ast.walk(arg) if isinstance(part, ast.Name)]
            texts = [constants()[name] for name in names if name in constants()]
            told = node.args[1 if said == "self._failures.failed" else 0]  # behind the reason
            if isinstance(told, ast.Constant):
                texts.append(str(told.value))
            for text in texts:
                line = re.sub(FORMAT, GAP, text)
                if len(re.findall(r"[a-z]{2,}", line)) > 1:
                    yield line


_LOUD = {f"log.{level}" for level in ("info", "warning", "error", "exception")} | {"self._failures.failed"}


def test_lines_that_are_said_are_explained() -> None:
    """Whoever finds one in the log finds it in docs/operations.md."""
    tables = [section(page("docs/operations.md"), heading) for heading in ("The log", "Warnings")]
    told = [line for table in tables for row in rows(table) for line in in_code(row[0])]
    assert [line for line in logged() if not any(re.search(pattern_of(t), line, re.S) for t in told)] == []


# --- tables taken from the code


def configurations() -> list[Any]:
    """Every YAML of the pages that names a backend."""
    return [
        pytest.param(block, id=f"{name_of(where)} {i}")
        for where in PAGES
        for i, block in enumerate(re.findall(r"^```yaml\n(.*?)^```", where.read_text(), re.M | re.S))
        if "backends:" in block
    ]


@pytest.mark.parametrize("text", configurations())
def test_configurations_have_no_faults(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever copies one can start with it, once the programs and the keys are there."""
    monkeypatch.setattr("shutil.which", lambda program: f"/usr/bin/{program}")
    monkeypatch.setattr("llamaslot.config.sections.read_keys", lambda path: ())
    path = tmp_path / "config.yaml"
    path.write_text(text)
    Config.load(path)


def test_the_recommended_flags_are_those_of_a_managed_server() -> None:
    """docs/install.md's command line for an unmanaged server has each of them, with the same value."""
    command = section(page("docs/install.md"), "2. llama-server").partition("```sh")[2].partition("```")[0]
    missing = [
        flag for flag in recommended_flags([]) if " ".join(flag.words()) not in command.replace("\\\n", " ")
    ]
    assert missing == []


def test_every_slot_state_is_explained() -> None:
    """docs/how-it-works.md has each state of a slot, as the status shows it, and no other."""
    told = [in_code(row[0])[0] for row in rows(section(page("docs/how-it-works.md"), "Slot states"))]
    assert told == [state.value for state in SlotState]


def test_every_package_is_in_the_table() -> None:
    """docs/how-it-works.md has a row for each package, and none for one that is not there."""
    table = rows(section(page("docs/how-it-works.md"), "Modules"))
    told = [in_code(package)[0].removeprefix("src/llamaslot/") for package, _ in table]
    packages = {f"{file.parent.relative_to(SOURCE)}/".removeprefix("./") for file in SOURCE.rglob("*.py")}
    assert sorted(told) == sorted(packages)


def test_every_module_says_what_it_is_for() -> None:
    """In its first line, which docs/how-it-works.md sends its readers to."""
    silent = [module for module in MODULES if not (ast.get_docstring(parsed(module)) or "").strip()]
    assert silent == []


def test_the_map_of_changes_names_modules() -> None:
    """The table *I want to change* of docs/how-it-works.md leads to files that are there."""
    table = rows(section(page("docs/how-it-works.md"), "I want to change …"))
    named = {name for row in table for name in in_code(row[1]) if "/" in name or name.endswith(".py")}
    assert named
    assert {name for name in named if not (SOURCE / name).exists()} == set()


def spawned() -> Iterator[str]:
    """The names of the tasks that the source starts, as far as they are written there."""
    for tree in map(parsed, MODULES):
        for node in ast.walk(tree):
            is_spawn = isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "spawn"
            if is_spawn and isinstance(node, ast.Call) and len(node.args) == 2:
                name = node.args[1]
                parts = name.values if isinstance(name, ast.JoinedStr) else [name]
                yield "…".join(str(part.value) for part in parts if isinstance(part, ast.Constant)).strip()


def test_every_task_is_in_the_table() -> None:
    """docs/how-it-works.md says of each who starts it, who ends it and what it may raise."""
    table = " ".join(row[0] for row in rows(section(page("docs/how-it-works.md"), "Tasks")))
    missing = [name for name in spawned() if any(part.strip() not in table for part in name.split("…"))]
    assert missing == []
