"""Local files: formats, headers, types of columns, and messages with the place of a fault."""

import csv

import pytest
from cli_cases import write_jsonl, write_tsv

from hf_gradnas.data.files import read_file
from hf_gradnas.errors import DataError


def _write(tmp_path, name, text):
    file = tmp_path / name
    file.write_text(text, encoding="utf-8")
    return file


def test_a_tsv_is_read_without_quoting(tmp_path):
    file = _write(tmp_path, "a.tsv", 'it is "good\t1\n"bad\t0\n')
    rows = read_file(file).dataset
    assert rows["text"][:] == ['it is "good', '"bad']
    assert rows["label"][:] == [1, 0]


def test_only_newlines_end_a_row(tmp_path):
    file = _write(tmp_path, "a.tsv", "a\u2028b\x0cc\t1\r\nd\t0\r\n")
    assert read_file(file).dataset["text"][:] == ["a\u2028b\x0cc", "d"]


def test_a_csv_is_read_with_quoting(tmp_path):
    file = _write(tmp_path, "a.csv", 'text,label\n"a, b\nc",1\nd,0\n')
    assert read_file(file).dataset["text"][:] == ["a, b\nc", "d"]


HEADERS = {
    "none": ("good film\t1\nbad film\t0\n", ["text", "label"]),
    "none, label first": ("1\tgood\n0\tbad\n", ["label", "text"]),
    "none, two texts": (
        "0\ta b\tc d\t1\n1\te f\tg h\t0\n",
        ["column_1", "text", "column_3", "label"],
    ),
    "none, label a word": ("good\tpos\nbad\tneg\nfine\tpos\nx\tneg\n", ["text", "label"]),
    "common names": ("sentence\tlabel\ngood\t1\n", ["sentence", "label"]),
    "other names over numbers": ("phrase\tpolarity\nso good\t1\n", ["phrase", "polarity"]),
    "other names over words": ("phrase\tkind\nso good\tx\nso bad\ty\n", ["phrase", "kind"]),
    "none, a sentence a line": ("so good\nso bad\n", ["text"]),
}


@pytest.mark.parametrize("case", HEADERS)
def test_a_header_is_detected(case, tmp_path):
    text, names = HEADERS[case]
    rows = read_file(_write(tmp_path, "a.tsv", text))
    assert rows.dataset.column_names == names
    assert bool(rows.notes) == case.startswith("none")


def test_files_of_text_keep_the_whole_text(tmp_path):
    rows = read_file(_write(tmp_path, "a.txt", "one\n\n  two\n"))
    assert rows.text == "one\n\n  two\n"
    assert rows.dataset["text"][:] == ["one", "  two"]


def test_json_in_three_shapes(tmp_path):
    records = '[{"text": "a", "label": 1}, {"text": "b"}]'
    for name, text in {
        "a.json": records,
        "b.json": f'{{"data": {records}}}',
        "c.json": '{"text": "a", "label": 1}\n{"text": "b"}\n',
    }.items():
        rows = read_file(_write(tmp_path, name, text)).dataset
        assert rows[0] == {"text": "a", "label": 1}
        assert rows[1] == {"text": "b", "label": None}


def test_parquet(tmp_path):
    write_tsv(tmp_path / "a.tsv")
    read_file(tmp_path / "a.tsv").dataset.to_parquet(str(tmp_path / "a.parquet"))
    assert len(read_file(tmp_path / "a.parquet").dataset) == 24
    (tmp_path / "b.parquet").write_bytes(b"no parquet")
    with pytest.raises(DataError, match=r"b.parquet: cannot be read as parquet \("):
        read_file(tmp_path / "b.parquet")


BAD = {
    "suffix": ("a.xyz", "x", "cannot tell the format of '.xyz'"),
    "empty tsv": ("a.tsv", "", "is empty"),
    "header only": ("a.csv", "text,label\n", "holds no example"),
    "empty txt": ("a.txt", "\n\n", "holds no example"),
    "ragged": ("a.tsv", "text\tlabel\na\t1\nb\n", "row 3 has 1 columns, the first row has 2"),
    "same names": ("a.csv", "text,text\na,b\n", "column names repeat"),
    "not json": ("a.jsonl", '{"text": 1}\n{bad\n', "line 2 is not JSON"),
    "not objects": ("a.json", "[1, 2]", "needed objects"),
    "mixed types": ("a.json", '[{"a": 1}, {"a": [2]}]', "mixes types"),
    "NUL in a csv": ("a.csv", "text,label\na\0,1\n", "the character NUL in line 2"),
    "NUL in a text": ("a.txt", "a\0", "the character NUL in line 1"),
    "quote that never ends": ("a.csv", 'text,label\n"a,1\nb,0\n', "row 2 has 1 columns"),
    "deep lists": ("a.json", "[" * 100_000, "is not JSON .it is nested too deeply"),
    "deep objects": ("a.json", '{"a":' * 100_000, "line 1 is not JSON .it is nested too deeply"),
    "deep line": ("a.jsonl", "[" * 100_000, "line 1 is not JSON .it is nested too deeply"),
    "long integer": ("a.jsonl", '{"label": 99999999999999999999}', "more than 64 bits"),
    "longer integer": ("a.json", '[{"label": ' + "9" * 5000 + "}]", "integer"),
    "same keys": ("a.jsonl", '{"a": 1}\n{"a": 1, "a": 2}\n', "line 2 .* 'a' comes twice"),
    "half a character": ("a.json", '[{"text": "\\ud800"}]', "holds what no column can"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files_are_refused(case, tmp_path):
    name, text, message = BAD[case]
    with pytest.raises(DataError, match=message):
        read_file(_write(tmp_path, name, text))


def test_other_encodings_are_refused(tmp_path):
    (tmp_path / "a.txt").write_bytes("é".encode("latin-1"))
    with pytest.raises(DataError, match="needed a UTF-8 file"):
        read_file(tmp_path / "a.txt")


def test_strings_in_a_json_list_are_texts(tmp_path):
    file = write_jsonl(tmp_path / "a.jsonl", [])
    file.write_text('"a"\n"b"\n', encoding="utf-8")
    assert read_file(file).dataset["text"][:] == ["a", "b"]


def test_cells_longer_than_the_limit_of_pythons_csv_are_read(tmp_path):
    long = "a " * 70_000
    before = csv.field_size_limit()
    for name, text in {"a.csv": f"text,label\n{long},1\n", "a.tsv": f"{long}\t1\n"}.items():
        rows = read_file(_write(tmp_path, name, text)).dataset
        assert rows["text"][:] == [long]
        assert rows["label"][:] == [1]
    assert csv.field_size_limit() == before


@pytest.mark.parametrize("name", ["a.txt", "a.csv", "a.json", "a.jsonl"])
def test_a_byte_order_mark_is_no_text(name, tmp_path):
    content = {"a.txt": "so good\n", "a.csv": "text\nso good\n"}.get(name, '{"text": "so good"}')
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + content.encode())
    assert read_file(tmp_path / name).dataset["text"][:] == ["so good"]


@pytest.mark.parametrize("cell", ["99999999999999999999", "1_0", "١", "nan", "inf", "1e999"])
def test_what_is_no_plain_number_stays_text(cell, tmp_path):
    rows = read_file(_write(tmp_path, "a.csv", f"text,id\na,{cell}\nb,1\n")).dataset
    assert rows["id"][:] == [cell, "1"]
