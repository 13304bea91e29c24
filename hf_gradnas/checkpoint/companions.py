"""What is beside the original's weights and comes along, so that a folder stays what it was.

A folder of sentence-transformers keeps its modules; texts such as chat templates and processor
settings come along where nothing newer was saved. Everything else that may matter is named. Files
are only read: none of their code is run, and no pickle or weight of the original is copied.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path, PurePath, PurePosixPath
from typing import Any

from huggingface_hub.errors import HTTPError
from transformers import PreTrainedModel

from ..errors import GradNASWarning
from ..report import FOLDER as REPORT_FOLDER
from ..report import find_origin, is_hub_id
from ..running.wrappers import SENTENCE_CLASSES, sentence_class
from ..surgery.modeling_gradnas import auto_class_name
from ..types import read_object
from .folders import (
    MODULES,
    OPTIONS,
    Modules,
    body_folder,
    read_modules,
    root_of,
    weights_as_safetensors,
)

# Text files of the root by what they belong to; a group is left to who saved a part of it already.
TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "chat_template.*", "additional_chat_templates/*.jinja", "vocab*", "merges.txt", "*.spm",
    "bpe.codes", "spiece.model", "sentencepiece*.model", "tokenizer.model", "tekken.json",
    "normalizer.json", "entity_vocab.json", "emoji.json", "dict.txt", "prophetnet.tokenizer",
)  # fmt: skip
PROCESSOR = ("processor_config.json", "*preprocessor_config.json")
LEGAL = ("LICENSE*", "LICENCE*", "NOTICE*", "COPYING*", "USE_POLICY*")
GROUPS = (TOKENIZER, PROCESSOR, LEGAL)
# The weights that were loaded, what a save writes anew, and what a training leaves behind.
REPLACED = (
    "config.json", "generation_config.json", "README.md", "gradnas.json", "recipe.yaml",
    "modeling_gradnas.py", "*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin",
    "pytorch_model*.bin.index.json", "training_args.bin", "trainer_state.json", "all_results.json",
    "*_results.json", "optimizer.*", "scheduler.pt", "scaler.pt", "rng_state*.pth", "latest",
    "gradnas_scores*", f"{REPORT_FOLDER}/*", "checkpoint-*/*", "pruned/*", "runs/*", "logs/*",
    "eval/*", "global_step*/*", "*.md", "*.png", "*.jpg", "*.jpeg", "*.svg", "*.gif",
    "*.webp", "*.pdf",
)  # fmt: skip
EXPORTED = (
    "adapter_*", "*.bin", "*.onnx*", "onnx/*", "openvino/*", "*.h5", "*.msgpack", "*.ot", "*.gguf",
    "*.ggml", "*.tflite", "*.mlmodel", "*.mlpackage/*", "*.engine", "*.pt", "*.pt2", "*.pth",
    "*.ckpt", "*.pkl", "*.pickle", "*.npz", "*.ort", "original/*",
)  # fmt: skip
OLD_WEIGHTS = "hold the weights of the original; export the pruned model again"
UNKNOWN = "are not known to belong to the model; copy what it needs"
OTHER_MODEL = "belong to a sentence-transformers model, which the pruned class is not the body of"
OUTSIDE = "lead out of the folder by a link; copy them if they belong to the model"
UNREADABLE = "cannot be read without running a pickle; save it as safetensors and copy it"


@dataclass(frozen=True, slots=True)
class Companions:
    """Files that belong beside a pruned model.

    Attributes:
        files: Content by path relative to the folder, with slashes.
        left_out: Paths of what does not come along and may matter, by the reason.
        sentence_class: Name of the class of sentence-transformers that loads the folder, or None.
        owner: The model of sentence-transformers around the pruned one, which writes both; or None.
    """

    files: Mapping[str, bytes] = field(default_factory=dict)
    left_out: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    sentence_class: str | None = None
    owner: Any = None

    def write(self, folder: Path) -> list[str]:
        """Write what is not there yet, no group in part, and return its paths."""
        there = {path.relative_to(folder).as_posix() for path in folder.rglob("*")}
        taken = [group for group in GROUPS if any(_matches(name, group) for name in there)]
        written = []
        for name, content in self.files.items():
            if name in there or any(_matches(name, group) for group in taken):
                continue
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
            written.append(name)
        return sorted(written)

    def warn(self, source: str) -> None:
        """Name what was left out.

        Warns:
            GradNASWarning: Something was.
        """
        if self.left_out:
            parts = [f"{', '.join(names)} ({why})" for why, names in self.left_out.items()]
            warnings.warn(
                f"Not copied from {source}: {'; '.join(parts)}.", GradNASWarning, stacklevel=2
            )


def companions_of(model: PreTrainedModel, stock: type[PreTrainedModel], owner: Any) -> Companions:
    """What belongs beside a cut model, from where the original was loaded.

    Args:
        model: The cut model.
        stock: The class of Transformers that it is one of.
        owner: The model of sentence-transformers around it, which writes its own files; or None.

    Warns:
        GradNASWarning: Some files that may matter do not come along.
    """
    folder = source_folder(model)
    if folder is None:
        return Companions(sentence_class=_class_of(owner), owner=owner)
    found = read_companions(folder, stock, owner=owner)
    name = find_origin(root_of(model.name_or_path)).base_model
    found.warn(f"the original ({name or 'its folder'})")
    return found


def source_folder(model: PreTrainedModel) -> Path | None:
    """Folder that a model was loaded from: a local one, or the copy of a repository in the cache.

    What belongs to a model on the Hub and is not in the cache is fetched, if the Hub answers.
    """
    source = model.name_or_path
    folder = Path(source).expanduser()
    if not source or folder.is_dir():
        return folder if source else None
    if not is_hub_id(source):
        return None
    commit = vars(model.config).get("_commit_hash")
    names = [name for group in GROUPS for name in group] + [MODULES, *OPTIONS]
    found = _snapshot(source, commit, names)
    modules = None if found is None else read_modules(found)
    if modules is not None and modules.body is not None:
        paths = [m.path for m in modules.modules if m.path and m is not modules.body]
        found = _snapshot(source, commit, [f"{path}/*" for path in paths]) or found
    return found


def _snapshot(source: str, commit: str | None, names: list[str]) -> Path | None:
    """A repository's folder in the cache, with files of these names; None where there is none."""
    from huggingface_hub import snapshot_download  # noqa: PLC0415 - takes long to import

    for offline in (False, True):
        options: dict[str, Any] = {"allow_patterns": names, "local_files_only": offline}
        try:
            return Path(snapshot_download(source, revision=commit, **options))
        except (HTTPError, OSError, RuntimeError, ValueError):
            continue  # no network, no permission, or not in the cache
    return None


def read_companions(folder: Path, stock: type[PreTrainedModel], *, owner: Any = None) -> Companions:
    """Read what belongs to the model in a folder.

    Args:
        folder: Where the original was loaded from.
        stock: The pruned class, upon which the folder's modules may be built.
        owner: The model of sentence-transformers around it: it writes its modules itself.
    """
    modules = read_modules(folder)
    files: dict[str, bytes] = {}
    root = folder if modules is None else modules.root
    left_out: dict[str, list[str]] = {OUTSIDE: _links_out(root)}
    loader = _class_of(owner)
    if modules is not None and owner is None:
        if modules.body is not None and _is_body(stock, folder, modules):
            files, left_out[UNREADABLE] = _module_files(modules)
            loader = loader_of(modules.root)
        else:
            left_out[OTHER_MODEL] = [MODULES, *(m.path + "/" for m in modules.modules if m.path)]
    listed = _listed_files(folder, modules)
    for name, path in listed.items():
        if any(_matches(name, group) for group in GROUPS):
            files.setdefault(name, path.read_bytes())
        elif name not in files and (why := _why_not(name)):
            left_out.setdefault(why, []).append(name)
    if modules is not None and loader and any(m.is_custom for m in modules.modules):
        code = {name for name in left_out.get(UNKNOWN, ()) if name.endswith(".py")}
        files |= {name: listed[name].read_bytes() for name in code}
        left_out[UNKNOWN] = [name for name in left_out.get(UNKNOWN, ()) if name not in code]
    found = {why: _by_folder(names) for why, names in left_out.items() if names}
    return Companions(files, found, loader, owner)


def _listed_files(folder: Path, modules: Modules | None) -> dict[str, Path]:
    """Files beside the model and, of a folder of modules, those of no module, by path."""
    if modules is None:
        return dict(_files_in(folder, folder))
    root, own = modules.root, {MODULES, *OPTIONS, *(module.path for module in modules.modules)}
    body = root if modules.body is None else root / modules.body.path
    found = {name: path for place in (root, body) for name, path in _files_in(place, root)}
    return {n: path for n, path in found.items() if not {n, n.partition("/")[0]} & own}


def _class_of(owner: Any) -> str | None:
    return None if owner is None else sentence_class(owner)


def _why_not(name: str) -> str:
    """Why a file stays behind; "" where nobody misses it."""
    if _matches(name, REPLACED):
        return ""
    return OLD_WEIGHTS if _matches(name, EXPORTED) else UNKNOWN


def _module_files(modules: Modules) -> tuple[dict[str, bytes], list[str]]:
    """Content of the modules' files, and paths of those that only a pickle holds.

    The Transformers model is written to the root, wherever it was.
    """
    root, body = modules.root, modules.body
    listed: list[dict[str, Any]] = [
        {**module.entry, "path": "" if module is body else module.path}
        for module in modules.modules
    ]
    files = {MODULES: json.dumps(listed, indent=2).encode()}
    for place in (root, root / (body.path if body else "")):
        for name in OPTIONS:
            if (place / name).is_file() and not _leads_out(place / name, root):
                files[name] = (place / name).read_bytes()
    unreadable: list[str] = []
    for module in modules.modules:
        if module is not body and module.path:
            found, pickles = _files_of_module(root / module.path, root)
            files |= {f"{module.path}/{name}": content for name, content in found.items()}
            unreadable += [f"{module.path}/{name}" for name in pickles]
    return files, unreadable


def _files_of_module(folder: Path, root: Path) -> tuple[dict[str, bytes], list[str]]:
    """The same of one module; tensors in a pickle are written as safetensors."""
    files: dict[str, bytes] = {}
    unreadable = []
    for name, path in _files_in(folder, root):
        safe = PurePosixPath(name).with_name("model.safetensors").as_posix()
        if path.name == "pytorch_model.bin":
            if (folder / safe).is_file():
                continue
            content = weights_as_safetensors(path)
            if content is not None:
                files[safe] = content
                continue
        elif not _matches(name, EXPORTED):
            files[name] = path.read_bytes()
            continue
        unreadable.append(name)
    return files, unreadable


def loader_of(folder: Path) -> str | None:
    """Name of the class of sentence-transformers that loads a folder; None: it is none of those."""
    if not (folder / MODULES).is_file():
        return None
    name = read_object(folder / "config_sentence_transformers.json").get("model_type")
    return name if name in SENTENCE_CLASSES else SENTENCE_CLASSES[0]


def _is_body(stock: type[PreTrainedModel], folder: Path, modules: Modules) -> bool:
    """Whether a class is the one that modules are built upon.

    Some folders name the class with the head that it was trained with.
    """
    named = read_object(body_folder(folder) / "config.json").get("architectures") or []
    is_base = auto_class_name(stock) == "AutoModel"
    return stock.__name__ in named or (is_base and loader_of(modules.root) == SENTENCE_CLASSES[0])


def _files_in(folder: Path, root: Path) -> Iterator[tuple[str, Path]]:
    """Files of a folder and of the folders in it, no hidden ones, by path.

    A link may lead anywhere, to a key in the user's home too: see `_leads_out`.
    """
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if path.is_file() and not _is_hidden(name) and not _leads_out(path, root):
            yield name.as_posix(), path


def _is_hidden(name: PurePath) -> bool:
    return any(part.startswith(".") or part == "__pycache__" for part in name.parts)


def _leads_out(path: Path, root: Path) -> bool:
    """Whether a path is, by links, outside of the folder of a model.

    The cache of the Hub keeps the content of a repository beside its folders of links.
    """
    place, root = path.resolve(), root.resolve()
    blobs = root.parent.parent / "blobs"
    is_cached = root.parent.name == "snapshots" and place.is_relative_to(blobs)
    return not is_cached and not place.is_relative_to(root)


def _links_out(root: Path) -> list[str]:
    """Names of links to what is there, and outside; those that nobody misses aside."""
    found = []
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root)
        if path.is_symlink() and path.exists() and not _is_hidden(name) and _leads_out(path, root):
            found.append(name.as_posix())
    return [name for name in found if not _matches(name, REPLACED)]


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    """Whether a path fits a pattern; one without a slash is for the root only."""
    return any(
        fnmatchcase(name, pattern) and ("/" in pattern or "/" not in name) for pattern in patterns
    )


def _by_folder(names: list[str]) -> tuple[str, ...]:
    """Paths, those in a folder as the folder."""
    return tuple(dict.fromkeys(f"{n.partition('/')[0]}/" if "/" in n else n for n in names))
