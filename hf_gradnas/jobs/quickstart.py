"""The embedded default: a small Llama, trained on the spot on the text in the package.

``--model quickstart`` is its name. Model, tokenizer and the two parts of the text go into the
folder ``<output>.quickstart``; a folder that is already complete is used again.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError

from .._files import LISTED, replace_folder, temporary_sibling, write_record
from .._manifests import FILES, digests, foreign, sealed, stamps
from ..data.datasets import bundled_text
from ..errors import CheckpointError
from ..types import read_object

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

_RECORD = "quickstart.json"


@dataclass(frozen=True)
class Training:
    """Size of the model and length of its training: about a minute on two CPU cores."""

    vocabulary: int = 512
    hidden: int = 128
    layers: int = 4
    heads: int = 8
    kv_heads: int = 4
    neurons: int = 512
    length: int = 128
    batch: int = 16
    steps: int = 250
    peak_rate: float = 3e-3
    warmup: int = 40
    weight_decay: float = 0.1
    held_out_ratio: float = 0.1
    seed: int = 0


@dataclass(frozen=True)
class Quickstart:
    """A trained model on disk.

    Attributes:
        model: Folder with model and tokenizer.
        train: Text it was trained on; also for calibration.
        held_out: Text it never saw, for evaluation only.
        unigram_perplexity: Of the held-out tokens when only their frequencies are known.
    """

    model: Path
    train: Path
    held_out: Path
    unigram_perplexity: float


def make_quickstart(
    folder: Path,
    training: Training,
    *,
    progress: Callable[[int, int | None], None] | None = None,
) -> Quickstart:
    """Train the model into `folder`, or use what an earlier run with the same numbers left there.

    Raises:
        CheckpointError: `folder` exists but is not one of these, or cannot be written.
    """
    before = stamps(folder)
    known = _read_record(folder)
    if known.get("training") == asdict(training):
        return _at(folder, known["unigram_perplexity"])
    try:
        _check_replaceable(folder)
        with temporary_sibling(folder.absolute()) as unfinished:
            (unfinished / "model").mkdir()
            unigram = _train_into(unfinished, training, progress)
            document = {"training": asdict(training), "unigram_perplexity": unigram}
            text = sealed({**document, FILES: digests(unfinished)})
            write_record(unfinished / _RECORD, text)
            replace_folder(unfinished, folder.absolute(), before)
    except CheckpointError:
        raise
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{folder}: cannot be written ({error}); give another --output."
        ) from error
    return _at(folder, unigram)


def _read_record(folder: Path) -> dict[str, Any]:
    """What an earlier run says of the folder; nothing where that cannot be read."""
    known = read_object(folder / _RECORD)
    return known if isinstance(known.get("unigram_perplexity"), float) else {}


def _check_replaceable(folder: Path) -> None:
    """Check that a folder holds nothing but what an earlier run wrote.

    Raises:
        CheckpointError: It holds more.
    """
    if folder.is_dir():
        others = foreign(folder)
        if others:
            raise CheckpointError(
                f"{folder}: holds files that are not a quickstart model, or changed since "
                f"({', '.join(others[:LISTED])}); remove them, or give another --output."
            )


def _at(folder: Path, unigram: float) -> Quickstart:
    return Quickstart(folder / "model", folder / "train.txt", folder / "held_out.txt", unigram)


def _train_into(
    folder: Path, training: Training, progress: Callable[[int, int | None], None] | None
) -> float:
    train, held_out = split_text(bundled_text(), training.held_out_ratio)
    (folder / "train.txt").write_text(train, encoding="utf-8")
    (folder / "held_out.txt").write_text(held_out, encoding="utf-8")
    tokenizer = train_tokenizer(train, training.vocabulary)
    tokenizer.save_pretrained(folder / "model")
    ids = tokenizer(train, verbose=False)["input_ids"]
    model = _train_model(torch.tensor(ids), tokenizer, training, progress)
    model.save_pretrained(folder / "model")
    return unigram_perplexity(ids, tokenizer(held_out, verbose=False)["input_ids"], len(tokenizer))


def split_text(text: str, held_out_ratio: float) -> tuple[str, str]:
    """The text up to the last paragraph that starts before the held-out part, and the rest."""
    end = text.rindex("\n\n", 0, int(len(text) * (1 - held_out_ratio))) + 1
    return text[:end], text[end:]


def train_tokenizer(text: str, vocabulary: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE trained on `text`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


def unigram_perplexity(train: list[int], held_out: list[int], vocabulary: int) -> float:
    """Perplexity of `held_out` under the token frequencies of `train`, with one added to each."""
    counts = Counter(train)
    total = len(train) + vocabulary
    loss = -sum(math.log((counts[token] + 1) / total) for token in held_out) / len(held_out)
    return math.exp(loss)


def _train_model(
    ids: torch.Tensor,
    tokenizer: Any,
    training: Training,
    progress: Callable[[int, int | None], None] | None,
) -> LlamaForCausalLM:
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(training.seed)
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=training.hidden,
            intermediate_size=training.neurons,
            num_hidden_layers=training.layers,
            num_attention_heads=training.heads,
            num_key_value_heads=training.kv_heads,
            max_position_embeddings=2 * training.length,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        model = LlamaForCausalLM(config)
        model.train()
        optimizer = torch.optim.AdamW(
            model.parameters(),
            lr=training.peak_rate,
            betas=(0.9, 0.95),
            weight_decay=training.weight_decay,
        )
        offsets = torch.arange(training.length)
        for step in range(training.steps):
            for group in optimizer.param_groups:
                group["lr"] = training.peak_rate * _rate(step, training)
            starts = torch.randint(len(ids) - training.length, (training.batch, 1))
            batch = ids[starts + offsets]
            loss = model(input_ids=batch, labels=batch).loss
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            if progress is not None:
                progress(step + 1, training.steps)
    return model.eval()


def _rate(step: int, training: Training) -> float:
    """Linear warm-up, then half a cosine down to a tenth; relative to the peak."""
    if step < training.warmup:
        return (step + 1) / training.warmup
    done = (step - training.warmup) / max(1, training.steps - training.warmup)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * done))
