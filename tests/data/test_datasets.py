"""Files, folders and the Hub as data sets."""

import gc

import datasets
import pytest
from cli_cases import write_images, write_jsonl, write_tsv, write_wave

from hf_gradnas.data.datasets import BUNDLED, bundled_text, open_bundled, open_dataset
from hf_gradnas.errors import DataError


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)


def _open(path, split="train", **options):
    return open_dataset(str(path), split=split, seed=0, **options)


def test_the_bundled_text_is_there():
    rows = open_bundled()
    assert rows.origin == BUNDLED
    assert rows.text == bundled_text()
    assert 100_000 < len(rows.text.encode()) < 150_000
    assert rows.dataset[0] == {"text": "First Citizen:"}


def test_a_file_keeps_its_order_unless_shuffled(tmp_path):
    file = write_tsv(tmp_path / "a.tsv")
    texts = _open(file).dataset["text"][:]
    shuffled = _open(file, shuffle=True).dataset["text"][:]
    assert texts != shuffled
    assert sorted(texts) == sorted(shuffled)
    assert shuffled == _open(file, shuffle=True).dataset["text"][:]


def test_a_folder_of_files_is_searched_for_the_split(tmp_path):
    write_tsv(tmp_path / "train.tsv", 4)
    write_tsv(tmp_path / "dev.tsv", 6)
    assert len(_open(tmp_path).dataset) == 4
    assert len(_open(tmp_path, "validation").dataset) == 6
    with pytest.raises(DataError, match=r"found dev.tsv, train.tsv, needed one file for split 'te"):
        _open(tmp_path, "test")


def test_a_saved_data_set_is_read(tmp_path):
    rows = _open(write_tsv(tmp_path / "a.tsv", 4)).dataset
    rows.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": rows, "dev": rows.select([0])}).save_to_disk(tmp_path / "two")
    assert len(_open(tmp_path / "one").dataset) == 4
    assert len(_open(tmp_path / "two", "validation").dataset) == 1
    with pytest.raises(DataError, match="has no split 'test', found train, dev"):
        _open(tmp_path / "two", "test")


def test_a_damaged_saved_data_set_is_refused(tmp_path):
    (tmp_path / "dataset_info.json").write_text("{}", encoding="utf-8")
    with pytest.raises(DataError, match="cannot be read as a saved data set"):
        _open(tmp_path)


def test_a_split_that_was_asked_for_is_no_other(tmp_path):
    (tmp_path / "files").mkdir()
    write_jsonl(tmp_path / "files" / "data.jsonl", [{"text": "a"}])
    assert len(_open(tmp_path / "files").dataset) == 1
    with pytest.raises(DataError, match=r"found data.jsonl, needed one file for split 'train'"):
        _open(tmp_path / "files", exact=True)
    rows = datasets.Dataset.from_dict({"text": ["a"]})
    rows.save_to_disk(str(tmp_path / "one"))
    assert len(_open(tmp_path / "one").dataset) == 1
    with pytest.raises(DataError, match="is one saved data set, without splits; omit 'train'"):
        _open(tmp_path / "one", exact=True)
    datasets.DatasetDict({"odd": rows}).save_to_disk(str(tmp_path / "lone"))
    assert len(_open(tmp_path / "lone").dataset) == 1
    with pytest.raises(DataError, match="has no split 'train', found odd"):
        _open(tmp_path / "lone", exact=True)


def test_folders_of_images_are_classes(tmp_path):
    rows = _open(write_images(tmp_path / "animals"), "validation").dataset
    assert rows["label"] == ["cat"] * 4 + ["dog"] * 4  # names: their alphabet means nothing
    assert rows[0]["image"].size == (24, 20)


def test_the_hub_is_streamed_only_as_far_as_needed(tmp_path, monkeypatch):
    file = write_jsonl(tmp_path / "a.jsonl", [{"text": f"t{i}", "label": i} for i in range(9)])
    asked = []
    load = datasets.load_dataset

    def fake(path, config, *, split, streaming):
        asked.append((path, config, split, streaming))
        return load("json", data_files=str(file), split="train", streaming=streaming)

    monkeypatch.setattr(datasets, "load_dataset", fake)
    assert len(_open("nyu-mll/glue:sst2", take=3).dataset) == 3
    assert len(_open("nyu-mll/glue:sst2", take=3, shuffle=True).dataset) == 9
    assert asked == [
        ("nyu-mll/glue", "sst2", "train", True),
        ("nyu-mll/glue", "sst2", "train", False),
    ]


def test_what_is_not_there_is_named(tmp_path):
    with pytest.raises(DataError, match="there is no such file or folder"):
        _open("./nothing.tsv")
    with pytest.raises(DataError, match="neither a local path nor a data set that could be opened"):
        _open("nobody/nothing:config")
    with pytest.raises(DataError, match="no data file, image or audio file"):
        _open(tmp_path)


def test_folders_of_sound_are_read_without_a_codec(tmp_path):
    (tmp_path / "yes").mkdir()
    (tmp_path / "no").mkdir()
    files = {str(write_wave(tmp_path / name / "a.wav")): name for name in ("yes", "no")}
    rows = _open(tmp_path).dataset
    found = {row["audio"]["path"]: row["label"] for row in rows}
    assert found == files
    assert isinstance(rows.features["audio"], datasets.Audio)


def test_sounds_with_their_texts_are_read(tmp_path):
    write_wave(tmp_path / "a.wav")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.wav", "text": "a word"}\n')
    (row,) = _open(tmp_path).dataset
    assert (row["text"], row["audio"]["path"]) == ("a word", str(tmp_path / "a.wav"))


def test_what_datasets_cannot_make_is_an_error_that_says_why(tmp_path):
    write_wave(tmp_path / "a.wav")
    lines = ['{"file_name": "a.wav", "text": "a word"}', '{"file_name": "a.wav", "text": [1]}']
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    with pytest.raises(DataError, match="cannot be read as a folder of audio files"):
        _open(tmp_path)


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # `datasets` leaves the file open
def test_a_broken_image_folder_is_refused(tmp_path):
    write_images(tmp_path / "a")
    (tmp_path / "a" / "metadata.csv").write_text("wrong,columns\n1,2\n", encoding="utf-8")
    with pytest.raises(DataError, match="cannot be read as a folder of image files"):
        _open(tmp_path / "a")
    gc.collect()


def test_no_example_is_refused(monkeypatch):
    empty = datasets.Dataset.from_dict({"text": []})
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: empty)
    with pytest.raises(DataError, match="nobody/empty: holds no example"):
        _open("nobody/empty")
