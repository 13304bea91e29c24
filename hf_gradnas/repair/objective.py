"""The distillation loss: its terms, their weights, and the outputs of a model that they compare.

    L = α·T²·KL(p_teacher^T ‖ p_student^T) + (1 − α)·L_labels
        + β·mean_layers ‖h − h_t‖²/‖h_t‖² + γ·mean_layers KL(ā_t ‖ ā)

(Hinton et al. 2015, arXiv 1503.02531, equation 4 and the remark on T²; hidden states as in Sun et
al. 2019, arXiv 1908.09355, there with both sides normalised; attention probabilities as in Wang et
al. 2020, arXiv 2002.10957, section 3.1.) TinyBERT (Jiao et al. 2020, arXiv 1909.10351, equation 7)
compares attention as a mean squared error of the scores before the softmax, and like MiniLM head by
head. Here ā is the mean of a layer's probabilities over its heads, since pruning changes their
number, and all layers count, since each of the student's comes from one of the teacher's.

Knows weights and names; how far two tensors are from each other is in `divergence`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real
from typing import Any

from ..errors import RecipeError

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
