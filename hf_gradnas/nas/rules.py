"""Rules of `GradNASConfig`: the sizes to try for one layer. Knows numbers, not models."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


def _read_kernel(value: Any) -> Any:
    """Check one kernel size here: the union behind it would report it once per member."""
    sizes = value if isinstance(value, list | tuple) else (value,)
    if not sizes or any(type(size) is not int or size < 1 for size in sizes):
        raise ValueError("it should be a whole number of at least 1, or a tuple of such")
    return value


Ratios = tuple[Annotated[float, Field(strict=True, gt=0, le=1, allow_inf_nan=False)], ...]
Divisor = Annotated[int, Field(strict=True, ge=1)]
Kernels = tuple[Annotated[Divisor | tuple[Divisor, ...], BeforeValidator(_read_kernel)], ...]

_RATIO = (
    "Sizes to try, as fractions of the present one. Left out or null: every multiple of the "
    "divisor. Empty: only the present size."
)
_DIVISOR = "Sizes to try are rounded to multiples of this. Left out: 1."


class Rule(BaseModel):
    """Sizes to try for one layer. What a rule leaves out is filled in as by the reference."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @property
    def ratios(self) -> tuple[float, ...] | None:
        """Sizes to try as fractions of the present one; None: every multiple of `divisor`."""
        return next(value for name, value in self if name.endswith("_ratio"))

    @property
    def divisor(self) -> int:
        """What the sizes to try are rounded to a multiple of."""
        return next(value for name, value in self if name.endswith("_divisor"))


class ConvRule(Rule):
    """Sizes to try for a convolution."""

    channels_ratio: Ratios | None = Field(default=None, description=_RATIO)
    kernel_size: Kernels = Field(
        default=(),
        description="Kernel sizes to try; only the present one is possible, so leave it empty.",
    )
    channel_divisor: Divisor = Field(default=1, description=_DIVISOR)


class FeatureRule(Rule):
    """Sizes to try for a linear layer or a norm."""

    features_ratio: Ratios | None = Field(default=None, description=_RATIO)
    feature_divisor: Divisor = Field(default=1, description=_DIVISOR)


class GroupNormRule(Rule):
    """Sizes to try for a group norm."""

    channels_ratio: Ratios | None = Field(default=None, description=_RATIO)
    channel_divisor: Divisor = Field(default=1, description=_DIVISOR)


class AttentionRule(Rule):
    """Numbers of heads to try for an attention of Transformers."""

    n_heads_ratio: Ratios | None = Field(default=None, description=_RATIO)
    n_heads_divisor: Divisor = Field(default=1, description=_DIVISOR)


# Rule model per type of layer, in the order of the fields.
RULES: dict[str, type[Rule]] = {
    **dict.fromkeys(("nn.Conv1d", "nn.Conv2d", "nn.Conv3d"), ConvRule),
    **dict.fromkeys(("nn.ConvTranspose1d", "nn.ConvTranspose2d", "nn.ConvTranspose3d"), ConvRule),
    "nn.Linear": FeatureRule,
    **dict.fromkeys(("nn.BatchNorm1d", "nn.BatchNorm2d", "nn.BatchNorm3d"), FeatureRule),
    "nn.SyncBatchNorm": FeatureRule,
    **dict.fromkeys(("nn.InstanceNorm1d", "nn.InstanceNorm2d", "nn.InstanceNorm3d"), FeatureRule),
    "nn.LayerNorm": FeatureRule,
    "nn.GroupNorm": GroupNormRule,
    "hf.Attention": AttentionRule,
}
