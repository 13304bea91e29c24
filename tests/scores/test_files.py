"""Scores in files: they come back as they were, go on where they broke off, and fit one model."""

from __future__ import annotations

import json
import logging
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
import zoo
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save_file
from score_examples import build, examples_of, in_batches

from hf_gradnas.errors import DataError, GradNASWarning, ScoresError
from hf_gradnas.scores import check_scores, collect_scores, model_fingerprint
from hf_gradnas.types import Scores, plans

BATCHES = in_batches(examples_of("bert", 20), 4)


def _interrupted(batches, after: int):
    yield from batches[:after]
    raise KeyboardInterrupt


def _interrupt(file: Path, model, axes, batches=BATCHES, after: int = 3, **settings) -> None:
    with pytest.raises(KeyboardInterrupt):
        collect_scores(model, axes, _interrupted(batches, after), file=file, **settings)


def _assert_same(found: Scores, expected: Scores) -> None:
    assert found.metadata == expected.metadata
    assert list(found.values) == list(expected.values)
    for name, values in expected.values.items():
        assert np.array_equal(found.values[name], values), name


def test_a_file_holds_one_tensor_per_axis_and_all_else_in_its_metadata(tmp_path: Path) -> None:
    model, axes, _ = build("bert")
    file = tmp_path / "new" / "scores.safetensors"
    scores = collect_scores(model, axes, BATCHES, file=file, num_examples=10)
    _assert_same(Scores.load(file), scores)
    assert load_file(file).keys() == {axis.name for axis in axes}
    assert all(values.dtype == np.float64 for values in scores.values.values())
    assert [path.name for path in file.parent.iterdir()] == [file.name]
    expected = {
        "batches": "3",
        "complete": "true",
        "examples": "10",
        "labels": "data",
        "mask_place": "out_projection_input",
        "method": "fisher",
        "model_fingerprint": model_fingerprint(model),
        "normaliser": "examples",
        "seed": "None",
    }
    assert expected.items() <= scores.metadata.items()
    assert json.loads(scores.metadata["settings"])["num_examples"] == 10
    assert scores.metadata["torch_version"] == torch.__version__
    assert all(isinstance(value, str) for value in scores.metadata.values())
    check_scores(scores, model, axes)


@pytest.mark.parametrize(
    "settings",
    [{}, {"method": "gradnas"}, {"labels": "model", "seed": 3}, {"num_examples": 18}],
    ids=str,
)
@pytest.mark.parametrize("after", [1, 4])
def test_a_resumed_pass_is_bit_equal_to_one_in_one_go(tmp_path, settings, after: int) -> None:
    model, axes, _ = build("bert")
    expected = collect_scores(model, axes, BATCHES, **settings)
    file = tmp_path / "scores.safetensors"
    _interrupt(file, model, axes, after=after, **settings)
    unfinished = Scores.load(file)
    assert unfinished.metadata["complete"] == "false"
    assert unfinished.metadata["batches"] == str(after)
    calls = []
    handle = model.register_forward_hook(lambda *_: calls.append(1))
    found = collect_scores(model, axes, iter(BATCHES), file=file, **settings)
    handle.remove()
    assert len(calls) == len(BATCHES) - after  # neither the old batches nor the normaliser again
    _assert_same(found, expected)
    _assert_same(Scores.load(file), expected)


def test_complete_scores_are_returned_without_scoring(tmp_path: Path, caplog) -> None:
    model, axes, _ = build("bert")
    file = tmp_path / "scores.safetensors"
    expected = collect_scores(model, axes, BATCHES, file=file)
    handle = model.register_forward_hook(lambda *_: pytest.fail("the model ran"))
    _assert_same(collect_scores(model, axes, BATCHES, file=file), expected)
    handle.remove()
    assert not caplog.records


def test_a_pass_is_saved_now_and_then(tmp_path: Path) -> None:
    model, axes, _ = build("bert")
    file = tmp_path / "scores.safetensors"
    seen = []

    def batches():
        for batch in BATCHES:
            seen.append(Scores.load(file).metadata["batches"] if file.exists() else "none")
            yield batch

    collect_scores(model, axes, batches(), file=file, save_every_s=0.0)
    assert seen == ["none", "1", "2", "3", "4"]


def test_nothing_is_written_before_the_first_batch_or_without_a_file(tmp_path: Path) -> None:
    model, axes, _ = build("bert")
    file = tmp_path / "scores.safetensors"
    _interrupt(file, model, axes, after=0)
    assert not file.exists()
    with pytest.raises(KeyboardInterrupt):
        collect_scores(model, axes, _interrupted(BATCHES, 2))


def test_another_model_setting_or_data_set_starts_over_and_says_why(tmp_path, caplog) -> None:
    model, axes, _ = build("bert")
    file = tmp_path / "scores.safetensors"
    other = zoo.build("bert", seed=1)[0]
    for run, reason in (
        (lambda: collect_scores(other, axes, BATCHES, file=file), "of another model"),
        (
            lambda: collect_scores(model, axes, BATCHES, file=file, method="taylor"),
            "of another method",
        ),
        (lambda: collect_scores(model, axes[1:], BATCHES, file=file), "of another axes"),
        (lambda: collect_scores(model, axes, BATCHES[1:], file=file), "of other data"),
        (lambda: collect_scores(model, axes, BATCHES[:2], file=file), "of other data"),
    ):
        _interrupt(file, model, axes, resume=False)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            found = run()
        assert reason in caplog.text
        assert "starts over" in caplog.text
        _assert_same(Scores.load(file), found)
    collect_scores(model, axes, BATCHES[:4], file=file)
    caplog.clear()
    longer = collect_scores(model, axes, BATCHES, file=file)
    assert "of other data" in caplog.text
    _assert_same(longer, collect_scores(model, axes, BATCHES))


def test_resume_can_be_switched_off(tmp_path: Path, caplog) -> None:
    model, axes, _ = build("bert")
    file = tmp_path / "scores.safetensors"
    _interrupt(file, model, axes, method="taylor")
    found = collect_scores(model, axes, BATCHES, file=file, resume=False)
    _assert_same(Scores.load(file), found)
    assert not caplog.records


@pytest.mark.parametrize("resume", [True, False])
@pytest.mark.parametrize("method", ["fisher", "magnitude"])
def test_what_holds_no_scores_is_never_replaced(tmp_path: Path, method, resume) -> None:
    model, axes, _ = build("bert")
    never = _interrupted(BATCHES, 0)
    file = tmp_path / "notes.txt"
    file.write_bytes(b"mine")
    for place in (file, tmp_path):
        with pytest.raises(ScoresError, match=r"cannot be (written|read) \("):
            collect_scores(model, axes, never, file=place, method=method, resume=resume)
    weights = tmp_path / "model.safetensors"
    save_file({"a": np.zeros(2)}, weights, metadata={"format": "pt"})
    before = weights.read_bytes()
    with pytest.raises(ScoresError, match=r"holds something else|format_version None"):
        collect_scores(model, axes, never, file=weights, method=method, resume=resume)
    assert file.read_bytes() == b"mine"
    assert weights.read_bytes() == before


def test_batches_that_can_be_read_once_cannot_start_over(tmp_path: Path) -> None:
    model, axes, _ = build("bert")
    file = tmp_path / "scores.safetensors"
    _interrupt(file, model, axes)
    before = file.read_bytes()
    with pytest.raises(ScoresError, match="since a list_iterator can be read only once"):
        collect_scores(model, axes, iter(BATCHES[1:]), file=file)
    assert file.read_bytes() == before


def test_a_failed_pass_leaves_the_file_alone(tmp_path: Path) -> None:
    model, axes, _ = build("bert")
    file = tmp_path / "scores.safetensors"
    _interrupt(file, model, axes)
    before = file.read_bytes()
    with pytest.raises(DataError, match="Batch 3 is a str"):
        collect_scores(model, axes, [*BATCHES[:3], "text"], file=file)
    assert file.read_bytes() == before


@pytest.mark.parametrize("damage", ["cut", "garbage", "missing", "other"])
def test_a_damaged_file_is_named(tmp_path: Path, damage: str) -> None:
    model, axes, _ = build("bert")
    file = tmp_path / "scores.safetensors"
    collect_scores(model, axes, BATCHES, file=file)
    content = file.read_bytes()
    if damage == "missing":
        file.unlink()
    elif damage == "other":
        save_file({"a": np.zeros(2)}, file)
    else:
        file.write_bytes(content[:-8] if damage == "cut" else b"garbage" * 100)
    message = "format_version None, needed '1'" if damage == "other" else "cannot be read"
    with pytest.raises(ScoresError, match=rf"scores\.safetensors .*{message}"):
        Scores.load(file)
    if damage != "missing":
        before = file.read_bytes()
        with pytest.raises(ScoresError, match=message):
            collect_scores(model, axes, BATCHES, file=file)
        assert file.read_bytes() == before


def test_changed_values_or_settings_are_noticed(tmp_path: Path) -> None:
    model, axes, _ = build("bert")
    file = tmp_path / "scores.safetensors"
    scores = collect_scores(model, axes, BATCHES, file=file)
    with safe_open(file, framework="numpy") as opened:
        metadata = opened.metadata()
    values = load_file(file)
    name = axes[0].name
    for changed, said in (
        ({name: values[name] * 2}, metadata),
        ({name: values[name][::-1].copy()}, metadata),
        ({"other": values[name]}, metadata),
        ({}, {**metadata, "examples": "21"}),
    ):
        save_file({**values, **changed}, file, metadata=said)
        with pytest.raises(ScoresError, match="was changed since it was written"):
            Scores.load(file)
        with pytest.raises(ScoresError, match="was changed since it was written"):
            collect_scores(model, axes, _interrupted(BATCHES, 0), file=file)
    save_file(values, file, metadata={k: v for k, v in metadata.items() if k != "sha256"})
    _assert_same(Scores.load(file), scores)  # as version 0.1 wrote them


class _FullDisk:
    """Lets the first writes through; the rest fail half done, as on a full disk."""

    def __init__(self, monkeypatch, allowed: int) -> None:
        self.left, self.save = allowed, plans.save_file
        monkeypatch.setattr(plans, "save_file", self)

    def __call__(self, tensors, path, metadata):
        self.left -= 1
        if self.left < 0:
            Path(path).write_bytes(b"half")
            raise SafetensorError("I/O error: No space left on device (os error 28)")
        self.save(tensors, path, metadata=metadata)


def test_a_write_that_fails_while_scoring_is_one_warning(tmp_path, monkeypatch) -> None:
    model, axes, _ = build("bert")
    file = tmp_path / "scores.safetensors"
    expected = collect_scores(model, axes, BATCHES)
    disk = _FullDisk(monkeypatch, 1)

    def batches():
        for number, batch in enumerate(BATCHES):
            if number == len(BATCHES) - 1:
                disk.left = 9  # somebody freed some space
            yield batch

    with pytest.warns(GradNASWarning, match=r"No space left.*Scoring goes on") as caught:
        found = collect_scores(model, axes, batches(), file=file, save_every_s=0.0)
    assert len(caught) == 1
    _assert_same(found, expected)
    _assert_same(Scores.load(file), expected)


def test_a_final_write_that_fails_is_an_error_and_keeps_the_old_file(tmp_path, monkeypatch) -> None:
    model, axes, _ = build("bert")
    file = tmp_path / "scores.safetensors"
    _interrupt(file, model, axes)
    before = file.read_bytes()
    _FullDisk(monkeypatch, 0)
    with pytest.raises(ScoresError, match=r"cannot be written \(I/O error: No space left"):
        collect_scores(model, axes, BATCHES, file=file)
    with (
        pytest.warns(GradNASWarning, match="No space left"),
        pytest.raises(KeyboardInterrupt),
    ):
        collect_scores(model, axes, _interrupted(BATCHES, 4), file=file)
    assert file.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


def _terminated(batches, after: int):
    yield from batches[:after]
    signal.raise_signal(signal.SIGTERM)
    yield from batches[after:]


def test_sigterm_keeps_the_scores_as_ctrl_c_does(tmp_path: Path) -> None:
    model, axes, _ = build("bert")
    file = tmp_path / "scores.safetensors"
    with pytest.raises(SystemExit) as stopped:
        collect_scores(model, axes, _terminated(BATCHES, 3), file=file)
    assert stopped.value.code == 143
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert Scores.load(file).metadata["batches"] == "3"
    _assert_same(
        collect_scores(model, axes, BATCHES, file=file), collect_scores(model, axes, BATCHES)
    )


def test_a_program_that_handles_sigterm_goes_on_doing_so(tmp_path: Path) -> None:
    model, axes, _ = build("bert")
    file = tmp_path / "scores.safetensors"
    calls = []

    def own(number, frame):
        calls.append(number)

    previous = signal.signal(signal.SIGTERM, own)
    try:
        collect_scores(model, axes, _terminated(BATCHES, 3), file=file)
        assert signal.getsignal(signal.SIGTERM) is own
    finally:
        signal.signal(signal.SIGTERM, previous)
    assert calls == [signal.SIGTERM]
    assert Scores.load(file).metadata["complete"] == "true"


def test_a_file_that_cannot_be_written_fails_before_scoring(tmp_path: Path) -> None:
    model, axes, _ = build("bert")
    (tmp_path / "file").write_text("")
    with pytest.raises(ScoresError, match="cannot be written"):
        collect_scores(model, axes, _interrupted(BATCHES, 0), file=tmp_path / "file" / "scores")


def test_scores_fit_one_model_and_its_axes() -> None:
    model, axes, _ = build("bert")
    scores = collect_scores(model, axes, BATCHES)
    other = zoo.build("bert", seed=1)[0]
    with pytest.raises(ScoresError, match="they belong to another model"):
        check_scores(scores, other, axes)
    name = axes[0].name
    fewer = Scores({k: v for k, v in scores.values.items() if k != name}, scores.metadata)
    with pytest.raises(ScoresError, match=rf"{name}: the scores hold none .*needed \(4,\)"):
        check_scores(fewer, model, axes)
    narrow = Scores({**scores.values, name: np.zeros(3)}, scores.metadata)
    with pytest.raises(ScoresError, match=rf"{name}: the scores hold \(3,\) .*needed \(4,\)"):
        check_scores(narrow, model, axes)
    partial = Scores(scores.values, {**scores.metadata, "complete": "false"})
    with pytest.raises(ScoresError, match="scoring broke off after 20 examples"):
        check_scores(partial, model, axes)


def test_a_fingerprint_sees_every_parameter_its_dtype_and_its_values() -> None:
    model, _ = zoo.build("bert")
    before = model_fingerprint(model)
    assert model_fingerprint(zoo.build("bert")[0]) == before
    assert model_fingerprint(zoo.build("bert", dtype=torch.bfloat16)[0]) != before
    with torch.no_grad():
        for parameter in model.parameters():
            first = parameter.flatten()[0].clone()
            parameter.flatten()[0] += 1e-3
            assert model_fingerprint(model) != before
            parameter.flatten()[0] = first
    assert model_fingerprint(model) == before
