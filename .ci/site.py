"""For mkdocs: pages at the top of the repository become pages of the site."""

from __future__ import annotations

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

PAGES = {"README.md": "index.md", "README.ru.md": "README.ru.md", "CHANGELOG.md": "CHANGELOG.md"}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add them, with their links as seen from docs/."""
    root = Path(config.docs_dir).parent
    for name, uri in PAGES.items():
        text = re.sub(r"\]\(docs/", "](", (root / name).read_text())
        for other, its_uri in PAGES.items():
            text = text.replace(f"]({other}", f"]({its_uri}")
        files.append(File.generated(config, uri, content=text))
    files.append(File.generated(config, "LICENSE", content=(root / "LICENSE").read_text()))
    return files
