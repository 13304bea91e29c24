"""llama.cpp itself runs what is exported, where its wheel is installed (pip install xllamacpp)."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from gguf_cases import SPLITS, TEXT, piece_tokenizer, save_cut, save_model, split_tokenizer
from places import EXAMPLES, ROOT

pytest.importorskip("gguf")
pytest.importorskip("xllamacpp")
pytestmark = pytest.mark.long  # each case is a process of its own

SCRIPT = EXAMPLES / "interoperability" / "llama_cpp.py"
LINES = (
    TEXT,
    "I'LL  pay $1234.50, they've 12345 of'em!",
    "naïve café\tça",
    "x = [1,22];\r\n",
    "АБв 漢字",
)
COUNTS = ((0, 0, 33), (1, 1, 40), (0, 0, 0), (1, 2, 0))
BIASED = {"attention_bias": True, "mlp_bias": True}
CASES = {
    "stock": ("Llama", {}, None, None),
    "cut": ("Llama", BIASED, COUNTS, None),
    "pieces": ("Mistral", {"sliding_window": None}, COUNTS, piece_tokenizer),
    "qwen2": ("Qwen2", {}, COUNTS, None),
    "heads": ("Qwen2", {"num_attention_heads": 2, "num_key_value_heads": 2}, None, None),
    "one": ("Llama", {"num_key_value_heads": 1}, ((1, 2, 96), (0, 0, 96), *COUNTS[2:]), None),
    "qwen3": ("Qwen3", {"tie_word_embeddings": True}, None, None),
    **{name: ("Llama", {}, None, lambda name=name: split_tokenizer(name)) for name in SPLITS},
}


@pytest.mark.parametrize("name", CASES)
def test_tokens_and_probabilities_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    kind, values, counts, tokenizer = CASES[name]
    folder = save_model(tmp_path / "whole", kind, tokenizer and tokenizer(), **values)
    if counts:
        folder = save_cut(folder, tmp_path / "cut", counts)
    text = tmp_path / "text.txt"
    text.write_text("\n".join(LINES), "utf-8")
    flags = ["--types=f32", "--exact", "--new=8", "--window=48", "--windows=2"]
    command = [sys.executable, str(SCRIPT), str(folder), f"--text={text}", *flags]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    for what in ("lines with the same tokens", "that are the same"):
        found, of = re.search(rf"{what}: (\d+) of (\d+)", done.stdout).groups()
        assert found == of, done.stdout
    assert float(re.search(r"largest (\S+)", done.stdout)[1]) < 2e-4, done.stdout
