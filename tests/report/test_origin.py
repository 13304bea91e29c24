"""The original's name is a Hub id or a name, never a path; its card is found where it is."""

import huggingface_hub
import pytest
from report_cases import LOADING, make_case

from hf_gradnas.report.card import make_card
from hf_gradnas.report.metadata import Origin, fetch_card, find_origin, folder_name

CARD = "---\nlicense: mit\nlanguage: en\n---\n# Card\n"


def test_a_hub_id_stays_as_it_is():
    assert find_origin("owner/name-of_it.v2") == Origin("owner/name-of_it.v2", {}, is_hub=True)
    assert find_origin("gpt2").base_model == "gpt2"
    assert find_origin("") == Origin()


def test_a_folder_gives_its_name(tmp_path):
    (tmp_path / "my bert (1)").mkdir()
    assert find_origin(str(tmp_path / "my bert (1)")) == Origin("my-bert-1")
    assert find_origin("/not/there/small-bert").base_model == "small-bert"
    assert find_origin("../run/checkpoint-500").base_model == "run"


def test_names_that_all_have_give_way_to_the_folder_above(tmp_path):
    assert folder_name(tmp_path / "run" / "checkpoint-12") == "run"
    assert folder_name(tmp_path / "demo.quickstart" / "model") == "demo"
    assert folder_name(tmp_path / "run" / "pruned") == "run"
    assert folder_name(tmp_path.joinpath("/")) is None


def test_a_card_in_the_folder_names_the_base_and_passes_on(tmp_path):
    folder = tmp_path / "bert"
    folder.mkdir()
    (folder / "README.md").write_text(CARD, encoding="utf-8")
    assert find_origin(str(folder)) == Origin("bert", {"license": "mit", "language": "en"})
    named = CARD.replace("license", "base_model: owner/big\nlicense")
    (folder / "README.md").write_text(named, encoding="utf-8")
    origin = find_origin(str(folder))
    assert (origin.base_model, origin.is_hub) == ("owner/big", True)


def test_a_folder_is_no_model_of_the_hub(tmp_path):
    """Its name may be that of another's model there, to which the Hub would link."""
    *_, summary = make_case()
    card = make_card(summary, Origin("bert"), auto_class=None, loading=LOADING)
    assert card.data.base_model is None
    assert "huggingface.co/bert" not in str(card)
    assert "bert (" in card.text


@pytest.mark.parametrize(
    "text",
    ["", "no header", "---\n- a list\n---\n", "---\na: [\n---\n", "---\nbase_model: /a/b\n---\n"],
)
def test_a_card_that_says_nothing_is_none(tmp_path, text):
    folder = tmp_path / "bert"
    folder.mkdir()
    (folder / "README.md").write_text(text, encoding="utf-8")
    assert find_origin(str(folder)).base_model == "bert"


def test_a_folder_of_the_cache_is_its_hub_id(tmp_path):
    folder = tmp_path / "models--owner--big--one" / "snapshots" / ("0" * 40)
    folder.mkdir(parents=True)
    (folder / "README.md").write_text(CARD, encoding="utf-8")
    origin = find_origin(str(folder))
    assert (origin.base_model, origin.is_hub) == ("owner/big--one", True)
    assert origin.metadata["license"] == "mit"


def test_the_card_of_a_hub_id_comes_from_the_cache(tmp_path, monkeypatch):
    card = tmp_path / "README.md"
    card.write_text(CARD, encoding="utf-8")
    asked = []

    def cached(*arguments, **options):
        asked.append((arguments, options))
        return str(card)

    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", cached)
    assert find_origin("owner/name", revision="v1").metadata["license"] == "mit"
    assert asked == [(("owner/name", "README.md"), {"revision": "v1"})]


def test_the_card_is_fetched_only_from_the_hub_and_may_be_missing(tmp_path, monkeypatch):
    asked = []

    def download(*arguments, **options):
        asked.append(arguments)
        raise huggingface_hub.errors.LocalEntryNotFoundError("no network")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    fetch_card(str(tmp_path))
    fetch_card("/not/there")
    assert not asked
    fetch_card("owner/name")
    assert asked == [("owner/name", "README.md")]


def test_the_user_is_no_origin(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "alice"))
    assert folder_name(tmp_path / "alice" / "model") is None
    assert folder_name(tmp_path / "alice" / "own" / "model") == "own"
    assert folder_name(tmp_path / "bob" / "model") == "bob"


def test_an_origin_in_a_folder_that_looks_like_the_cache_is_no_link(tmp_path):
    folder = tmp_path / "models--a--b](http:" / "snapshots" / ("0" * 40)
    folder.mkdir(parents=True)
    assert not find_origin(str(folder)).is_hub


def test_the_originals_card_passes_no_secret_and_no_path_on(tmp_path):
    folder = tmp_path / "own"
    folder.mkdir()
    text = "---\nlicense: mit\nlicense_link: https://u:p@h/x?token=abc\ntags: [/data/a/b]\n---\n"
    (folder / "README.md").write_text(text, encoding="utf-8")
    assert find_origin(str(folder)).metadata == {
        "license": "mit",
        "license_link": "https://***@h/x?token=***",
        "tags": [".../b"],
    }
