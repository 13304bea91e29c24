"""The distillation loss: its terms, their weights, and what of two models they compare.

    L = α·T²·KL(p_teacher^T ‖ p_student^T) + (1 − α)·L_labels
        + β·mean_layers ‖h − h_t‖²/‖h_t‖² + γ·mean_layers KL(ā_t ‖ ā)

(Hinton et al. 2015, arXiv 1503.02531, equation 4 and the remark on T²; hidden states as in Sun et
al. 2019, arXiv 1908.09355, there with both sides normalised; attention probabilities as in Wang et
al. 2020, arXiv 2002.10957, section 3.1.) TinyBERT (Jiao et al. 2020, arXiv 1909.10351, equation 7)
compares attention as a mean squared error of the scores before the softmax, and like MiniLM head by
head. Here ā is the mean of a layer's probabilities over its heads, since pruning changes their
number, and all layers count, since each of the student's comes from one of the teacher's.

The outputs of a model name its layers by their order alone, and a layer that lost all its heads is
missing among them. The module that computes a layer's probabilities is at the same path in both
models, so that what counts is read there. Knows weights, names and modules; how far two tensors
are from each other is in `closeness`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from numbers import Real
from typing import Any

from torch import Tensor, nn

from ..errors import RecipeError, StructureError

# Outputs that hold the residual stream, and the mask of their positions.
HIDDEN = {
    "hidden_states": "attention_mask",
    "encoder_hidden_states": "attention_mask",
    "decoder_hidden_states": "decoder_attention_mask",
}
# Outputs that hold attention probabilities, and the masks of their queries and keys.
ATTENTIONS = {
    "attentions": ("attention_mask", "attention_mask"),
    "encoder_attentions": ("attention_mask", "attention_mask"),
    "decoder_attentions": ("decoder_attention_mask", "decoder_attention_mask"),
    "cross_attentions": ("decoder_attention_mask", "attention_mask"),
}


@dataclass(frozen=True, kw_only=True)
class Distillation:
    """Weights of the loss.

    Attributes:
        temperature: T; above 1, small probabilities of the teacher count for more.
        alpha: α; 1 ignores labels, 0 ignores the teacher's predictions. Batches without labels
            are distilled with α = 1.
        hidden_weight: β; 0 does not compare hidden states.
        attention_weight: γ; 0 does not compare attention probabilities. Both models must be loaded
            with ``attn_implementation="eager"`` and without attention dropout.

    Raises:
        RecipeError: A number out of its range.
    """

    temperature: float = 2.0
    alpha: float = 0.5
    hidden_weight: float = 0.0
    attention_weight: float = 0.0

    def __post_init__(self) -> None:
        ranges = {
            "temperature": (is_positive(self.temperature), "a number above 0"),
            "alpha": (is_weight(self.alpha) and self.alpha <= 1, "a number from 0 to 1"),
            "hidden_weight": (is_weight(self.hidden_weight), "0 or more"),
            "attention_weight": (is_weight(self.attention_weight), "0 or more"),
        }
        for name, (is_good, needed) in ranges.items():
            if not is_good:
                raise RecipeError(
                    f"distillation: {name} is {vars(self)[name]!r}, needed {needed}; "
                    f"omit it for {type(self).__dataclass_fields__[name].default}."
                )

    @property
    def needs_teacher(self) -> bool:
        """Whether any term looks at the teacher."""
        return self.alpha > 0 or self.hidden_weight > 0 or self.attention_weight > 0


def is_weight(value: Any) -> bool:
    """Whether a value is a finite number, 0 or more; True and False are none."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return False
    return 0 <= float(value) < math.inf


def is_positive(value: Any) -> bool:
    """Whether a value is a finite number above 0."""
    return is_weight(value) and value != 0


# --- attention probabilities, by the module that computes them ------------------------------------


Seen = dict["Site", list[Tensor | None]]

_PROBABILITIES = 4  # dimensions: (examples, heads, queries, keys)
# Attention without dropout sums to 1, in bfloat16 to within its rounding.
_ROUNDING = 2e-2


@dataclass(frozen=True)
class Site:
    """Where a model computes attention probabilities.

    Attributes:
        path: Of the module.
        place: Of the probabilities among what it returns.
        output: Name among the model's outputs, one of `ATTENTIONS`.
    """

    path: str
    place: int
    output: str


def find_sites(model: nn.Module, inputs: Mapping[str, Any]) -> list[Site]:
    """All sites of a model, in running order; one that runs several times is named once.

    Args:
        model: The teacher.
        inputs: Of one forward.

    Raises:
        StructureError: It returns no attention probabilities.
    """
    made: dict[int, tuple[Tensor, str, int]] = {}  # with the tensor, so that no id is used again

    def note(module: nn.Module, args: Any, output: Any, *, path: str) -> None:
        for place, value in enumerate(output if isinstance(output, tuple) else ()):
            if isinstance(value, Tensor) and value.dim() == _PROBABILITIES:
                made.setdefault(id(value), (value, path, place))  # the innermost module comes first

    with ExitStack() as stack:
        for path, module in model.named_modules():
            stack.callback(module.register_forward_hook(partial(note, path=path)).remove)
        outputs = model(**{**inputs, "output_attentions": True})
    found = [
        Site(*made[id(tensor)][1:], output=name)
        for name in ATTENTIONS
        for tensor in outputs.get(name) or ()
        if id(tensor) in made
    ]
    if not found:
        raise StructureError(_without_attention(model, "the teacher"))
    return list(dict.fromkeys(found))


@contextmanager
def watched(model: nn.Module, sites: Sequence[Site]) -> Iterator[Seen]:
    """Collect what the sites of a model return within the block, one entry per run.

    Sites whose module the model does not have are left out.
    """
    modules = dict(model.named_modules())
    seen: Seen = {site: [] for site in sites if site.path in modules}

    def note(module: nn.Module, args: Any, output: Any, *, site: Site) -> None:
        values = output if isinstance(output, tuple) else (output,)
        value = values[site.place] if site.place < len(values) else None
        seen[site].append(value if isinstance(value, Tensor) else None)

    with ExitStack() as stack:
        for site in seen:
            hook = partial(note, site=site)
            stack.callback(modules[site.path].register_forward_hook(hook).remove)
        yield seen


def pair_attentions(
    student: nn.Module, found: Seen, teacher: nn.Module, wanted: Seen
) -> list[tuple[Site, Tensor, Tensor]]:
    """Probabilities of the student and of the teacher at every site that the student still has.

    Raises:
        StructureError: The student keeps none, returns none, or its positions are others.
    """
    pairs = []
    own, others = dict(student.named_modules()), dict(teacher.named_modules())
    for site, mine in found.items():
        theirs, path = wanted[site], site.path
        if any(tensor is None for tensor in mine):
            if type(own[path]).__name__ == type(others[path]).__name__:
                raise StructureError(_without_attention(student, f"the student at {path}"))
            continue  # an attention without heads was replaced
        shapes = [[_places(tensor) for tensor in side] for side in (mine, theirs)]
        if mine and shapes[0] != shapes[1]:  # a layer that is dropped at random does not run
            raise StructureError(
                f"{path}: the student's attention is over {shapes[0]}, the teacher's over "
                f"{shapes[1]} (examples, queries, keys of each run); distil with "
                "attention_weight=0, or give the model that the student was cut from."
            )
        both = zip(mine, theirs, strict=False)
        pairs += [(site, s, t) for s, t in both if s is not None and t is not None]
    if not pairs:
        raise StructureError(
            f"{type(student).__name__} has none of the {len(wanted)} attentions of the teacher; "
            "distil with attention_weight=0."
        )
    return pairs


def check_probabilities(path: str, probabilities: Tensor, weights: Tensor) -> None:
    """Check that attention sums to 1 over the keys, so that it can be compared.

    Args:
        path: Of the module that computed it.
        probabilities: ``(examples, heads, queries, keys)``.
        weights: ``(examples, queries)``; queries of weight 0 are not looked at.

    Raises:
        StructureError: It does not, as after dropout.
    """
    sums = probabilities.detach().float().sum(-1).transpose(1, 2)[weights != 0]
    error = (sums - 1).abs().max().item() if sums.numel() else 0.0
    if error > _ROUNDING:
        raise StructureError(
            f"{path}: the student's attention is off from a sum of 1 over the keys by "
            f"{error:.2g}, as dropout of attention leaves it; load the model with that dropout at "
            "0 (an option of from_pretrained, such as attention_probs_dropout_prob=0 or "
            "attention_dropout=0), or distil with attention_weight=0."
        )


def _without_attention(model: nn.Module, who: str) -> str:
    return (
        f"{type(model).__name__} ({who}) returns no attention probabilities, as most attention "
        "kernels do not compute them; load both models with attn_implementation='eager', or distil "
        "with attention_weight=0."
    )


def _places(tensor: Tensor | None) -> tuple[int, ...]:
    """Examples, queries and keys of attention probabilities; the number of heads may differ."""
    return () if tensor is None else (tensor.shape[0], *tensor.shape[2:])
