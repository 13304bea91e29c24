"""Types of Transformers through the whole loop, compared with docs/architectures.md.

A spread of types in every run; all of them with ``pytest -m zoo --dist load``.
"""

import dataclasses
import importlib.util
import sys

import pytest
import transformers
import whole_loop
from exceptions import EXCEPTIONS
from not_built import NOT_BUILT
from places import ROOT
from tiny_configs import all_types, mapped

# Encoders, decoders, both, mixtures, latent attention, scans, towers, images, audio, series.
SPREAD = (
    "bert roberta deberta-v2 modernbert albert electra longformer funnel convbert squeezebert "
    "gpt2 bloom mpt falcon gpt_neox gptj codegen opt llama qwen3 gemma3_text phi3 cohere "
    "olmo2 glm4 gpt_neo mixtral qwen3_moe gpt_oss llama4_text dbrx deepseek_v3 jetmoe "
    "ernie4_5_moe switch_transformers longcat_flash mamba jamba granitemoehybrid qwen3_next "
    "rwkv bamba lfm2 recurrent_gemma t5 bart prophetnet pegasus m2m_100 whisper wav2vec2 "
    "hubert speecht5 musicgen vit dinov2 convnext mobilenet_v2 segformer videomae swin resnet "
    "levit beit efficientnet detr deformable_detr yolos dpt clip siglip llava "
    "qwen2_5_vl paligemma idefics3 blip-2 layoutlmv3 sam_vision_model patchtst perceiver"
).split()


def _tables():
    """The script that makes the page."""
    place = ROOT / "docs" / "architectures.py"
    spec = importlib.util.spec_from_file_location("architectures", place)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


TABLES = _tables()
PAGE = TABLES.PAGE.read_text(encoding="utf-8")
LINES = TABLES.lines_of(PAGE)
IS_VERSION_OF_PAGE = f"Transformers {transformers.__version__}." in PAGE


def check_type(name, folder):
    if name not in all_types():
        pytest.skip("this version does not have it")
    row = whole_loop.examine(name, folder)
    assert bool(row.wrong) == (name in EXCEPTIONS), row.wrong or "works now: remove its exception"
    if IS_VERSION_OF_PAGE:
        line = TABLES.line_of(dataclasses.asdict(row))
        assert line == LINES[name], f"run: python docs/architectures.py --types {name}"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", SPREAD)
def test_a_spread_of_types_is_as_the_page_says(name, tmp_path):
    check_type(name, tmp_path)


@pytest.mark.zoo
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", all_types())
def test_every_type_is_as_the_page_says(name, tmp_path):
    check_type(name, tmp_path)


@pytest.mark.zoo
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", NOT_BUILT)
def test_types_that_are_not_built_cannot_be(name):
    if not any(name in table for _, table in mapped()):
        pytest.skip("this version does not have it")
    with pytest.raises(Exception):  # noqa: B017, PT011 - each fails in its own way
        whole_loop.outputs(*whole_loop.build(name))


def test_the_page_has_every_type():
    if not IS_VERSION_OF_PAGE:
        pytest.skip("the page is of another version of Transformers")
    assert sorted(LINES) == sorted(all_types()), "run: python docs/architectures.py"


def test_counts_and_matrix_follow_from_the_rows():
    for page in (TABLES.PAGE, TABLES.README):
        text = page.read_text(encoding="utf-8")
        assert text == TABLES.with_tables(text, LINES), "run: python docs/architectures.py"
    assert {name for name, line in LINES.items() if "**fails**" in line} == EXCEPTIONS.keys()
    assert set(TABLES.POPULAR) <= LINES.keys()


def test_words_of_a_row_are_safe_in_a_table():
    row = {"name": "x", "cls": "X", "pruned": ["heads"], "refused": ["a | b <c> *d*"], "wrong": "e"}
    line = TABLES.line_of({**row, "layout": "stock", "loads": "plain Transformers"})
    assert line == (
        r"| `x` | X | heads | a / b \<c\> \*d\*; **fails** e | stock | plain Transformers |"
    )
    assert TABLES.lines_of(f"text\n{line}\n") == {"x": line}


def test_a_type_on_which_the_process_dies_has_a_row(monkeypatch, tmp_path):
    """The others are examined in another process."""
    program = tmp_path / "worker.py"
    program.write_text(
        "import sys\n"
        "for name in sys.argv[1:]:\n"
        "    if name == 'b':\n"
        "        sys.exit(9)\n"
        '    print(\'{"name": "%s"}\' % name, flush=True)\n',
        encoding="utf-8",
    )
    monkeypatch.setattr(TABLES, "WORKER", (sys.executable, str(program)))
    rows = TABLES._rows(["a", "b", "c"])
    assert [row["name"] for row in rows] == ["a", "b", "c"]
    assert rows[1]["wrong"] == "the process ended with 9"
    program.unlink()
