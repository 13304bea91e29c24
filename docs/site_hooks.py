"""Hooks of MkDocs: files that pages link to join the site, and lines break where they may.

On the pages links to files of the repository are relative to it (`../examples/x.py`), so that they
work where the repository is browsed, too. `mkdocs.yml` names this file.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
CODE = re.compile(r"<code[^>]*>.*?</code>", re.DOTALL)
FLAG = re.compile(r"(?<![\w-])(?:hf-gradnas|--?[A-Za-z][\w-]*)(?![^<]*>)")
LONG_NAME = re.compile(r"[\w.*]{20,}(?![^<]*>)")
JOINT = re.compile(r"(?<=[a-z\d])(?=[A-Z])|(?<=[._])(?=\w)")
CELL = re.compile(r"<td>.*?</td>", re.DOTALL)
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


def on_page_content(html: str, page: Any, **_: Any) -> str:
    """Keep each flag in one line, let long names in tables break, and hide empty contents."""
    if not any(heading.children for heading in page.toc):
        page.meta.setdefault("hide", []).append("toc")
    return CELL.sub(_let_names_break, CODE.sub(_keep_flags, html))


def _keep_flags(code: re.Match[str]) -> str:
    return FLAG.sub(r'<span class="flag">\g<0></span>', code[0])


def _let_names_break(cell: re.Match[str]) -> str:
    return LONG_NAME.sub(lambda name: JOINT.sub("<wbr>", name[0]), cell[0])
