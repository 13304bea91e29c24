"""What the package promises: few names, documented, and quick to import."""

import inspect
import re
import subprocess
import sys
from importlib import import_module

import pytest
from places import ROOT

import hf_gradnas

PAGES = "".join(
    (ROOT / page).read_text(encoding="utf-8")
    for page in ("README.md", "docs/commands.md", "docs/api.md")
)
NAMES = hf_gradnas.__all__
PUBLIC = re.findall(r"^::: (\S+)$", (ROOT / "docs" / "api.md").read_text("utf-8"), re.MULTILINE)
MAX_NAMES = 15


def _python(code: str) -> str:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_names_are_few_sorted_and_listed():
    assert sorted(set(NAMES)) == NAMES
    assert len(NAMES) <= MAX_NAMES
    assert set(NAMES) <= set(dir(hf_gradnas))


@pytest.mark.parametrize("name", NAMES)
def test_every_name_is_importable_documented_and_in_the_pages(name):
    value = getattr(hf_gradnas, name)
    if name != "__version__":
        assert len(inspect.getdoc(value) or "") > 20
        assert vars(value)["__doc__"], f"{name} only inherits its docstring"
        assert f"`{name}" in PAGES or f" {name}" in PAGES


@pytest.mark.parametrize("path", PUBLIC)
def test_what_the_api_page_lists_is_there_and_documented(path):
    home, _, name = path.rpartition(".")
    value = getattr(import_module(home), name)
    assert len(inspect.getdoc(value) or "") > 20
    assert not any(part.startswith("_") for part in path.split("."))


def test_every_name_of_the_package_is_on_the_api_page():
    listed = {path.rpartition(".")[2] for path in PUBLIC}
    errors = {"GradNASError", "GradNASWarning"}  # with their whole module
    assert set(NAMES) - {"__version__"} - errors <= listed


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'prune_everything'"):
        _ = hf_gradnas.prune_everything


def test_prune_is_a_module_for_the_command_line():
    assert "prune" not in NAMES
    assert inspect.ismodule(import_module("hf_gradnas.prune"))


def test_importing_the_package_imports_neither_torch_nor_transformers():
    heavy = "{'torch', 'transformers', 'accelerate', 'datasets', 'pydantic', 'typer'}"
    code = f"import sys, hf_gradnas; print(sorted({heavy} & set(sys.modules)))"
    assert _python(code) == "[]"


def test_importing_the_package_does_not_import_its_commands():
    code = "import sys, hf_gradnas; print([m for m in sys.modules if m.startswith('hf_gradnas.')])"
    loaded = _python(code)
    assert "hf_gradnas.prune" not in loaded
    assert "hf_gradnas.cli" not in loaded
