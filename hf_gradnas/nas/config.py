"""`GradNASConfig`: which types of layers the mode ``gradnas`` searches, and how finely.

Field names, defaults and the meaning of globs are those of NVIDIA ModelOpt 0.44 and earlier
(``modelopt.torch.prune``), so that its configs are read as they are. Where the reference has one
key per attention class (``hf.BertAttention``, ``hf.GPTJAttention``), every attention follows
``hf.Attention`` here, which the old keys are read as. Knows names and numbers, not models.
"""

from __future__ import annotations

from collections.abc import ItemsView, Iterable, Iterator, KeysView, Mapping, ValuesView
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Annotated, Any

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    PlainSerializer,
    ValidationError,
    ValidationInfo,
    WrapValidator,
    model_validator,
)
from pydantic_core import CoreSchema, PydanticCustomError

from ..errors import PlanError
from .rules import RULES, AttentionRule, ConvRule, FeatureRule, GroupNormRule, Rule

OLD_ATTENTIONS = ("hf.BertAttention", "hf.GPTJAttention")
"""Keys of the reference that are read as ``hf.Attention``."""
_ADVICE = {
    "ratio": "give fractions of the present size, each above 0 and at most 1, e.g. (0.25, 0.5), "
    "or None for every multiple of the divisor",
    "divisor": "give a whole number of at least 1, e.g. 32",
    "size": "give whole numbers of at least 1, or one tuple of them per choice, e.g. ((3, 3),)",
}


GlobRules = dict[str, dict[str, Any] | None]


def _read_field(value: Any, info: ValidationInfo) -> GlobRules:
    """A field's value with a glob before every rule, each rule with the keys that were given."""
    key = _ALIASES[str(info.field_name)]
    problems: list[str] = []
    rules: GlobRules = {}
    for glob, rule in _by_glob(value, key).items():
        if rule is None:
            rules[glob] = None
            continue
        try:
            rules[glob] = _given(rule, key, glob)
        except PydanticCustomError as error:
            problems.append(error.message())
    if problems:
        raise _problem("\n".join(problems))
    return rules


def _by_glob(value: Any, key: str) -> Mapping[str, Any]:
    """The value as a mapping from glob to rule; an un-nested rule is one for every layer."""
    if value is None or isinstance(value, Rule):
        return {"*": value}
    known = list(RULES[key].model_fields)
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        raise _problem(
            f"{key}: found {value!r}, needed None, a rule or a mapping from globs to rules; "
            f"write for example {{'*': {{{known[-1]!r}: 4}}}}."
        )
    if all(name in known for name in value):
        return {"*": value}
    for name, rule in value.items():
        if name not in known and not (rule is None or isinstance(rule, Mapping | Rule)):
            raise _problem(
                f"{key} → {name}: unknown key {name!r} with the value {rule!r}{_near(name, known)};"
                f" keys of this rule are {', '.join(known)}, and a glob needs a rule or None."
            )
    mixed = [name for name in value if name in known]
    if mixed:
        globs = ", ".join(repr(name) for name in value if name not in known)
        raise _problem(
            f"{key} → {mixed[0]}: stands beside the globs {globs}; put it into a rule of its own, "
            f"{{'*': {{{mixed[0]!r}: {value[mixed[0]]!r}}}, ...}}."
        )
    return value


def _given(rule: Any, key: str, glob: str) -> dict[str, Any]:
    """The keys that a rule gives, checked; what it leaves out is not there."""
    try:
        return RULES[key].model_validate(rule).model_dump(exclude_unset=True)
    except ValidationError as error:
        known = RULES[key].model_fields
        parts = []
        for problem in error.errors(include_url=False):
            path = " → ".join(str(part) for part in (key, glob, *problem["loc"]))
            name = str(problem["loc"][0]) if problem["loc"] else ""
            if name and name not in known:
                reason = f"unknown key{_near(name, known)}"
                advice = f"keys of this rule are {', '.join(known)}"
            else:
                reason = problem["msg"].removeprefix("Value error, ").replace("Input", "it", 1)
                reason = f"found {problem['input']!r}: {reason}"
                advice = _ADVICE.get(name.rpartition("_")[2], f"keys are {', '.join(known)}")
            parts.append(f"{path}: {reason}; {advice}.")
        raise _problem("\n".join(parts)) from error


def _near(name: str, known: Iterable[str]) -> str:
    """The nearest known name as a question; blind to case, since `nn.linear` is a likely slip."""
    names = {other.lower(): other for other in known}
    close = get_close_matches(name.lower(), names, n=1, cutoff=0.5)
    return f" (did you mean {names[close[0]]!r}?)" if close else ""


def _problem(message: str) -> PydanticCustomError:
    # Not a ValueError, whose text pydantic would put after words of its own.
    return PydanticCustomError("gradnas_rule", "{message}", {"message": message})


class _Forms:
    """Reads the forms that a field takes into `GlobRules`, and describes them in the JSON schema.

    Not `json_schema_input_type`, which loses models in pydantic 2.10.
    """

    def __init__(self, forms: Any) -> None:
        self.forms = forms

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        read = WrapValidator(lambda value, _, info: _read_field(value, info))
        write = PlainSerializer(lambda value: value, return_type=source)
        return handler.generate_schema(Annotated[self.forms, read, write])


_Convs = Annotated[GlobRules, _Forms(ConvRule | dict[str, ConvRule | None] | None)]
_Features = Annotated[GlobRules, _Forms(FeatureRule | dict[str, FeatureRule | None] | None)]
_GroupNorms = Annotated[GlobRules, _Forms(GroupNormRule | dict[str, GroupNormRule | None] | None)]
_Heads = Annotated[GlobRules, _Forms(AttentionRule | dict[str, AttentionRule | None] | None)]

# Copied into every config by pydantic.
_RATIOS = tuple(0.05 * i for i in range(1, 21))
_CONV: GlobRules = {"*": {"channels_ratio": _RATIOS, "kernel_size": (), "channel_divisor": 32}}
_FEATURE: GlobRules = {"*": {"features_ratio": _RATIOS, "feature_divisor": 32}}
_GROUP_NORM: GlobRules = {"*": {"channels_ratio": _RATIOS, "channel_divisor": 32}}
_ATTENTION: GlobRules = {"*": {"n_heads_ratio": None, "n_heads_divisor": 1}}


class GradNASConfig(BaseModel):
    """Which sizes are tried for which layers, by type of layer and name of the module.

    The value of a type is None (layers of this type stay as they are), one rule for all its layers,
    or a mapping from globs over module names to a rule or None, as in ``{"nn.Linear": {"*":
    {"feature_divisor": 64}, "*lm_head*": None}}``. Globs are tried in order: a later rule that
    matches overwrites the keys that it gives, and a later None turns the layer off. A type that is
    not given keeps its default. What a rule leaves out is not taken from the default but, as in the
    reference, means no limit: every multiple of the divisor, and the divisor 1.

    Types are given under their own names (``nn.Linear``) or those of the fields (``nn_linear``).
    The config reads like a dictionary over the types.
    """

    model_config = ConfigDict(extra="forbid", validate_assignment=True, populate_by_name=True)

    nn_conv1d: _Convs = Field(_CONV, alias="nn.Conv1d", description="Output channels.")
    nn_conv2d: _Convs = Field(_CONV, alias="nn.Conv2d", description="Output channels.")
    nn_conv3d: _Convs = Field(_CONV, alias="nn.Conv3d", description="Output channels.")
    nn_convtranspose1d: _Convs = Field(
        _CONV, alias="nn.ConvTranspose1d", description="Output channels."
    )
    nn_convtranspose2d: _Convs = Field(
        _CONV, alias="nn.ConvTranspose2d", description="Output channels."
    )
    nn_convtranspose3d: _Convs = Field(
        _CONV, alias="nn.ConvTranspose3d", description="Output channels."
    )
    nn_linear: _Features = Field(
        _FEATURE,
        alias="nn.Linear",
        description="Output features; an FFN of Transformers follows its first projection.",
    )
    nn_batchnorm1d: _Features = Field(_FEATURE, alias="nn.BatchNorm1d", description="Features.")
    nn_batchnorm2d: _Features = Field(_FEATURE, alias="nn.BatchNorm2d", description="Features.")
    nn_batchnorm3d: _Features = Field(_FEATURE, alias="nn.BatchNorm3d", description="Features.")
    nn_syncbatchnorm: _Features = Field(_FEATURE, alias="nn.SyncBatchNorm", description="Features.")
    nn_instancenorm1d: _Features = Field(
        _FEATURE, alias="nn.InstanceNorm1d", description="Features."
    )
    nn_instancenorm2d: _Features = Field(
        _FEATURE, alias="nn.InstanceNorm2d", description="Features."
    )
    nn_instancenorm3d: _Features = Field(
        _FEATURE, alias="nn.InstanceNorm3d", description="Features."
    )
    nn_layernorm: _Features = Field(_FEATURE, alias="nn.LayerNorm", description="Features.")
    nn_groupnorm: _GroupNorms = Field(_GROUP_NORM, alias="nn.GroupNorm", description="Channels.")
    hf_attention: _Heads = Field(
        _ATTENTION,
        alias="hf.Attention",
        description="Heads of every attention of Transformers.",
    )

    @model_validator(mode="before")
    @classmethod
    def _check_keys(cls, values: Any) -> Any:
        """Refuse types that are unknown, with the nearest known name, or given twice."""
        if isinstance(values, Mapping):
            values = _without_old_names(values)
            seen: set[str] = set()
            for name in values:
                key = _ALIASES.get(name, name)
                if key not in RULES:
                    raise _problem(_unknown(name))
                if key in seen:
                    raise _problem(f"{key}: given twice, also as {_field_name(key)}; give it once.")
                seen.add(key)
        return values

    def rule_for(self, key: str, name: str) -> Rule | None:
        """Rule of one layer, with every key filled in.

        Args:
            key: Type of the layer, e.g. ``"nn.Linear"``.
            name: Path of the module in the model.

        Returns:
            A `ConvRule`, `FeatureRule`, `GroupNormRule` or `AttentionRule`; None if the type is
            turned off for this layer or no glob matches it.

        Raises:
            PlanError: The type is unknown, or a rule was edited in place to something impossible.
        """
        key = self._alias(key)
        merged: dict[str, Any] | None = None
        for glob, rule in self[key].items():
            if not fnmatchcase(name, glob):
                continue
            try:
                merged = None if rule is None else {**(merged or {}), **_given(rule, key, glob)}
            except PydanticCustomError as error:
                raise PlanError(error.message()) from error
        return None if merged is None else RULES[key](**merged)

    def update(self, config: Mapping[str, Any]) -> None:
        """Replace the rules of the given types; either all are accepted or nothing changes.

        Raises:
            pydantic.ValidationError: A type or a rule is refused.
        """
        given = {_ALIASES.get(name, name): value for name, value in config.items()}
        checked = type(self).model_validate({**self._mapping(), **given})
        for key in given:
            setattr(self, _field_name(key), checked[key])

    def get(self, key: str, default: Any = None) -> Any:
        """Rules of a type by glob, or `default` if there is no such type."""
        return self._mapping().get(_ALIASES.get(key, key), default)

    def keys(self) -> KeysView[str]:
        """Types of layers."""
        return self._mapping().keys()

    def values(self) -> ValuesView[GlobRules]:
        """Rules by glob, one mapping per type."""
        return self._mapping().values()

    def items(self) -> ItemsView[str, GlobRules]:
        """Types with their rules by glob."""
        return self._mapping().items()

    def model_dump(self, **options: Any) -> dict[str, Any]:
        """Dictionary under the types' own names, as `pydantic.BaseModel.model_dump` otherwise."""
        return super().model_dump(**{"by_alias": True, **options})

    def model_dump_json(self, **options: Any) -> str:
        """JSON under the types' own names, as `pydantic.BaseModel.model_dump_json` otherwise."""
        return super().model_dump_json(**{"by_alias": True, **options})

    def __getitem__(self, key: str) -> GlobRules:
        return self._mapping()[self._alias(key)]

    def __setitem__(self, key: str, value: Any) -> None:
        self.update({key: value})

    def __contains__(self, key: object) -> bool:
        return key in RULES or key in _ALIASES

    def __iter__(self) -> Iterator[str]:  # type: ignore[override]  # over types, as the reference
        return iter(RULES)

    def __len__(self) -> int:
        return len(RULES)

    def _mapping(self) -> dict[str, GlobRules]:
        return {alias: self.__dict__[name] for name, alias in _ALIASES.items()}

    @staticmethod
    def _alias(key: str) -> str:
        key = _ALIASES.get(key, key)
        if key not in RULES:
            raise PlanError(_unknown(key))
        return key


def _without_old_names(values: Mapping[str, Any]) -> dict[str, Any]:
    """The reference's keys of attentions as ``hf.Attention``, which takes their place."""
    old = [values[name] for name in OLD_ATTENTIONS if name in values]
    new = {name: value for name, value in values.items() if name not in OLD_ATTENTIONS}
    if not old or {"hf.Attention", "hf_attention"} & new.keys():
        return new
    if any(value != old[0] for value in old):
        raise _problem(
            f"GradNASConfig → {' and '.join(OLD_ATTENTIONS)}: have different rules, and one key "
            "stands for every attention here; give 'hf.Attention', with globs where they differ."
        )
    return {**new, "hf.Attention": old[0]}


def _field_name(key: str) -> str:
    return key.replace(".", "_").lower()


def _unknown(name: Any) -> str:
    return (
        f"GradNASConfig → {name}: unknown type of layer{_near(str(name), RULES)}; "
        f"types are {', '.join(RULES)}."
    )


_ALIASES = {_field_name(key): key for key in RULES}
