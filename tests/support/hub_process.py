"""Loads from a Hub, or trains and pushes to one, in a process of its own.

``python -I hub_process.py load FOLDER`` has no hf_gradnas: each ``FOLDER/<name>.json`` names a
repository and the class to load it with, ``<name>.safetensors`` holds a batch and its logits.
``python hub_process.py train FOLDER`` trains with the callback, pushes, and writes such a pair.
"""

import json
import os
import sys
from pathlib import Path

MODE, FOLDER = sys.argv[1], Path(sys.argv[2])
if MODE == "load":
    sys.modules["hf_gradnas"] = None  # type: ignore[assignment] - importing it fails

import torch  # noqa: E402
import transformers  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

transformers.utils.logging.disable_progress_bar()


def load() -> None:
    """Load every repository, and compare logits."""
    cache = Path(os.environ["HF_HOME"]).resolve()
    assert not cache.exists(), "the cache is not fresh"
    for file in sorted(FOLDER.glob("*.json")):
        asked = json.loads(file.read_text())
        batch = load_file(file.with_suffix(".safetensors"))
        want = batch.pop("logits")
        is_per_layer = asked["layout"] == "per_layer"
        options = {"trust_remote_code": True} if is_per_layer else {}
        if asked.get("tokenizer"):
            assert len(transformers.AutoTokenizer.from_pretrained(asked["repository"])) > 0
        model, info = getattr(transformers, asked["auto"]).from_pretrained(
            asked["repository"], output_loading_info=True, **options
        )
        assert not any(info.values()), (file.name, info)
        assert type(model).__module__.startswith("transformers_modules.") is is_per_layer
        with torch.no_grad():
            difference = (model.eval()(**batch).logits - want).abs().max().item()
        assert difference <= 1e-5, (file.name, difference)
    assert any(cache.rglob("model.safetensors"))


def train() -> None:
    """Train with the callback, whose trainer pushes what it saves; push again as scripts do."""
    import callback_runs

    callback = callback_runs.pruning(layout="per_layer")
    model = callback_runs.build("llama", dtype=torch.float32)
    trainer = callback_runs.make_trainer(
        FOLDER / "run",
        callback,
        model=model,
        data=callback_runs.Rows("llama", dtype=torch.float32),
        max_steps=4,
        save_strategy="steps",
        save_steps=4,
        push_to_hub=True,
        hub_model_id="callback",
        hub_private_repo=True,
    )
    trainer.train()
    batch = dict(callback_runs.batch_of("llama", 0, torch.float32))
    with torch.no_grad():
        logits = model.eval()(**batch).logits
    save_file(
        {name: tensor.contiguous() for name, tensor in {**batch, "logits": logits}.items()},
        FOLDER / "callback.safetensors",
    )
    trainer.push_to_hub()


{"load": load, "train": train}[MODE]()
