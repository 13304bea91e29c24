"""Loads per-layer checkpoints in a process of its own, trains them a step, and saves them again.

Run as ``python loading_process.py ROUTE FOLDER...``. Routes: ``shim`` (no hf_gradnas, remote code),
``before`` and ``after`` (hf_gradnas imported before or after transformers; then remote code
too). Each folder holds checkpoints, one a family, with a batch and the expected logits beside the
weights; what is saved again goes to ``<folder>-<route>``.
"""

import sys
from pathlib import Path

ROUTE, *FOLDERS = sys.argv[1:]
if ROUTE == "shim":
    sys.modules["hf_gradnas"] = None  # type: ignore[assignment] - importing it fails
else:
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # forked.py is isolated
if ROUTE == "before":
    from hf_gradnas.checkpoint.install import install_when_imported

    assert "torch" not in sys.modules
    install_when_imported()

import torch  # noqa: E402 - the order of imports is what is tested
import transformers  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

if ROUTE == "after":
    assert "__new__" not in vars(transformers.PreTrainedModel)
    from hf_gradnas.checkpoint.install import install_when_imported

    install_when_imported()

transformers.utils.logging.disable_progress_bar()
AUTO = {
    "bert": transformers.AutoModelForSequenceClassification,
    "t5": transformers.AutoModelForSeq2SeqLM,
}
TRUST = {"shim": [True], "before": [False, True], "after": [False, True]}
PREFIX = {True: "transformers_modules.", False: "hf_gradnas."}


def check_plain(folder: Path, auto: type) -> None:
    """Where nothing reads the record, the one error says what does, before any file is read."""
    said = ""
    try:
        auto.from_pretrained(folder)
    except ValueError as error:
        said = str(error)
    assert "import hf_gradnas, or pass trust_remote_code=True" in said, said
    config = transformers.AutoConfig.from_pretrained(folder)
    auto.from_pretrained(folder, config=config, trust_remote_code=True)


def check(folder: Path, auto: type, *, trust: bool) -> transformers.PreTrainedModel:
    """Load in every way that the route has, and compare the logits."""
    expected = load_file(folder / "expected.safetensors")
    want = expected.pop("logits")
    model, info = auto.from_pretrained(
        folder, trust_remote_code=trust, attn_implementation="eager", output_loading_info=True
    )
    assert not any(info.values()), info
    assert type(model).__module__.startswith(PREFIX[trust]), type(model)
    assert torch.equal(model(**expected).logits, want), folder
    config = transformers.AutoConfig.from_pretrained(folder)
    fresh = auto.from_config(config, trust_remote_code=trust)
    shapes = {name: p.shape for name, p in model.named_parameters()}
    assert shapes == {name: p.shape for name, p in fresh.named_parameters()}
    base = transformers.AutoModel.from_pretrained(folder, trust_remote_code=trust)
    assert type(base).__module__.startswith(PREFIX[trust]), type(base)
    if ROUTE == "shim" and model.can_generate():
        ids = expected["input_ids"]
        for cache in ("dynamic", "static"):
            out = model.generate(
                ids, max_new_tokens=4, cache_implementation=cache, disable_compile=True
            )
            assert out.shape[0] == len(ids)
    return model


def train_and_save(model: transformers.PreTrainedModel, folder: Path, target: Path) -> None:
    """One step of SGD, so that the next process sees other weights, and a plain save."""
    batch = load_file(folder / "expected.safetensors")
    batch.pop("logits")
    model.train()
    loss = model(**batch).loss
    loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.01).step()
    model.eval().save_pretrained(target)
    with torch.no_grad():
        save_file({**batch, "logits": model(**batch).logits}, target / "expected.safetensors")


for root in map(Path, FOLDERS):
    for source in sorted(root.iterdir()):
        auto_class = AUTO.get(source.name, transformers.AutoModelForCausalLM)
        if ROUTE == "shim":
            check_plain(source, auto_class)
        for remote in TRUST[ROUTE]:
            loaded = check(source, auto_class, trust=remote)
        train_and_save(loaded, source, root.with_name(f"{root.name}-{ROUTE}") / source.name)
if ROUTE != "shim":
    assert not any("_After" in type(finder).__name__ for finder in sys.meta_path)
