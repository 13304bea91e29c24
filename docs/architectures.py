"""The table of `architectures.md`: what is pruned in every type of Transformers.

``python docs/architectures.py`` takes every type through the whole loop (tests/zoo) and writes the
page, its counts, and those of the README; ``--types bert,llama`` runs these only, ``--processes 4``
says how many run at a time. Tests compare.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path
from typing import Any

PAGE = Path(__file__).with_name("architectures.md")
README = PAGE.parents[1] / "README.md"
HEAD = ("type", "class", "pruned", "not pruned, and why", "layout", "loads with")
POPULAR = (
    "bert roberta deberta-v2 modernbert gpt2 llama qwen3 gemma3_text phi3 mixtral qwen3_moe "
    "deepseek_v3 gpt_oss llama4_text t5 bart whisper wav2vec2 vit dinov2 swin convnext resnet clip "
    "siglip llava qwen2_5_vl detr segformer sam_vision_model mamba jamba".split()
)
"""Types in the matrix of the README."""
COLUMNS = {
    "heads": "heads",
    "KV groups": "KV groups",
    "neurons": "neurons",
    "experts": "experts",
    "neurons in experts": "their neurons",
    "channels": "channels",
}
"""What may be pruned, as a row names it, and as the heads of columns do."""
SECONDS = 600
"""Longest time of a type."""
WORKER = (sys.executable, __file__, "--worker")
SHARE = 20
"""Types that a process runs, one after the other."""
NOTHING = {"cls": "", "pruned": [], "refused": [], "layout": "", "loads": "", "wrong": ""}


# --- rows and tables ------------------------------------------------------------------------------


def line_of(row: Mapping[str, Any]) -> str:
    """The row of a type in the page."""
    why = [_cell(said) for said in row["refused"]]
    if row["wrong"]:
        why.append(f"**fails** {_cell(row['wrong'])}")
    cells = (
        f"`{row['name']}`",
        row["cls"],
        ", ".join(kind for kind in COLUMNS if kind in row["pruned"]),
        "; ".join(why),
        row["layout"],
        row["loads"],
    )
    return f"| {' | '.join(cells)} |"


def lines_of(page: str) -> dict[str, str]:
    """The rows of a page by type."""
    return {found[1]: found[0] for found in re.finditer(r"^\| `([^`]+)` \|.*\|$", page, re.M)}


def counts_of(lines: Mapping[str, str]) -> str:
    """How many types have what, as a table."""
    kinds = _kinds(lines)
    counts = [
        ("types that are built", len(lines)),
        ("something is pruned", _some(kinds)),
        ("nothing is refused", _unrefused(lines)),
        *((f"{title} are pruned", _with(kinds, kind)) for kind, title in COLUMNS.items()),
        ("loads in plain Transformers when all may be pruned", _stock(lines)),
        ("a step fails", _failing(lines)),
    ]
    return _table(("", "types"), [(said, str(number)) for said, number in counts])


def summary_of(lines: Mapping[str, str]) -> str:
    """The counts in two sentences, for the README."""
    kinds = _kinds(lines)
    found = ", ".join(
        f"{kind} in {_with(kinds, kind)}" for kind in COLUMNS if kind != "neurons in experts"
    )
    return (
        f"Of {len(lines)} types, something is pruned in {_some(kinds)}: {found}.\n"
        f"Nothing is refused in {_unrefused(lines)}; with all of it cut, {_stock(lines)} load in "
        f"plain Transformers; in {_failing(lines)} a step fails."
    )


def matrix_of(lines: Mapping[str, str]) -> str:
    """Popular types by what is pruned in them, as a table; bold ones load in plain Transformers."""
    groups: dict[str, list[str]] = {}
    for name in POPULAR:
        cells = _cells(lines[name])
        shown = f"**{name}**" if cells[4] == "stock" else name
        groups.setdefault(cells[2], []).append(shown)
    rows = sorted(groups.items(), key=lambda group: -len(group[1]))
    return _table(("pruned", "types"), [(kinds, ", ".join(names)) for kinds, names in rows])


def with_tables(page: str, lines: Mapping[str, str], version: str = "") -> str:
    """A page with its tables made anew, between ``<!-- begin: NAME -->`` and ``<!-- end -->``.

    Args:
        page: Its text.
        lines: Rows by type.
        version: Of Transformers, if all rows were made with it; "" leaves what the page says.
    """
    tables = {
        "counts": lambda: counts_of(lines),
        "summary": lambda: summary_of(lines),
        "matrix": lambda: matrix_of(lines),
        "types": lambda: "\n".join([*_table(HEAD, []).splitlines(), *lines.values()]),
    }

    if version:
        tables["version"] = lambda: f"Made with Transformers {version}."

    def made(match: re.Match[str]) -> str:
        table = tables.get(match[2])
        return match[0] if table is None else f"{match[1]}\n\n{table()}\n\n<!-- end -->"

    return re.sub(r"(<!-- begin: (\w+) -->).*?<!-- end -->", made, page, flags=re.DOTALL)


def _kinds(lines: Mapping[str, str]) -> dict[str, list[str]]:
    return {name: _cells(line)[2].split(", ") for name, line in lines.items()}


def _some(kinds: Mapping[str, list[str]]) -> int:
    return sum(found != [""] for found in kinds.values())


def _unrefused(lines: Mapping[str, str]) -> int:
    return sum(bool(cells[2]) and not cells[3] for cells in map(_cells, lines.values()))


def _stock(lines: Mapping[str, str]) -> int:
    return sum(bool(cells[2]) and cells[4] == "stock" for cells in map(_cells, lines.values()))


def _failing(lines: Mapping[str, str]) -> int:
    return sum("**fails**" in line for line in lines.values())


def _with(kinds: Mapping[str, list[str]], kind: str) -> int:
    return sum(kind in found for found in kinds.values())


def _cells(line: str) -> list[str]:
    return line[2:-2].split(" | ")


def _cell(text: str) -> str:
    """Text without what a table would read as its own, or as a tag or emphasis."""
    return re.sub(r"([*<>\[\]])", r"\\\1", text.replace("|", "/")).replace("`", "'")


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


# --- running --------------------------------------------------------------------------------------


def examined(names: Sequence[str], processes: int) -> Iterator[dict[str, Any]]:
    """The row of each type, in some order."""
    shares = [names[start : start + SHARE] for start in range(0, len(names), SHARE)]
    with ThreadPoolExecutor(processes) as pool:
        for done in as_completed([pool.submit(_rows, share) for share in shares]):
            yield from done.result()


def _rows(names: Sequence[str]) -> list[dict[str, Any]]:
    """Rows from a process, and from another where it dies, which the row of that type says."""
    rows: list[dict[str, Any]] = []
    while len(rows) < len(names):
        left = names[len(rows) :]
        run = subprocess.run([*WORKER, *left], capture_output=True, text=True, check=False)
        found = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]
        rows += found
        if len(found) < len(left):
            lost = {"name": left[len(found)], "wrong": f"the process ended with {run.returncode}"}
            rows.append({**NOTHING, **lost})
    return rows


def _work(names: Iterable[str]) -> None:
    """Examine types in this process, one line of JSON each."""
    tests = PAGE.parents[1] / "tests"
    sys.path[:0] = [str(tests / "zoo"), str(tests / "support")]
    import torch
    import transformers
    import whole_loop

    import hf_gradnas  # noqa: F401 - per-layer checkpoints load

    def late(*_: object) -> None:
        raise TimeoutError

    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    signal.signal(signal.SIGALRM, late)
    for name in names:
        signal.alarm(SECONDS)
        with tempfile.TemporaryDirectory() as folder:
            row = whole_loop.examine(name, Path(folder))
        signal.alarm(0)
        sys.stdout.write(json.dumps(asdict(row)) + "\n")
        sys.stdout.flush()


def _all_types() -> list[str]:
    sys.path.insert(0, str(PAGE.parents[1] / "tests" / "zoo"))
    from tiny_configs import all_types

    return sorted(all_types())


def main() -> None:
    """Examine types, and write both pages."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--types", default="", help="only these, with commas between them")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--worker", nargs="+", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        _work(given.worker)
        return
    every = _all_types()
    names = given.types.split(",") if given.types else every
    if set(names) - set(every):
        parser.error(f"no type that is built tiny: {', '.join(sorted(set(names) - set(every)))}")
    before = lines_of(PAGE.read_text(encoding="utf-8"))
    lines = {name: line for name, line in before.items() if given.types and name in every}
    for number, row in enumerate(examined(names, given.processes), start=1):
        line = lines[row["name"]] = line_of(row)
        told = "" if before.get(row["name"]) == line else f"  {line}"
        sys.stderr.write(f"{number}/{len(names)} {row['name']}{told}\n")
    version = "" if given.types else importlib.metadata.version("transformers")
    for page in (PAGE, README):
        old = page.read_text(encoding="utf-8")
        text = with_tables(old, dict(sorted(lines.items())), version)
        page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
