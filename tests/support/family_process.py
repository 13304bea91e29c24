"""Loads pruned checkpoints of every family in a process of its own and compares their logits.

Run as ``python family_process.py {shim,import} FOLDER``. ``shim`` has no hf_gradnas: stock
checkpoints load with their plain class, per-layer ones through the code file that they carry.
``import`` has hf_gradnas and asks for no remote code. Each checkpoint stands in
``FOLDER/<family>-<layout>``, a batch and its logits in ``expected.safetensors`` beside the weights.
"""

import json
import sys
from pathlib import Path

ROUTE, FOLDER = sys.argv[1:]
if ROUTE == "shim":
    sys.modules["hf_gradnas"] = None  # type: ignore[assignment] - importing it fails
else:
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # forked.py is isolated
    import hf_gradnas  # noqa: F401

import torch  # noqa: E402
import transformers  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

transformers.utils.logging.disable_progress_bar()

for folder in sorted(Path(FOLDER).iterdir()):
    batch = load_file(folder / "expected.safetensors")
    want = batch.pop("logits")
    config = json.loads((folder / "config.json").read_text())
    name, trust = config["architectures"][0], ROUTE == "shim" and "auto_map" in config
    loader = getattr(transformers, name)
    if trust:
        # AutoModelForPreTraining and the like name the same class; any of them will do.
        auto = next(k for k, v in config["auto_map"].items() if v == f"modeling_gradnas.{name}")
        loader = getattr(transformers, auto)
    model, info = loader.from_pretrained(
        folder, trust_remote_code=trust, attn_implementation="eager", output_loading_info=True
    )
    assert not any(info.values()), (folder.name, info)
    model.eval()
    with torch.no_grad():
        difference = (model(**batch).logits - want).abs().max().item()
    assert difference <= 1e-5, (folder.name, difference)
    assert type(model).__name__ == name
    own = type(model).__module__.startswith(("hf_gradnas.", "transformers_modules."))
    assert own is folder.name.endswith("per_layer"), (folder.name, type(model))
