"""README's commands are those that CI runs, and what it names exists."""

import ast
import re
import subprocess

import pytest
from places import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
SETUP = "python -m venv .venv && . .venv/bin/activate && pip install -c constraints.txt"
COMMANDS = {
    "main": f"{SETUP} . && python -m hf_gradnas.prune --recipe quickstart",
    "tests": f"{SETUP} -e '.[dev]' && python -m pytest",
}


@pytest.mark.parametrize("name", COMMANDS)
def test_the_readme_has_the_command_below_its_marker(name):
    assert f"<!-- ci: {name} -->\n```bash\n{COMMANDS[name]}\n```\n" in README


@pytest.mark.parametrize("name", COMMANDS)
def test_ci_extracts_exactly_that_command(name):
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    function = re.search(r"^readme_command\(\) \{\n.*?^\}\n", script, re.DOTALL | re.MULTILINE)
    assert function
    shell = f"{function.group()}readme_command {name}"
    found = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", shell], cwd=ROOT, capture_output=True, check=True
    )
    assert found.stdout.decode().strip() == COMMANDS[name]
    assert f'"$(readme_command {name})"' in script


def test_ci_lints_before_the_tests_and_ends_with_them():
    lines = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    order = [lines.index(line) for line in ("ruff check .", "ruff format --check .", "mypy")]
    assert order == sorted(order)
    assert lines[-1] == "python -m pytest"
    assert COMMANDS["tests"].endswith(f" && {lines[-1]}")


def test_the_hub_command_follows_the_two_commands():
    hub = "python -m hf_gradnas.prune --model bert-base-uncased\n"
    positions = [README.index(text) for text in (COMMANDS["main"], COMMANDS["tests"], hub)]
    assert positions == sorted(positions)


def test_every_flag_in_the_readme_is_a_field_of_the_recipe():
    from hf_gradnas.config.recipe import Recipe
    from hf_gradnas.config.sweep import Sweep

    flags = set(re.findall(r"(?<![\w-])--([a-z][a-z-]+)", README))
    others = {"recipe", "set", "help", "index-url", "json", "no-weights", *Sweep.model_fields}
    names = {flag.removeprefix("no-").replace("-", "_") for flag in flags - others}
    assert names <= set(Recipe.model_fields)


def test_it_is_short():
    assert len(README.split()) <= 900


def test_links_lead_to_files():
    targets = re.findall(r"\]\((?!https?:)([^)#]+)\)", README)
    assert targets
    assert [target for target in targets if not (ROOT / target).exists()] == []


def test_python_snippets_are_python():
    snippets = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert snippets
    for snippet in snippets:
        ast.parse(snippet)
