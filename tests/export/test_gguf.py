"""GGUF files hold what checkpoints hold, as llama.cpp reads it; what it cannot run is refused."""

from __future__ import annotations

import json
import re
from importlib import util
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from gguf_cases import (
    SPLITS,
    TEXT,
    byte_tokenizer,
    logits_of,
    piece_tokenizer,
    save_cut,
    save_model,
    split_tokenizer,
)
from safetensors.torch import load_file, save_file

from hf_gradnas.cli.app import main
from hf_gradnas.errors import CheckpointError
from hf_gradnas.export import export_gguf, numbers
from hf_gradnas.export import gguf as exporting

gguf = pytest.importorskip("gguf")

# KV groups, heads in each of them, neurons: the first layer and the last lost sub-layers, too.
COUNTS = ((0, 0, 33), (1, 1, 40), (2, 2, 96), (0, 0, 0), (1, 2, 0))
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
}  # fmt: skip
BIASED = {"attention_bias": True, "mlp_bias": True}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """A Llama, and the same after a cut with a count of its own in every layer."""
    base = tmp_path_factory.mktemp("llama")
    llama = save_model(base / "whole", num_hidden_layers=len(COUNTS))
    return {"llama": llama, "deci": save_cut(llama, base / "cut", COUNTS)}


@pytest.fixture
def copied(folders, tmp_path):
    """A copy of the Llama that may be changed."""
    folder = tmp_path / "copied"
    folder.mkdir()
    for path in folders["llama"].iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def fields_of(file: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in gguf.GGUFReader(file).fields.items()}


def edit(folder: Path, name: str, **changes: Any) -> None:
    path = folder / name
    content = {**json.loads(path.read_text("utf-8")), **changes}
    path.write_text(json.dumps(content), "utf-8")


def check_logits(folder: Path, file: Path) -> None:
    """Check that the file computes what the checkpoint does."""
    model = tf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    ids = tf.AutoTokenizer.from_pretrained(folder)(TEXT)["input_ids"]
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0]
    assert (logits_of(file, ids) - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.parametrize("kind", ["llama", "deci"])
def test_tensors_are_those_of_the_checkpoint_with_the_halves_of_heads_interleaved(
    kind, folders, tmp_path
):
    found = export_gguf(folders[kind], tmp_path / "x.gguf", type="f32")
    assert (found.architecture, found.notes, found.fallen_back) == (kind, (), ())
    held = {t.name: torch.from_numpy(t.data.copy()) for t in gguf.GGUFReader(found.file).tensors}
    assert found.tensors == len(held)
    stored = load_file(folders[kind] / "model.safetensors")
    seen = set()
    for name, tensor in stored.items():
        layer, _, own = name.removeprefix("model.layers.").partition(".")
        names = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}
        inner = {
            "q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output",
            "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
            "gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down",
        }  # fmt: skip
        part = name.split(".")[-2]
        target = f"blk.{layer}.{inner[part]}.weight" if part in inner else f"{names[part]}.weight"
        if target not in held:
            assert own == "input_layernorm.weight"  # of an attention that was removed
            continue
        seen.add(target)
        expected = tensor.clone()
        if part in ("q_proj", "k_proj"):
            for row in range(len(tensor)):
                head, place = divmod(row, 16)
                half, at = divmod(place, 8)
                expected[head * 16 + 2 * at + half] = tensor[row]
        assert torch.equal(held[target], expected), target
    zeros = held.keys() - seen
    assert all(not held[name].any() for name in zeros)
    assert len(zeros) == (0 if kind == "llama" else 4 + 2 * 3)


def test_counts_are_arrays_where_layers_differ(folders, tmp_path):
    """At 0 neurons llama.cpp would drop what the attention added, and it needs a first head."""
    found = fields_of(export_gguf(folders["deci"], tmp_path / "x.gguf").file)
    assert found["deci.attention.head_count"] == [1, 1, 4, 0, 2]
    assert found["deci.attention.head_count_kv"] == [1, 1, 2, 0, 1]
    assert found["deci.feed_forward_length"] == [33, 40, 96, 32, 32]
    assert found["deci.attention.key_length"] == found["deci.rope.dimension_count"] == 16
    found = fields_of(export_gguf(folders["llama"], tmp_path / "y.gguf").file)
    assert found["llama.attention.head_count"] == 4
    assert found["llama.feed_forward_length"] == 96
    assert found["general.file_type"] == 1


def test_the_numbers_of_layers_may_be_padded_with_zeros(copied, tmp_path):
    own = {f"{layer:02}": {"intermediate_size": 96} for layer in range(len(COUNTS))}
    edit(copied, "config.json", per_layer_config=own, intermediate_size=128)
    assert export_gguf(copied, tmp_path / "x.gguf").architecture == "llama"


CASES = {
    "Llama": ("Llama", {}, None, "llama"),
    "tied": ("Llama", {"tie_word_embeddings": True}, None, "llama"),
    "biased": ("Llama", BIASED, None, "llama"),
    "Mistral": ("Mistral", {"sliding_window": None}, None, "llama"),
    "llama3": ("Llama", {"rope_parameters": LLAMA3}, None, "llama"),
    "cut": ("Llama", {**BIASED, "rope_parameters": LLAMA3}, COUNTS, "deci"),
    "Qwen2-cut": ("Qwen2", {}, COUNTS, "deci"),
    "Qwen2-heads": ("Qwen2", {"num_attention_heads": 2, "num_key_value_heads": 2}, None, "deci"),
    "one-kv-head": ("Llama", {"num_key_value_heads": 1}, ((1, 2, 96), (0, 0, 96)), "deci"),
}


@pytest.mark.parametrize("name", CASES)
def test_the_file_computes_what_the_checkpoint_does(name, tmp_path):
    kind, values, counts, architecture = CASES[name]
    layers = len(counts or COUNTS)
    folder = save_model(tmp_path / "whole", kind, num_hidden_layers=layers, **values)
    if counts:
        folder = save_cut(folder, tmp_path / "cut", counts)
    found = export_gguf(folder, tmp_path / "x.gguf", type="f32")
    assert found.architecture == architecture
    check_logits(folder, found.file)


@pytest.mark.parametrize("kind", ["Qwen2", "Qwen3"])
def test_a_qwen_is_written_as_it_is(kind, tmp_path):
    folder = save_model(tmp_path / "whole", kind)
    found = export_gguf(folder, tmp_path / "x.gguf", type="f32")
    assert found.architecture == kind.lower()
    stored = load_file(folder / "model.safetensors")
    held = {t.name: torch.from_numpy(t.data.copy()) for t in gguf.GGUFReader(found.file).tensors}
    assert len(held) == len(stored)
    assert torch.equal(
        held["blk.1.attn_k.weight"], stored["model.layers.1.self_attn.k_proj.weight"]
    )
    own = {
        "Qwen2": ("attn_q.bias", "q_proj.bias"),
        "Qwen3": ("attn_q_norm.weight", "q_norm.weight"),
    }
    ours, theirs = own[kind]
    assert torch.equal(held[f"blk.1.{ours}"], stored[f"model.layers.1.self_attn.{theirs}"])


# --- numbers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["f16", "bf16", "q8_0"])
def test_matrices_have_the_type_and_norms_stay_as_they_are(kind, folders, tmp_path, monkeypatch):
    monkeypatch.setattr(numbers, "CHUNK", 4096)  # several chunks
    told = []
    found = export_gguf(
        folders["deci"], tmp_path / "x.gguf", type=kind, progress=lambda *each: told.append(each)
    )
    assert len(told) > found.tensors
    assert found.size == found.file.stat().st_size
    stored = load_file(folders["deci"] / "model.safetensors")
    tensors = {t.name: t for t in gguf.GGUFReader(found.file).tensors}
    assert {t.tensor_type.name for t in tensors.values() if "norm" in t.name} == {"F32"}
    types = {name for name, t in tensors.items() if t.tensor_type.name == kind.upper()}
    odd = {"blk.0.ffn_down.weight", "blk.1.ffn_down.weight", "blk.0.attn_output.weight",
           "blk.1.attn_output.weight"}  # fmt: skip
    assert set(found.fallen_back) == (odd if kind == "q8_0" else set())
    assert types == {n for n in tensors if "norm" not in n} - set(found.fallen_back)
    name, tolerance = "model.layers.2.mlp.up_proj.weight", {"f16": 1e-3, "bf16": 8e-3, "q8_0": 8e-3}
    tensor = tensors["blk.2.ffn_up.weight"]
    read = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
    assert (read - stored[name]).abs().max() <= tolerance[kind] * stored[name].abs().max()
    if kind != "q8_0":
        dtype = {"f16": torch.float16, "bf16": torch.bfloat16}[kind]
        assert torch.equal(read, stored[name].to(dtype).float())


@pytest.mark.parametrize(("value", "kind"), [(1e5, "f16"), (1e9, "q8_0"), (float("nan"), "f32")])
def test_a_weight_that_the_type_cannot_hold_is_named(value, kind, copied, tmp_path):
    tensors = load_file(copied / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = value
    save_file(tensors, copied / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"blk\.1\.ffn_up\.weight: holds .*; export with"):
        export_gguf(copied, tmp_path / "x.gguf", type=kind)
    assert list(tmp_path.iterdir()) == [copied]


# --- tokenizers -----------------------------------------------------------------------------------


def test_a_byte_level_tokenizer_comes_along(folders, tmp_path):
    found = fields_of(export_gguf(folders["llama"], tmp_path / "x.gguf").file)
    tokenizer = byte_tokenizer()
    assert found["tokenizer.ggml.model"] == "gpt2"
    assert found["tokenizer.ggml.pre"] == "gpt-2"
    tokens, kinds = found["tokenizer.ggml.tokens"], found["tokenizer.ggml.token_type"]
    size = len(tokenizer)
    assert tokens[:size] == tokenizer.convert_ids_to_tokens(range(size))
    assert tokens[size:] == [f"[PAD{index}]" for index in range(size, size + 3)]
    assert kinds[:3] == [3, 3, 3]
    assert kinds[-4:] == [4, 5, 5, 5]  # <tool>, and rows that no token has
    assert set(kinds[3:-4]) == {1}
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    assert found["tokenizer.ggml.merges"] == [" ".join(pair) for pair in state["model"]["merges"]]
    ids = [found[f"tokenizer.ggml.{name}_token_id"] for name in ("bos", "eos", "unknown")]
    assert ids == [0, 1, 2]
    assert found["tokenizer.ggml.add_bos_token"] is False
    assert found["tokenizer.chat_template"] == tokenizer.chat_template


def test_rows_without_a_token_get_names_of_their_own(copied, tmp_path):
    """llama.cpp dies of two tokens with one name."""
    tokenizer = byte_tokenizer()
    size = len(tokenizer)
    tokenizer.add_tokens([f"[PAD{size + 1}]"])
    tokenizer.save_pretrained(copied)
    found = fields_of(export_gguf(copied, tmp_path / "x.gguf").file)["tokenizer.ggml.tokens"]
    assert found[size:] == [f"[PAD{size + 1}]", f"[PAD{size + 1}]_", f"[PAD{size + 2}]"]


def test_an_end_that_the_generation_config_alone_has_comes_along(copied, tmp_path):
    edit(copied, "generation_config.json", eos_token_id=2)
    found = fields_of(export_gguf(copied, tmp_path / "x.gguf").file)
    assert (found["tokenizer.ggml.eos_token_id"], found["tokenizer.ggml.eot_token_id"]) == (1, 2)


def test_pieces_have_scores_that_give_their_merges_back(tmp_path):
    folder = save_model(tmp_path / "whole", tokenizer=piece_tokenizer(), num_hidden_layers=1)
    edit(folder, "generation_config.json", eos_token_id=[1, 2])
    found = export_gguf(folder, tmp_path / "x.gguf")
    assert found.notes == ()
    fields = fields_of(found.file)
    assert fields["tokenizer.ggml.model"] == "llama"
    assert fields["tokenizer.ggml.add_space_prefix"] is True
    assert fields["tokenizer.ggml.eot_token_id"] == 2
    tokens, scores = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.scores"]
    kinds = fields["tokenizer.ggml.token_type"]
    assert [kinds[tokens.index(t)] for t in ("<unk>", "<s>", "<0x0A>", "▁the")] == [2, 3, 6, 1]
    whole = piece_tokenizer()
    for text in ("the long said", "theann er", "  the"):
        names = pieces_of(text, dict(zip(tokens, scores, strict=True)))
        assert names == whole.convert_ids_to_tokens(whole(text)["input_ids"])


def pieces_of(text: str, scores: dict[str, float]) -> list[str]:
    """What SentencePiece does: the pair whose piece has the highest score is merged, from left."""
    pieces = list(("▁" + text).replace(" ", "▁"))
    while True:
        pairs = [(scores.get(a + b, -1e9), -i) for i, (a, b) in enumerate(pairwise(pieces))]
        best = max(pairs, default=(-1e9, 0))
        if best[0] <= -1e9:
            return pieces
        at = -best[1]
        pieces[at : at + 2] = [pieces[at] + pieces[at + 1]]


@pytest.mark.parametrize("name", SPLITS)
def test_how_text_is_split_is_found_by_its_patterns(name, tmp_path):
    folder = save_model(tmp_path / "whole", tokenizer=split_tokenizer(name), num_hidden_layers=1)
    fields = fields_of(export_gguf(folder, tmp_path / "x.gguf").file)
    assert fields["tokenizer.ggml.pre"] == name


def test_pieces_that_are_not_those_of_sentencepiece_are_said(tmp_path):
    from tokenizers import normalizers

    tokenizer = piece_tokenizer()
    steps = [normalizers.NFKC(), normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    tokenizer.backend_tokenizer.normalizer = normalizers.Sequence(steps)
    folder = save_model(tmp_path / "whole", tokenizer=tokenizer, num_hidden_layers=1)
    state = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    state["model"]["merges"].remove(["t", "he"])
    (folder / "tokenizer.json").write_text(json.dumps(state), "utf-8")
    (folder / "generation_config.json").write_text("{", "utf-8")
    notes = export_gguf(folder, tmp_path / "x.gguf").notes
    assert "merges, and SentencePiece would have" in notes[0]
    assert "normalizes text (NFKC), and llama.cpp does not: give" in notes[1]
    with pytest.raises(CheckpointError, match=r"--pre-tokenizer own: .* of SentencePiece"):
        export_gguf(folder, tmp_path / "y.gguf", pre_tokenizer="own")
    state["pre_tokenizer"] = {"type": "WhitespaceSplit"}
    (folder / "tokenizer.json").write_text(json.dumps(state), "utf-8")
    with pytest.raises(CheckpointError, match=r"splits text .WhitespaceSplit. before it merges"):
        export_gguf(folder, tmp_path / "y.gguf")


def test_a_split_that_is_not_known_is_named_and_can_be_given(tmp_path):
    from tokenizers import pre_tokenizers

    steps = [pre_tokenizers.Punctuation(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    tokenizer = byte_tokenizer(steps)
    folder = save_model(tmp_path / "whole", tokenizer=tokenizer, num_hidden_layers=1)
    with pytest.raises(CheckpointError, match=r"not known here \('Punctuation' and .*gpt-2, ll"):
        export_gguf(folder, tmp_path / "x.gguf")
    fields = fields_of(export_gguf(folder, tmp_path / "x.gguf", pre_tokenizer="own").file)
    assert fields["tokenizer.ggml.pre"] == "own"


# --- what is refused ------------------------------------------------------------------------------

OWN = {"allow_global_per_layer_attribute_access": True}
ODD = {
    "GemmaForCausalLM": ({"architectures": ["GemmaForCausalLM"]}, "is GemmaForCausalLM; only L"),
    "headless": ({"architectures": None}, "is a llama without a head; only Llama"),
    "gelu": ({"hidden_act": "gelu"}, "config.json has hidden_act='gelu'"),
    "longrope": (
        {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, "factor": 2.0,
                             "short_factor": [1.0] * 8, "long_factor": [2.0] * 8,
                             "original_max_position_embeddings": 32}},
        "rope_parameters=.*which llama.cpp's llama does not compute",
    ),
    "betas": (
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0,
                             "original_max_position_embeddings": 32, "beta_fast": 16.0}},
        "rope_parameters=.*which llama.cpp's llama does not compute",
    ),
    "widths": ({**OWN, "per_layer_config": {"1": {"head_dim": 8}}}, "layer 1 has its own head_dim"),
    "groups": ({**OWN, "per_layer_config": {"1": {"num_attention_heads": 3}}}, "3 heads on 2 KV"),
    "shape": ({"intermediate_size": 95}, r"gate_proj\.weight has the shape \[96, 64\], the config"),
    "lacks": ({"num_hidden_layers": 6}, r"lacks the tensor model\.layers\.5"),
    "left": ({"num_hidden_layers": 4}, r"holds model\.layers\.4.* for which llama.cpp's llama has"),
    "tokens": ({}, "holds no tokenizer"),
    "weights": ({}, "holds no weights in safetensors"),
}  # fmt: skip


@pytest.mark.parametrize("name", ODD)
def test_what_llama_cpp_cannot_run_is_refused_by_name(name, copied, tmp_path):
    changes, message = ODD[name]
    edit(copied, "config.json", **changes)
    if name == "tokens":
        (copied / "tokenizer.json").unlink()
    if name == "weights":
        (copied / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=message):
        export_gguf(copied, tmp_path / "x.gguf")
    assert list(tmp_path.iterdir()) == [copied]


def test_a_qwen3_with_widths_of_its_own_is_refused(tmp_path):
    folder = save_model(tmp_path / "whole", "Qwen3", num_hidden_layers=2)
    cut = save_cut(folder, tmp_path / "cut", [(2, 2, 96), (2, 2, 40)])
    with pytest.raises(CheckpointError, match="one width for all layers of qwen3; --layout stock"):
        export_gguf(cut, tmp_path / "x.gguf")


def test_a_tokenizer_of_words_is_refused(copied, tmp_path):
    from cli_cases import word_tokenizer

    word_tokenizer(pair=False).save_pretrained(copied)
    with pytest.raises(CheckpointError, match="its tokenizer is a WordLevel; only byte-pair"):
        export_gguf(copied, tmp_path / "x.gguf")


def test_tokens_without_a_row_are_refused(copied, tmp_path):
    more = byte_tokenizer()
    more.add_tokens([f"<more {index}>" for index in range(9)])
    more.save_pretrained(copied)
    with pytest.raises(CheckpointError, match=r"has the token .*'<more 8>'.* the embedding has"):
        export_gguf(copied, tmp_path / "x.gguf")


@pytest.mark.parametrize(
    ("changes", "note"),
    [
        ({"sliding_window": 64}, "use up to 64 tokens"),
        (
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "no dynamic scaling of positions: use up to 128 tokens",
        ),
    ],
)
def test_what_differs_at_lengths_is_said_and_the_context_ends_there(changes, note, tmp_path):
    folder = save_model(tmp_path / "whole", "Mistral", num_hidden_layers=1, **changes)
    found = export_gguf(folder, tmp_path / "x.gguf")
    assert note in found.notes[0]
    assert fields_of(found.file)["llama.context_length"] == changes.get("sliding_window", 128)


def test_a_missing_package_is_named(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(exporting, "find_spec", lambda name: None)
    wanted = re.escape("pip install gguf")
    with pytest.raises(CheckpointError, match=wanted):
        export_gguf(folders["llama"], tmp_path / "x.gguf")
    assert util.find_spec("gguf")


# --- the file and the command ---------------------------------------------------------------------


def test_only_gguf_files_are_replaced_and_only_when_asked(folders, tmp_path):
    target = tmp_path / "x.gguf"
    export_gguf(folders["llama"], target)
    before = target.read_bytes()
    with pytest.raises(CheckpointError, match="is there; pass --overwrite"):
        export_gguf(folders["llama"], target)
    assert target.read_bytes() == before
    assert export_gguf(folders["llama"], target, type="q8_0", overwrite=True).type == "q8_0"
    target.write_text("mine")
    with pytest.raises(CheckpointError, match="is no GGUF file, and only these are replaced"):
        export_gguf(folders["llama"], target, overwrite=True)
    assert target.read_text() == "mine"
    with pytest.raises(
        CheckpointError, match=r"is a folder, needed a file; give .*model-f16\.gguf"
    ):
        export_gguf(folders["llama"], tmp_path)
    assert list(tmp_path.iterdir()) == [target]


def test_a_full_disk_leaves_what_was_there(folders, tmp_path, monkeypatch):
    target = tmp_path / "x.gguf"
    export_gguf(folders["llama"], target)
    before = target.read_bytes()

    def full(self, file):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(numbers.Streamed, "tofile", full)
    with pytest.raises(CheckpointError, match=r"cannot be written .No space left on device.;"):
        export_gguf(folders["llama"], target, overwrite=True)
    assert target.read_bytes() == before
    assert list(tmp_path.iterdir()) == [target]


def test_the_command_says_what_it_wrote_and_how_to_run_it(folders, tmp_path, capsys):
    target = tmp_path / "x.gguf"
    assert main(["export", "gguf", str(folders["deci"]), str(target), "--type", "Q8_0"]) == 0
    said = capsys.readouterr().out
    assert "In f16, since their rows are no multiple of 32: blk.0.attn_output.weight" in said
    assert re.search(r"Saved: \S+x\.gguf \(\S+B, 43 tensors in q8_0, architecture deci\)", said)
    assert f"Run it: llama-cli -m {target}" in said
    assert main(["export", "gguf", str(folders["deci"]), str(target)]) == 2
    assert main(["export", "gguf", str(tmp_path), str(tmp_path / "y.gguf")]) == 2
    assert main(["export", "gguf", str(folders["deci"]), str(target), "--type", "q4_k"]) == 2
    said = capsys.readouterr().err
    assert "choose one of f32, f16, bf16, q8_0. llama.cpp makes smaller types of f16" in said
