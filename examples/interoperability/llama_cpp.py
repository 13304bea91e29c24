"""Exports a checkpoint to GGUF and compares what llama.cpp makes of it with Transformers.

    pip install gguf xllamacpp
    python examples/interoperability/llama_cpp.py ./smollm2-gradnas --text wikitext2-valid.txt

For each type: whether the text is split into the same tokens, whether greedy text is the same, how
far the log-probabilities are apart, and the perplexity. Transformers runs in float32, llama.cpp
as it does by default, on the CPU. Where greedy texts part, the margin between the two tokens in
Transformers is printed, and how many texts are the same with keys and values in float32: llama.cpp
keeps these in float16 otherwise, which tips what is nearly a tie.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import xllamacpp
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_gradnas  # noqa: F401 - per-layer checkpoints load
from hf_gradnas.export import export_gguf

PROMPTS = (
    "The history of the city begins with",
    "In the beginning, the king said to his",
    "Photosynthesis is the process by which",
    "def fibonacci(n):\n    ",
)
MARGIN = 1000.0  # of a bias that lets llama.cpp take the token that the text goes on with


class LlamaCpp:
    """A GGUF file in llama.cpp's own server.

    Args:
        file: To load.
        context: Most tokens at once.
        exact: Keep keys and values in float32.
    """

    def __init__(self, file: Path, *, context: int = 512, exact: bool = False) -> None:
        settings = xllamacpp.CommonParams()
        settings.model.path = str(file)
        settings.n_ctx = context
        settings.n_parallel = 1
        settings.warmup = False
        settings.verbosity = -1
        settings.cpuparams.n_threads = torch.get_num_threads()
        if exact:
            settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
            settings.flash_attn_type = (
                xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
            )
        self._server = xllamacpp.Server(settings)

    def _ask(self, path: str, question: dict[str, Any]) -> dict[str, Any]:
        address = f"{self._server.listening_address}{path}"
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(address, json.dumps(question).encode(), headers)
        with urllib.request.urlopen(request) as answer:
            return json.load(answer)

    def tokens(self, text: str) -> list[int]:
        """Tokens of a text, as llama.cpp splits it."""
        question = {"content": text, "add_special": True, "parse_special": True}
        return self._ask("/tokenize", question)["tokens"]

    def _next(self, ids: Sequence[int], **settings: Any) -> tuple[int, float | None]:
        """The next token and its log-probability; None: it is a part of a character."""
        question = {"prompt": list(ids), "n_predict": 1, "temperature": 0, "n_probs": 1}
        answer = self._ask("/completion", {**question, "return_tokens": True, **settings})
        found = answer.get("completion_probabilities")
        return answer["tokens"][0], found[0]["logprob"] if found else None

    def greedy(self, ids: Sequence[int], count: int) -> list[int]:
        """The most likely tokens, one after the other."""
        found: list[int] = []
        for _ in range(count):
            found.append(self._next([*ids, *found])[0])
        return found

    def logprob(self, ids: Sequence[int], token: int) -> float | None:
        """Log-probability of a token after others: the server gives it before its own bias."""
        found, logprob = self._next(ids, logit_bias=[[token, MARGIN]])
        assert found == token
        return logprob


@torch.no_grad()
def logprobs_of(model: Any, ids: Sequence[int]) -> torch.Tensor:
    """Log-probabilities ``(positions, vocabulary)`` in Transformers."""
    return model(torch.tensor([list(ids)])).logits[0].float().log_softmax(-1)


@torch.no_grad()
def greedy(model: Any, ids: Sequence[int], count: int) -> list[int]:
    """The most likely tokens in Transformers; an end of the text does not stop it."""
    model.generation_config.eos_token_id = None
    found = model.generate(
        torch.tensor([list(ids)]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.long),
        max_new_tokens=count,
        do_sample=False,
        pad_token_id=0,
    )
    return found[0, len(ids) :].tolist()


def margin_of(model: Any, engine: LlamaCpp, ids: Sequence[int], count: int) -> float:
    """How sure Transformers is of its token where the greedy texts part; 0 if they do not."""
    ours, theirs = greedy(model, ids, count), engine.greedy(ids, count)
    for at, (own, other) in enumerate(zip(ours, theirs, strict=True)):
        if own != other:
            row = logprobs_of(model, [*ids, *ours[:at]])[-1]
            return float(row[own] - row[other])
    return 0.0


def windows(ids: Sequence[int], *, length: int, count: int) -> Iterator[list[int]]:
    """Pieces of a text, spread over all of it."""
    step = max(length, (len(ids) - length) // max(1, count))
    starts = range(0, max(1, len(ids) - length + 1), step)
    for start in [*starts][:count]:
        yield list(ids[start : start + length])


def greedy_texts(model: Any, tokenizer: Any, engine: LlamaCpp, count: int) -> tuple[bool, str]:
    """Whether all greedy texts are the same, and in words how many."""
    margins = [margin_of(model, engine, tokenizer(p)["input_ids"], count) for p in PROMPTS]
    parted = "".join(f" (margin {margin:.4f})" for margin in margins if margin)
    return not any(margins), f"{margins.count(0.0)} of {len(margins)}{parted}"


def compare(model: Any, tokenizer: Any, engine: LlamaCpp, text: str, options: Any) -> dict:
    """What is equal, and how far apart the rest is."""
    lines = [line for line in text.splitlines() if line.strip()][: options.lines]
    split = [engine.tokens(line) == tokenizer(line)["input_ids"] for line in lines]
    here, there = [], []
    ids = tokenizer(text[: options.characters])["input_ids"]
    for window in windows(ids, length=options.window, count=options.windows):
        rows = logprobs_of(model, window)
        for at in range(1, len(window)):
            logprob = engine.logprob(window[:at], window[at])
            if logprob is not None:
                here.append(float(rows[at - 1, window[at]]))
                there.append(logprob)
    differences = (torch.tensor(here) - torch.tensor(there)).abs()
    perplexities = [math.exp(-sum(found) / len(found)) for found in (here, there)]
    return {
        "lines with the same tokens": f"{sum(split)} of {len(split)}",
        "difference of log-probabilities": f"median {differences.median():.1e}, "
        f"largest {differences.max():.1e}",
        f"perplexity on {len(here)} tokens": f"{perplexities[1]:.4f}, Transformers "
        f"{perplexities[0]:.4f} ({perplexities[1] / perplexities[0] - 1:+.3%})",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="of the checkpoint")
    parser.add_argument("--text", type=Path, required=True, help="file to measure on")
    parser.add_argument("--types", default="f16,q8_0", help="of f32, f16, bf16, q8_0")
    parser.add_argument("--new", type=int, default=32, help="tokens of a greedy text")
    parser.add_argument("--window", type=int, default=128, help="tokens of a piece of the text")
    parser.add_argument("--windows", type=int, default=8, help="pieces of the text")
    parser.add_argument("--lines", type=int, default=200, help="lines that are split into tokens")
    parser.add_argument("--characters", type=int, default=400_000, help="of the text")
    parser.add_argument("--exact", action="store_true", help="keys and values in float32")
    options = parser.parse_args()
    text = options.text.read_text(encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(options.folder)
    model = AutoModelForCausalLM.from_pretrained(options.folder, dtype=torch.float32).eval()
    with tempfile.TemporaryDirectory() as folder:
        for kind in options.types.split(","):
            found = export_gguf(options.folder, Path(folder) / f"{kind}.gguf", type=kind)
            others = f"{len(found.fallen_back)} of {found.tensors} tensors in f16 instead"
            print(f"{kind}: {found.architecture}, {found.size / 1e6:.1f} MB, {others}")
            context = max(512, 2 * options.window)
            engine = LlamaCpp(found.file, context=context, exact=options.exact)
            same, texts = greedy_texts(model, tokenizer, engine, options.new)
            what = f"greedy texts of {options.new} tokens that are the same"
            print(f"  {what}: {texts}", flush=True)
            if not same and not options.exact:
                exact = LlamaCpp(found.file, context=context, exact=True)
                _, texts = greedy_texts(model, tokenizer, exact, options.new)
                print(f"  {what}, keys and values in float32: {texts}", flush=True)
            for what, value in compare(model, tokenizer, engine, text, options).items():
                print(f"  {what}: {value}", flush=True)


if __name__ == "__main__":
    main()
