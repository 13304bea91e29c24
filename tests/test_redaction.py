"""What is shown and saved holds no secret, no control character and no absolute path."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import pytest

from hf_gradnas._redaction import (
    is_secret_name,
    portable,
    sayable,
    shareable,
    visible,
    without_paths,
    without_secrets,
)
from hf_gradnas.errors import CheckpointError, GradNASError, GradNASWarning, HubError, RecipeError

TOKEN = "hf_" + "aBcDeFgHiJkLmNoPqRsT0123456789abcd"
SECRET = "s3cr3tvalue99"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"401 for {TOKEN}.", "401 for hf_***."),
        (f"./{TOKEN}/model", "./hf_***/model"),
        (f"https://user:{SECRET}@host.org/a.tsv?b=1", "https://***@host.org/a.tsv?b=1"),
        (f"https://{SECRET}@host/x@y", "https://***@host/x@y"),
        (f"https://h/x?a=1&token={SECRET}&b=2", "https://h/x?a=1&token=***&b=2"),
        (f"https://h/x?X-Amz-Signature={SECRET}#f", "https://h/x?X-Amz-Signature=***#f"),
        (f"--set hub_token={SECRET}: unknown", "--set hub_token=***: unknown"),
        (f"--set token='{SECRET} x'", "--set token=***"),
        (f"HF_TOKEN={SECRET} hf-gradnas", "HF_TOKEN=*** hf-gradnas"),
        (f"MY_OWN_TOKEN: {SECRET}", "MY_OWN_TOKEN: ***"),
        (f"{{'password': '{SECRET}', 'a': 1}}", "{'password': '***', 'a': 1}"),
        (f"Authorization: Bearer {SECRET}", "Authorization: Bearer ***"),
        (f"AWS_SECRET_ACCESS_KEY={SECRET}", "AWS_SECRET_ACCESS_KEY=***"),
        ("ghp_" + "a1" * 18, "ghp_***"),
    ],
)
def test_secrets_are_hidden(text, expected):
    assert without_secrets(text) == sayable(text) == expected
    assert sayable(expected) == expected


@pytest.mark.parametrize(
    "text",
    [
        "hf_gradnas needs hf_transfer, hf_xet and ./hf_checkpoint or ./hf_classification",
        "pad_token=0, eos_token='</s>', max_new_tokens=5, num_tokens: 12, token: 3",
        "tasks are token-classification, text-generation",
        "hf://datasets/user/name@main/a.tsv and https://host/a?split=b&config=c",
        "a basic test of key=value; keys: 3, monkey=1",
        "give --dataset nyu-mll/glue:sst2, user@host",
    ],
)
def test_other_words_stay(text):
    assert sayable(text) == text


def test_the_working_folder_of_a_shell_is_no_secret(monkeypatch):
    monkeypatch.setenv("PWD", "/data/project")
    said = "/data/project/smaller: the output folder exists"
    assert without_secrets(said) == said


def test_what_the_environment_holds_of_secrets_is_hidden(monkeypatch):
    monkeypatch.setenv("SERVICE_API_KEY", "plainwords")
    monkeypatch.setenv("OWN_TOKEN", "short")
    monkeypatch.setenv("COLOUR", "ultramarine")
    text = "found plainwords, short and ultramarine"
    assert without_secrets(text) == "found ***, short and ultramarine"


def test_names_of_secrets():
    assert all(map(is_secret_name, ("token", "HF_TOKEN", "hub-token", "api_key", "db_password")))
    assert not any(map(is_secret_name, ("pad_token", "tokens", "tokenizer", "keys", "secretary")))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("\x1b[31mred\x1b[0m", "\\x1b[31mred\\x1b[0m"),
        ("a\rb\x08\x00\x9b", "a\\rb\\x08\\x00\\x9b"),
        ("\u202egpj.exe\u2066", "\\u202egpj.exe\\u2066"),
        ("\udcff\U000e0041", "\\udcff\\U000e0041"),
        ("tab\tline\nñ 日本 👩‍🔬", "tab\tline\nñ 日本 👩‍🔬"),
    ],
)
def test_control_characters_are_written_out(text, expected):
    assert visible(text) == expected


def test_absolute_paths_lose_all_but_their_end(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert portable("/data/own/x.tsv") == ".../x.tsv"
    assert portable("C:\\Users\\me\\x.tsv") == ".../x.tsv"
    assert portable(str(tmp_path / "home" / "a" / "b")) == "~/a/b"
    assert portable(str(tmp_path / "here" / "a" / "b")) == "./a/b"
    for path in ("./a/b", "../a", "a", "~/a", "user/name"):
        assert portable(path) == path
    text = "no '/data/own/x.tsv', see file:///etc/a/b (https://host/a/b, and/or ./c/d) at /a/b/c."
    assert without_paths(text) == (
        "no '.../x.tsv', see .../b (https://host/a/b, and/or ./c/d) at .../c."
    )
    assert without_paths("/data/with space/x y.tsv") == ".../x y.tsv"


@pytest.mark.parametrize("home", ["/", "/home/me"])
def test_a_root_that_is_home_names_no_path(home, monkeypatch):
    monkeypatch.setenv("HOME", home)
    monkeypatch.chdir("/")
    assert portable("/data/x.tsv") == ".../x.tsv"


def test_data_is_shareable_at_any_depth():
    given = {"a": [{"path": "/data/x.tsv", "hub_token": SECRET}, (TOKEN, 3)], "pad_token": "[PAD]"}
    expected = {"a": [{"path": ".../x.tsv", "hub_token": "***"}, ["hf_***", 3]]}
    assert shareable(given) == {**expected, "pad_token": "[PAD]"}
    assert given["a"][0]["hub_token"] == SECRET


@pytest.mark.parametrize("kind", [GradNASError, RecipeError, CheckpointError, HubError])
def test_messages_of_errors_are_sayable(kind):
    error = kind(f"--model {TOKEN}: \x1b[2J no; give /data/x.")
    assert str(error) == "--model hf_***: \\x1b[2J no; give /data/x."
    assert str(copy.copy(error)) == str(error)
    with pytest.raises(kind, match=r"hf_\*\*\*"):
        raise error


def test_and_so_are_those_of_warnings():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warnings.warn(f"{TOKEN}\r", GradNASWarning, stacklevel=1)
    assert str(caught[0].message) == "hf_***\\r"


def test_a_home_that_is_a_link_is_home(tmp_path, monkeypatch):
    (tmp_path / "real").mkdir()
    Path(tmp_path / "link").symlink_to(tmp_path / "real")
    monkeypatch.setenv("HOME", str(tmp_path / "link"))
    assert portable(str(tmp_path / "real" / "a")) == portable(str(tmp_path / "link" / "a")) == "~/a"
