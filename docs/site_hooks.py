"""Hooks of MkDocs: files of the repository that pages link to become part of the site.

On the pages such links are relative to the repository (`../examples/x.py`), so that they work where
the repository is browsed, too. `mkdocs.yml` names this file.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
LINK = re.compile(r"\]\(\.\./([\w./-]+)\)")


def on_files(files: Files, config: Any) -> Files:
    """Add every file outside `docs/` that a page links to."""
    pages = [file for file in files.documentation_pages() if file.abs_src_path]
    linked = {name for page in pages for name in LINK.findall(page.content_string)}
    for name in sorted(linked):
        source = ROOT / name
        if source.is_file():  # else the link stays as it is, and `--strict` refuses it
            files.append(File.generated(config, name, abs_src_path=str(source)))
    return files


def on_page_markdown(markdown: str, files: Files, **_: Any) -> str:
    """Let links to these files lead to their copies."""

    def inside(match: re.Match[str]) -> str:
        return f"]({match[1]})" if files.get_file_from_path(match[1]) else match[0]

    return LINK.sub(inside, markdown)
