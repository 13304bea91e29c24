"""The import order of the package, and the limits of house style that no linter knows."""

import ast
import sys
from pathlib import Path

import pytest
from places import ROOT

PACKAGE = ROOT / "hf_gradnas"
FILES = sorted(PACKAGE.rglob("*.py"))

# A module may import lower layers and, in its own layer, what stands to its left.
LAYERS = (
    ("_import_path", "_lazy", "_redaction", "errors", "_manifests", "_files", "types", "_compat"),
    ("config", "report", "running", "batches"),
    ("stacks", "members", "tokens", "routing", "surgery", "structure", "costs", "search", "masks"),
    ("verification", "stock", "scores", "repair", "checkpoint", "shards", "blueprint"),
    ("hub", "export", "examined", "frontier", "planning", "pruner", "nas"),
    ("callback", "data"),
    ("jobs", "flow", "cli", "prune", "inspect", "sweep", "verify", "__main__", "__init__"),
)
PLACE = {
    name: (layer, column) for layer, names in enumerate(LAYERS) for column, name in enumerate(names)
}
# Third-party packages that a module may import; what is not named here may import any.
THIRD_PARTY = {
    "_import_path": set(),
    "_lazy": set(),
    "_redaction": set(),
    "errors": set(),
    "_manifests": set(),
    "_files": set(),
    "types": {"numpy", "safetensors"},
    "config": {"pydantic", "pydantic_core", "yaml"},  # read before torch is imported
    "search": {"numpy"},
    "planning": set(),
}
# Travels inside checkpoints as one file, so it stands alone and may be longer.
SELF_CONTAINED = "surgery/modeling_gradnas.py"
MAX_FILE_LINES = 400
MAX_SELF_CONTAINED_LINES = 740
MAX_FUNCTION_LINES = 60


def _name(file: Path) -> str:
    """Top-level module of the package that a file belongs to."""
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def _imports(file: Path) -> list[str]:
    """Absolute dotted names of everything that a file imports, lazily or not."""
    parts = ["hf_gradnas", *file.relative_to(PACKAGE).with_suffix("").parts]
    found = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = parts[: -node.level] if node.level else []
            module = [*base, *(node.module.split(".") if node.module else [])]
            found += [".".join([*module, alias.name]) for alias in node.names]
    return found


def _own(file: Path) -> set[str]:
    """Top-level modules of the package that a file imports."""
    dotted = [name.split(".") for name in _imports(file)]
    inside = [parts[1:] for parts in dotted if parts[0] == "hf_gradnas"]
    return {parts[0] if parts and parts[0] in PLACE else "__init__" for parts in inside}


def _ids(files: list[Path]) -> list[str]:
    return [str(file.relative_to(PACKAGE)) for file in files]


@pytest.mark.parametrize("file", FILES, ids=_ids(FILES))
def test_a_module_imports_only_what_stands_below_or_to_its_left(file):
    name = _name(file)
    assert name in PLACE, f"{name} has no place in LAYERS"
    imported = _own(file) - {name}
    wrong = {other for other in imported if not _may_import(name, other)}
    assert not wrong, f"{file.name} ({name}) imports {wrong}, which stand above or to its right"


def _may_import(name: str, other: str) -> bool:
    return PLACE[other] < PLACE[name]


def test_the_rule_itself():
    assert _may_import("search", "config")
    assert _may_import("search", "structure")
    assert not _may_import("search", "masks")
    assert not _may_import("types", "config")


@pytest.mark.parametrize("name", THIRD_PARTY)
def test_third_party_imports_are_limited(name):
    files = [file for file in FILES if _name(file) == name]
    assert files
    roots = {dotted.split(".")[0] for file in files for dotted in _imports(file)}
    assert roots - set(sys.stdlib_module_names) - {"hf_gradnas"} <= THIRD_PARTY[name]


def test_the_file_that_travels_in_checkpoints_stands_alone():
    file = PACKAGE / SELF_CONTAINED
    assert not _own(file)


@pytest.mark.parametrize("file", FILES, ids=_ids(FILES))
def test_files_and_functions_are_small_and_do_not_print(file):
    source = file.read_text(encoding="utf-8")
    alone = file == PACKAGE / SELF_CONTAINED
    assert len(source.splitlines()) <= (MAX_SELF_CONTAINED_LINES if alone else MAX_FILE_LINES)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            assert length <= MAX_FUNCTION_LINES, f"{node.name} has {length} lines"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id != "print", f"print in line {node.lineno}"
