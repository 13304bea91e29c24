"""Snippets of README and docs run, command lines parse, links lead to files, tables are current."""

import importlib.util
import re
import shlex
import sys
import textwrap
from itertools import chain, pairwise

import datasets
import pytest
import typer
import yaml
from accelerate.state import AcceleratorState, GradientState
from doc_scenes import CLASSIFIER, STORIES, keep_to_yourself, scene_for, write_files
from places import ROOT

import hf_gradnas
from hf_gradnas import nas, repair
from hf_gradnas.cli.app import app, given_flags, main
from hf_gradnas.config.plans import Plans
from hf_gradnas.config.recipe_files import build_options, build_recipe, shipped_recipes
from hf_gradnas.config.sweep import Sweep
from hf_gradnas.scores import methods

DOCS = ROOT / "docs"
PAGES = {page.name: page.read_text(encoding="utf-8") for page in sorted(DOCS.glob("*.md"))}
ALL = {"README.md": (ROOT / "README.md").read_text(encoding="utf-8"), **PAGES}
ELSEWHERE = {"migration.md"}  # run by test_migration.py
COMMANDS = typer.main.get_command(app).commands
LEAVES = [
    leaf for each in COMMANDS.values() for leaf in getattr(each, "commands", {"": each}).values()
]
FOREIGN_FLAGS = {"--cpu", "--index-url", "--strict", "--model-impl"}  # of other tools


def fences(text, language):
    """``(line, code)`` of every block of a language, also of indented ones."""
    found = re.finditer(rf"^( *)```{language}\n(.*?)^\1```$", text, re.DOTALL | re.MULTILINE)
    return [(text[: m.start()].count("\n") + 1, textwrap.dedent(m[2])) for m in found]


def stories():
    """What runs in one namespace: all blocks of a page that tells a story, else one block."""
    for page, text in ALL.items():
        blocks = fences(text, "python") if page not in ELSEWHERE else []
        groups = [blocks] if page in STORIES else [[block] for block in blocks]
        for group in filter(None, groups):
            yield pytest.param(page, group, id=f"{page}:{group[0][0]}")


@pytest.fixture
def own_folder(tmp_path, monkeypatch):
    """An empty working folder, and package state that is put back."""
    keep_to_yourself(monkeypatch, tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    before = [(table, dict(table)) for table in (methods.METHODS, methods.GRADIENT_METHODS)]
    yield tmp_path
    for table, entries in before:
        table.clear()
        table.update(entries)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.mark.parametrize(("page", "blocks"), list(stories()))
def test_python_blocks_run(page, blocks, own_folder):
    space = {"__name__": "snippet", **scene_for(page, blocks[0][1])}
    for line, code in blocks:
        # Line numbers of errors are those of the page.
        exec(compile("\n" * line + code, page, "exec"), space)


def test_all_blocks_are_seen():
    for page, text in ALL.items():
        seen = sum(len(fences(text, language)) for language in ("python", "py", "bash", "yaml"))
        assert text.count("```") == 2 * seen, f"{page} has a block of another language"


def commands(text):
    """Word lists of all commands in the bash blocks of a page."""
    for _, code in fences(text, "bash"):
        for line in code.replace("\\\n", " ").splitlines():
            for part in line.split(" && "):
                if words := shlex.split(part, comments=True):
                    yield words


def own_command(words):
    """Arguments of the command line if it runs this package, behind any launcher; else None."""
    if words[0] == "hf-gradnas":
        return words[1:]
    for flag, module in pairwise(words):
        if flag == "-m" and module.startswith("hf_gradnas."):
            assert importlib.util.find_spec(module)
            return [module.partition(".")[2], *words[words.index(module) + 1 :]]
    return None


OWN = {
    page: [found for words in commands(text) if (found := own_command(words)) is not None]
    for page, text in ALL.items()
}


@pytest.mark.parametrize("page", [page for page, found in OWN.items() if found])
def test_command_lines_parse(page):
    for name, *arguments in OWN[page]:
        group = getattr(COMMANDS[name], "commands", None)
        command = group[arguments.pop(0)] if group else COMMANDS[name]
        options = command.make_context(name, arguments).params
        if name == "prune":
            file, settings = options.pop("recipe"), options.pop("settings") or []
            if file is None or file in shipped_recipes():
                build_recipe(given_flags(options), settings=settings, file=file)
        elif name == "sweep":
            build_options(Sweep, given_flags({key: options.pop(key) for key in Sweep.model_fields}))
            build_recipe(given_flags(options))
        elif name == "plan":
            options.pop("file")
            build_options(Plans, given_flags({key: options.pop(key) for key in Plans.model_fields}))
            build_recipe({"model": "none", **given_flags(options)})


def test_commands_on_files_run(own_folder, capsys):
    write_files()
    done = []
    for command in chain.from_iterable(OWN.values()):
        # `verify` starts processes, for which test_cli_verify.py has the time.
        is_ready = f"./{CLASSIFIER}" in command or command[0] == "plan"
        if is_ready and command not in done:
            more = ["--overwrite"] if command[0] == "prune" else []
            if command[0] == "sweep":  # repairs are those of prune, one for each plan
                more += ["--repair", "none"]
            if done:  # one report is enough
                more += ["--no-report"] if command[0] == "prune" else []
            assert main([*command, *more]) == 0, (command, capsys.readouterr())
            done.append(command)
    ran = {command[0] for command in done}
    assert ran == {"prune", "inspect", "sweep", "score", "plan", "repair", "apply"}


def scripts_of(page):
    """Scripts of this repository that the commands of a page name."""
    words = chain.from_iterable(commands(ALL[page]))
    return [word for word in words if word.startswith(("examples/", "docs/"))]


@pytest.mark.parametrize("page", ALL)
def test_scripts_that_commands_name_are_there(page):
    assert [script for script in scripts_of(page) if not (ROOT / script).is_file()] == []


@pytest.mark.parametrize("page", ALL)
def test_flags_in_the_text_exist(page):
    prose = re.sub(r"```.*?```", "", ALL[page], flags=re.DOTALL)
    parameters = chain.from_iterable(command.params for command in LEAVES)
    known = chain.from_iterable((*p.opts, *p.secondary_opts) for p in parameters)
    scripts = [(ROOT / script).read_text(encoding="utf-8") for script in scripts_of(page)]
    own = chain.from_iterable(re.findall(r'"(--[a-z][a-z-]*)"', script) for script in scripts)
    used = re.findall(r"`(--[a-z][a-z-]*)(?![\w…-])", prose)
    assert set(used) <= {*known, *own, *FOREIGN_FLAGS, "--help"}


@pytest.mark.parametrize("page", ALL)
def test_links_lead_to_files(page):
    folder = ROOT if page == "README.md" else DOCS
    targets = re.findall(r"\]\((?!https?:|#)([^)#]+)", ALL[page])
    assert [target for target in targets if not (folder / target).exists()] == []


def test_every_page_is_in_the_navigation():
    def leaves(entry):
        if isinstance(entry, str):
            return [entry]
        return [
            leaf
            for part in (entry.values() if isinstance(entry, dict) else entry)
            for leaf in leaves(part)
        ]

    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    assert sorted(leaves(config["nav"])) == sorted(PAGES)


def test_the_recipe_page_has_the_fields_and_the_recipes():
    spec = importlib.util.spec_from_file_location("recipe_tables", DOCS / "recipe_tables.py")
    tables = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tables)
    current = tables.with_tables(PAGES["recipes.md"])
    assert PAGES["recipes.md"] == current, "run: python docs/recipe_tables.py"
    assert "`batch_size`" in current
    assert "`quickstart`" in current


@pytest.mark.parametrize("module", [hf_gradnas, nas, repair], ids=lambda module: module.__name__)
def test_the_api_page_has_every_public_name(module):
    entries = re.findall(r"^::: ([\w.]+)$", PAGES["api.md"], re.MULTILINE)
    names = {entry.rpartition(".")[2] for entry in entries} | {"__version__"}
    errors = {"GradNASError", "GradNASWarning"}  # with their module
    assert set(module.__all__) <= names | errors
    for entry in entries:
        owner, _, name = entry.rpartition(".")
        assert entry in sys.modules or hasattr(importlib.import_module(owner), name)
