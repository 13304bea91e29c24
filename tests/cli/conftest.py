"""What tests of commands share: a folder of their own, a small model and data in it."""

from collections.abc import Callable
from pathlib import Path

import datasets
import pytest
from cli_cases import save_bert, write_tsv


@pytest.fixture(autouse=True)
def own_folder(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Runs every test in a folder of its own, with a cache of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture
def bert(tmp_path: Path) -> Path:
    """A saved classifier."""
    return save_bert(tmp_path / "bert")


@pytest.fixture
def tsv(tmp_path: Path) -> Path:
    """Sentences with labels."""
    return write_tsv(tmp_path / "train.tsv")


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs a command; returns its exit code, standard output and standard error."""
    from hf_gradnas.cli.app import main

    def run(*arguments: object) -> tuple[int, str, str]:
        code = main(list(map(str, arguments)))
        shown = capsys.readouterr()
        assert "\x1b" not in shown.out + shown.err
        assert "Traceback" not in shown.err
        return code, shown.out, shown.err

    return run
