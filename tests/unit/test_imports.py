"""The house rules that a reader of the imports can check: rooms, their order, their size."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from tests.support.source import MODULES, REPOSITORY, SOURCE, SOURCE_GROUP, parsed

pytestmark = SOURCE_GROUP

OPEN = {"", "errors", "tasks", "file_id", "sizes"}  # "" is the package itself: its version
PURE = OPEN | {"cache", "scheduling"}
#: Which rooms a room may know, beside itself. Imports point one way:
#: cache, scheduling <- tokens, llama, store, formats <- backend <- fleet <- http <- cli.
MAY_IMPORT = {
    "": set[str](),
    "errors": {""},
    "tasks": {"", "errors"},
    "file_id": {""},
    "sizes": {""},
    "cache": {"errors"},
    "scheduling": {"errors", "cache", "sizes"},
    "llama": PURE,
    "observe": PURE | {"llama"},
    "tokens": PURE | {"llama", "observe"},
    "store": PURE | {"llama", "observe"},
    "formats": PURE | {"llama", "observe", "tokens"},
    "config": PURE | {"llama", "observe", "tokens", "store", "formats"},
    "backend": PURE | {"llama", "observe", "tokens", "store", "formats"},
    "fleet": PURE | {"llama", "observe", "tokens", "store", "formats", "config", "backend"},
    "http": PURE | {"llama", "observe", "tokens", "store", "formats", "config", "backend", "fleet"},
    "bench": {"", "errors", "llama"},
    "cli": PURE
    | {"llama", "observe", "tokens", "store", "formats", "config", "backend", "fleet", "http", "bench"},
    "__main__": {"cli"},
}
#: Where an import still points the other way: module -> rooms. To be emptied.
EXCEPTIONS: dict[str, set[str]] = {}
#: What thinking does not need: sockets, files, clocks, loggers, event loops.
IMPURE = {
    "aiofiles",
    "aiohttp",
    "asyncio",
    "datetime",
    "logging",
    "os",
    "pathlib",
    "socket",
    "subprocess",
    "time",
}


def name_of(module: Path) -> str:
    return str(module.relative_to(SOURCE))


def room_of(dotted: str) -> str:
    """``llamaslot.store.catalog`` is in the room ``store``."""
    return dotted.split(".")[1] if "." in dotted else ""


@cache
def imports(module: Path) -> frozenset[str]:
    """Every module that this one imports, wherever the import stands, as an absolute name."""
    return frozenset(_imports(module))


def _imports(module: Path) -> Iterator[str]:
    package = ["llamaslot", *module.relative_to(SOURCE).parent.parts]
    for node in ast.walk(parsed(module)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *(node.module or "").split(".")]).strip(".")
            # `from llamaslot import errors` names a module of its own, unless it is the package's own attribute
            named = [f"{base}.{alias.name}" for alias in node.names] if base == "llamaslot" else [base]
            yield from (name.removesuffix(".__version__") for name in named)


def test_imports_point_one_way() -> None:
    """A room knows the rooms below it, and no other."""
    wrong = {}
    for module in MODULES:
        own = room_of("llamaslot." + ".".join(module.relative_to(SOURCE).with_suffix("").parts))
        own = "" if own == "__init__" else own
        assert own in MAY_IMPORT, f"{own} is a new room: say in MAY_IMPORT what it may know"
        ours = {room_of(name) for name in imports(module) if name.split(".")[0] == "llamaslot"}
        wrong[name_of(module)] = ours - MAY_IMPORT[own] - {own}
    assert {name: rooms for name, rooms in wrong.items() if rooms} == EXCEPTIONS


def dotted(module: Path) -> str:
    return ".".join(["llamaslot", *module.relative_to(SOURCE).with_suffix("").parts]).removesuffix(
        ".__init__"
    )


def imported(module: Path, known: set[str]) -> set[str]:
    """The modules of ``known`` that this one imports, also for types only. What a package offers counts as the package,
    unless it is a module of its own."""
    found = set(imports(module))
    for node in ast.walk(parsed(module)):
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            named = {f"{node.module}.{alias.name}" for alias in node.names}
            if named <= known:
                found = (found - {node.module}) | named
    return (found & known) - {dotted(module)}


def test_no_module_is_in_a_circle() -> None:
    """Neither at run time nor under TYPE_CHECKING."""
    known = {dotted(module): module for module in MODULES}
    left = {name: imported(module, set(known)) for name, module in known.items()}
    ends = set(left)
    while ends:  # that import none of the others, or are imported by none
        used = set[str]().union(*left.values())
        ends = {name for name, below in left.items() if not below & left.keys() or name not in used}
        left = {name: below for name, below in left.items() if name not in ends}
    assert left.keys() == set(), "each of these imports another one of them, and so on round"


def test_the_rooms_have_an_order() -> None:
    """The table itself has no circle."""
    left = dict(MAY_IMPORT)
    while left:
        lowest = [room for room, below in left.items() if not (below - {room}) & left.keys()]
        assert lowest, f"a circle among {sorted(left)}"
        for room in lowest:
            del left[room]


@pytest.mark.parametrize(
    "module",
    [module for module in MODULES if module.relative_to(SOURCE).parts[0] in ("cache", "scheduling")],
    ids=name_of,
)
def test_pure_rooms_only_think(module: Path) -> None:
    """No await, clock, path, logger or socket: time and rates come in as arguments."""
    assert {name.split(".")[0] for name in imports(module)} & IMPURE == set()
    waits = [node for node in ast.walk(parsed(module)) if isinstance(node, ast.AsyncFunctionDef)]
    assert waits == []


def test_only_http_serves() -> None:
    """aiohttp's server is known in ``http`` alone."""
    serving = {
        module.relative_to(SOURCE).parts[0]
        for module in MODULES
        if "aiohttp.web" in imports(module)
        or re.search(r"^\s*from aiohttp import .*\bweb\b", module.read_text(), re.M)
    }
    assert serving == {"http"}


def test_a_module_fits_in_a_head() -> None:
    """At most 450 lines: what shares state belongs together, and a split for the number alone helps nobody."""
    n_lines = {name_of(module): len(module.read_text().splitlines()) for module in MODULES}
    assert {name: n for name, n in n_lines.items() if n > 450} == {}


def repository_files() -> list[Path]:
    """What belongs to the repository: tracked or about to be; without git (an unpacked archive) what lies in it."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode == 0:
        files = [REPOSITORY / name for name in listed.stdout.split("\0") if name]
    else:
        tops = ("src", "bench", "tests", "docs", ".ci")
        files = [*REPOSITORY.glob("*.*"), *(file for top in tops for file in (REPOSITORY / top).rglob("*.*"))]
    return [file for file in files if file.is_file() and "__pycache__" not in file.parts]


def test_the_repository_stands_alone() -> None:
    """No link, document, script or setting refers to anything beside the repository."""
    outside = [
        f"{file}: {path}"
        for file in repository_files()
        if file.suffix != ".py"  # strings with ../ are what tests of hostile paths are made of
        for path in re.findall(r"(?<![\w./])(?:\.\./)+[\w./-]*", file.read_text(errors="replace"))
        if not (file.parent / path).resolve().is_relative_to(REPOSITORY)
    ]
    outside += [
        f"{file}: link" for file in repository_files() if not file.resolve().is_relative_to(REPOSITORY)
    ]
    assert outside == []


def test_links_in_documents_lead_somewhere() -> None:
    """Each relative link of a Markdown file names a file that is there."""
    broken = [
        f"{file.name}: {target}"
        for file in repository_files()
        if file.suffix == ".md"
        for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", file.read_text())
        if "://" not in target and not (file.parent / target).exists()
    ]
    assert broken == []
