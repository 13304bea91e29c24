"""Dependencies, constraints and hooks agree, and the wheel carries what the package reads."""

import re

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version
from places import ROOT

import hf_gradnas

PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def _requirements(key: str) -> dict[str, Requirement]:
    """Requirements of a list in pyproject.toml, by name (tomllib needs Python 3.11)."""
    block = re.search(rf"^{key} = \[(.*?)\]$", PYPROJECT, re.DOTALL | re.MULTILINE)
    assert block
    found = {}
    for item in map(Requirement, re.findall(r'"([^"]+)"', block.group(1))):
        if item.name == "hf_gradnas":  # extras of its own
            for extra in sorted(item.extras):
                found |= _requirements(extra)
        else:
            found[canonicalize_name(item.name)] = item
    return found


def _pins(file: str) -> dict[str, str]:
    """Pinned version per package that holds for this Python."""
    pins = {}
    for line in (ROOT / file).read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            pin = Requirement(line)
            if pin.marker is None or pin.marker.evaluate():
                (specifier,) = pin.specifier
                assert specifier.operator == "=="
                pins[canonicalize_name(pin.name)] = specifier.version
    return pins


RUNTIME = _requirements("dependencies")
DEV = _requirements("dev")


@pytest.mark.parametrize("name", [*RUNTIME, *DEV])
def test_constraints_pin_every_direct_dependency_within_its_bounds(name):
    requirement = {**RUNTIME, **DEV}[name]
    pins = _pins("constraints.txt")
    assert name in pins
    assert requirement.specifier.contains(pins[name])


def test_the_minimum_file_pins_exactly_the_stated_minima():
    pins = {name: Version(pin) for name, pin in _pins(".ci/minimum.txt").items()}
    assert pins == {name: Version(str(item.specifier)[2:]) for name, item in RUNTIME.items()}


def test_pre_commit_uses_the_pinned_ruff():
    hooks = (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8")
    assert set(re.findall(r"ruff==([\d.]+)", hooks)) == {_pins("constraints.txt")["ruff"]}


def test_the_version_is_stated_once():
    import hf_gradnas

    assert 'dynamic = ["version"]' in PYPROJECT
    assert re.fullmatch(r"\d+\.\d+\.\d+", hf_gradnas.__version__)
    assert "hf_gradnas/__init__.py" in PYPROJECT


def test_the_package_carries_its_data_and_its_type_marker():
    assert (ROOT / "hf_gradnas" / "py.typed").is_file()
    assert '"recipes" = "hf_gradnas/recipes"' in PYPROJECT
    assert list((ROOT / "recipes").glob("*.yaml"))


def test_the_citation_names_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == hf_gradnas.__version__


def test_the_page_of_dependencies_has_each_of_them():
    page = (ROOT / "docs" / "dependencies.md").read_text(encoding="utf-8")
    section = PYPROJECT.partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    optional = {f"[{extra}]" for extra in re.findall(r"^(\w+) = \[", section, re.MULTILINE)}
    named = set(re.findall(r"`([\w\[\]-]+)`", page))
    assert {*RUNTIME} <= {canonicalize_name(name) for name in named if "[" not in name}
    assert optional - {"[dev]"} <= named
