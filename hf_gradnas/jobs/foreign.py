"""What stands where a Transformers model is needed: files of other tools, pointers, addresses.

Imports neither torch nor transformers.
"""

from __future__ import annotations

import re
from pathlib import Path

from ..errors import RecipeError

# What a file holds that Transformers does not load, by the pattern of its name.
_FORMATS = {
    "*.gguf": "a GGUF file, as llama.cpp and Ollama run them",
    "*.onnx": "an ONNX file, which is for running alone",
    "tf_model*.h5": "weights of TensorFlow, which Transformers no longer loads",
    "*.h5": "a Keras file",
    "*.keras": "a Keras file",
    "*.tflite": "a TensorFlow Lite file",
    "flax_model*.msgpack": "weights of Flax, which Transformers no longer loads",
    "*.nemo": "a NeMo file",
    "*.mlpackage": "a Core ML file",
    "*.engine": "a TensorRT file",
    "*.pt": "a file of torch.save, which Transformers does not load",
    "*.pth": "a file of torch.save, which Transformers does not load",
    "*.ckpt": "a checkpoint of another trainer",
}
# Of `Trainer`, beside whatever weights there are.
_OF_TRAINING = ("optimizer.pt", "scheduler.pt", "rng_state*.pth", "scaler.pt")
LOADED = ("*.safetensors", "*.bin", "*.index.json")
_ADDRESS = re.compile(
    r"(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/(?:models/)?"
    r"((?!(?:datasets|spaces)/)[\w.-]+(?:/(?!tree\b|blob\b|resolve\b)[\w.-]+)?)(?:[/?#].*)?|"
    r"hf://(?:models/)?((?!(?:datasets|spaces)/)[\w.-]+/[\w.-]+)(?:[/@].*)?",
    re.ASCII,
)
_POINTER = b"version https://git-lfs.github.com/spec/"


def check_format(name: str, path: Path) -> None:
    """Check that a file or folder is not one of another tool's.

    Raises:
        RecipeError: It is, and the message says of which.
    """
    found = [path] if path.is_file() else sorted(path.iterdir()) if path.is_dir() else []
    found = [file for file in found if not any(map(file.match, _OF_TRAINING))]
    if path.is_dir() and any(next(path.glob(pattern), None) for pattern in LOADED):
        return
    for pattern, what in _FORMATS.items():
        file = next((file for file in found if file.match(pattern)), None)
        if file is not None:
            has = "is" if file == path else f"holds {file.name},"
            raise RecipeError(
                f"--model {name}: {has} {what}; give the Hub id or the folder of the model that it "
                "was made from (config.json and *.safetensors)."
            )


def check_pointers(name: str, folder: Path) -> None:
    """Check that the weights in a folder are there, not only the pointers that Git clones.

    Raises:
        RecipeError: One is a pointer of Git LFS.
    """
    for pattern in LOADED[:2]:
        for file in sorted(folder.glob(pattern)):
            with file.open("rb") as stream:
                if stream.read(len(_POINTER)) == _POINTER:
                    raise RecipeError(
                        f"--model {name}: {file.name} is a pointer of Git LFS, not the weights; "
                        "run git lfs pull in the folder, or hf download."
                    )


def id_in_address(name: str) -> str:
    """The Hub id in an address of a model's page; "" where it is none."""
    found = _ADDRESS.fullmatch(name)
    return "" if found is None else found[1] or found[2]
