"""The reference's config: its defaults, globs in order, and messages that name the path."""

import copy
import json
import pickle  # noqa: TID251 - users may pickle a config
import re

import numpy as np
import pytest
from pydantic import BaseModel, ValidationError

from hf_gradnas.errors import GradNASError, PlanError
from hf_gradnas.nas.config import GradNASConfig
from hf_gradnas.nas.rules import (
    AttentionRule,
    ConvRule,
    FeatureRule,
    GroupNormRule,
    Rule,
)

RATIOS = [
    *[0.05, 0.1, 0.15000000000000002, 0.2, 0.25, 0.30000000000000004, 0.35000000000000003, 0.4],
    *[0.45, 0.5, 0.55, 0.6000000000000001, 0.65, 0.7000000000000001, 0.75, 0.8],
    *[0.8500000000000001, 0.9, 0.9500000000000001, 1.0],
]
CONV = {"*": {"channels_ratio": RATIOS, "kernel_size": [], "channel_divisor": 32}}
FEATURE = {"*": {"features_ratio": RATIOS, "feature_divisor": 32}}
TABLE = {
    "nn.Conv1d": CONV,
    "nn.Conv2d": CONV,
    "nn.Conv3d": CONV,
    "nn.ConvTranspose1d": CONV,
    "nn.ConvTranspose2d": CONV,
    "nn.ConvTranspose3d": CONV,
    "nn.Linear": FEATURE,
    "nn.BatchNorm1d": FEATURE,
    "nn.BatchNorm2d": FEATURE,
    "nn.BatchNorm3d": FEATURE,
    "nn.SyncBatchNorm": FEATURE,
    "nn.InstanceNorm1d": FEATURE,
    "nn.InstanceNorm2d": FEATURE,
    "nn.InstanceNorm3d": FEATURE,
    "nn.LayerNorm": FEATURE,
    "nn.GroupNorm": {"*": {"channels_ratio": RATIOS, "channel_divisor": 32}},
    "hf.Attention": {"*": {"n_heads_ratio": None, "n_heads_divisor": 1}},
}


def given(**types):
    """A config from types by field name, e.g. ``nn_linear={...}``."""
    return GradNASConfig(**types)


def test_the_defaults_are_the_reference_s_table_in_its_order():
    dumped = json.loads(GradNASConfig().model_dump_json())
    assert dumped == TABLE
    assert list(dumped) == list(TABLE)
    assert [list(rules["*"]) for rules in dumped.values()] == [list(r["*"]) for r in TABLE.values()]
    assert GradNASConfig().model_dump(mode="json") == TABLE


def test_a_python_dump_has_tuples_and_the_types_own_names():
    dumped = GradNASConfig().model_dump()
    assert dumped["nn.Conv1d"] == {
        "*": {"channels_ratio": tuple(RATIOS), "kernel_size": (), "channel_divisor": 32}
    }
    assert next(iter(GradNASConfig().model_dump(by_alias=False))) == "nn_conv1d"
    assert json.loads(GradNASConfig().model_dump_json(include={"hf_attention"})) == {
        "hf.Attention": TABLE["hf.Attention"]
    }


def test_defaults_are_shared_by_no_two_types_or_configs():
    one, two = GradNASConfig(), GradNASConfig()
    one["nn.Conv1d"]["*"]["channel_divisor"] = 8
    assert one["nn.Conv2d"] == two["nn.Conv1d"] == two["nn.Conv2d"]
    assert GradNASConfig().model_dump(mode="json") == TABLE


@pytest.mark.parametrize("key", ["nn.Linear", "nn_linear"])
def test_every_form_of_a_value_gets_its_globs(key):
    def read(value):
        return GradNASConfig(**{key: value})["nn.Linear"]

    assert read(None) == {"*": None}
    assert read({"feature_divisor": 64}) == {"*": {"feature_divisor": 64}}
    assert read({}) == {"*": {}}
    assert read(FeatureRule(feature_divisor=64)) == {"*": {"feature_divisor": 64}}
    nested = {"*": {"features_ratio": [0.5, 0.5, 1]}, "*lm_head*": None}
    assert read(nested) == {"*": {"features_ratio": (0.5, 0.5, 1.0)}, "*lm_head*": None}
    assert list(read(nested)) == ["*", "*lm_head*"]
    assert read({"a": FeatureRule(), "b": {}, "feature": {}}) == {"a": {}, "b": {}, "feature": {}}


def test_other_types_keep_their_defaults():
    config = GradNASConfig.model_validate({"nn.Linear": None})
    assert {**config.model_dump(mode="json"), "nn.Linear": FEATURE} == TABLE


def test_numpy_s_floats_are_ratios():
    config = given(nn_linear={"features_ratio": tuple(np.linspace(0.5, 1, 3))})
    assert config.rule_for("nn.Linear", "a").ratios == (0.5, 0.75, 1.0)


def test_the_default_rule_of_every_type():
    config = GradNASConfig()
    ratios = tuple(RATIOS)
    conv = ConvRule(channels_ratio=ratios, kernel_size=(), channel_divisor=32)
    feature = FeatureRule(features_ratio=ratios, feature_divisor=32)
    group_norm = GroupNormRule(channels_ratio=ratios, channel_divisor=32)
    for key in TABLE:
        expected = conv if "Conv" in key else feature
        expected = {"nn.GroupNorm": group_norm, "hf.Attention": AttentionRule()}.get(key, expected)
        assert config.rule_for(key, "a.b") == expected


def test_a_rule_that_leaves_out_keys_is_filled_as_by_the_reference():
    config = given(nn_linear={"feature_divisor": 64}, nn_conv2d={}, nn_groupnorm={})
    assert config.rule_for("nn.Linear", "a") == FeatureRule(features_ratio=None, feature_divisor=64)
    assert config.rule_for("nn.Conv2d", "a") == ConvRule(
        channels_ratio=None, kernel_size=(), channel_divisor=1
    )
    assert config.rule_for("nn.GroupNorm", "a").divisor == 1


def test_later_globs_overwrite_key_by_key_and_none_turns_off():
    config = given(
        nn_linear={
            "*": {"features_ratio": (0.5,), "feature_divisor": 8},
            "*.1.*": {"feature_divisor": 4},
            "*.2.*": None,
            "*.2.up": {"feature_divisor": 2},
            "*lm_head*": None,
        }
    )
    rules = {
        "layer.0.up": FeatureRule(features_ratio=(0.5,), feature_divisor=8),
        "layer.1.up": FeatureRule(features_ratio=(0.5,), feature_divisor=4),
        "layer.2.down": None,
        "layer.2.up": FeatureRule(feature_divisor=2),
        "model.lm_head": None,
    }
    assert {name: config.rule_for("nn.Linear", name) for name in rules} == rules
    assert config.rule_for("nn_linear", "layer.1.up") == rules["layer.1.up"]


def test_an_earlier_none_is_overwritten_by_a_later_rule_for_all():
    config = given(nn_linear={"head": None, "*": {"feature_divisor": 4}})
    assert config.rule_for("nn.Linear", "head") == FeatureRule(feature_divisor=4)


def test_globs_mind_case_and_what_none_matches_is_off():
    config = given(nn_linear={"Head*": {}})
    assert config.rule_for("nn.Linear", "Head.0") == FeatureRule()
    assert config.rule_for("nn.Linear", "head.0") is None


def test_a_rule_knows_its_ratios_and_divisor_under_common_names():
    assert ConvRule(channels_ratio=(0.5,), channel_divisor=2).ratios == (0.5,)
    assert GroupNormRule(channel_divisor=2).divisor == 2
    assert AttentionRule(n_heads_ratio=(1,), n_heads_divisor=3).divisor == 3


def test_rules_are_frozen():
    with pytest.raises(ValidationError, match="frozen"):
        FeatureRule().feature_divisor = 2


def test_the_config_reads_like_a_dictionary():
    config = given(nn_linear=None)
    assert len(config) == 17
    assert list(config) == list(config.keys()) == list(TABLE)
    assert dict(config) == dict(config.items()) == config.model_dump()
    assert list(config.values()) == list(config.model_dump().values())
    assert config["nn.Linear"] is config["nn_linear"] is config.nn_linear is config.get("nn.Linear")
    assert config.get("nn_linear") == {"*": None}
    assert "nn.Linear" in config
    assert "nn_linear" in config
    assert "nn.linear" not in config
    assert config.get("nn.linear") is None
    assert config.get("nn.linear", 3) == 3


def test_assignment_is_validated_in_each_of_its_forms():
    config = GradNASConfig()
    config["nn.Linear"] = {"feature_divisor": 4}
    config["nn_conv1d"] = None
    config.nn_conv2d = {"a": None}
    config.update({"nn.LayerNorm": {}, "nn_conv3d": {"kernel_size": [3, [3, 5, 5]]}})
    assert config["nn.Linear"] == {"*": {"feature_divisor": 4}}
    assert config["nn.Conv1d"] == {"*": None}
    assert config["nn.Conv2d"] == {"a": None}
    assert config["nn.LayerNorm"] == {"*": {}}
    assert config["nn.Conv3d"] == {"*": {"kernel_size": (3, (3, 5, 5))}}
    assert config["nn.GroupNorm"] == GradNASConfig()["nn.GroupNorm"]


def test_a_refused_assignment_changes_nothing():
    config = GradNASConfig()
    with pytest.raises(ValidationError, match=r"nn\.Conv1d → \* → channel_divisor: found 0"):
        config.update({"nn.Linear": None, "nn.Conv1d": {"channel_divisor": 0}})
    with pytest.raises(ValidationError, match=r"nn\.Conv1d → \* → channel_divisor: found 0"):
        config.nn_conv1d = {"channel_divisor": 0}
    with pytest.raises(ValidationError, match=r"nn\.Linar.*did you mean 'nn\.Linear'"):
        config["nn.Linar"] = None
    assert config == GradNASConfig()


def test_an_unknown_type_is_an_error_of_ours_with_the_nearest_name():
    config = GradNASConfig()
    for ask in (lambda key: config[key], lambda key: config.rule_for(key, "a")):
        with pytest.raises(PlanError, match=r"nn\.linear: unknown.*did you mean 'nn\.Linear'"):
            ask("nn.linear")
    assert issubclass(PlanError, GradNASError)
    assert issubclass(PlanError, ValueError)


def test_a_rule_that_was_edited_in_place_is_checked_when_it_is_used():
    config = GradNASConfig(nn_linear={"*": {"feature_divisor": 4}, "a": {"features_ratio": (1,)}})
    config["nn.Linear"]["*"]["feature_divisor"] = 0
    with pytest.raises(PlanError, match=r"nn\.Linear → \* → feature_divisor: found 0: .*; give"):
        config.rule_for("nn.Linear", "a")


BAD = {
    "a ratio above 1": (
        {"nn.Linear": {"*": {"features_ratio": (0.1, 0.2, 0.3, 1.5)}}},
        r"nn\.Linear → \* → features_ratio → 3: found 1\.5: .*less than or equal to 1; give frac",
    ),
    "a ratio of 0": (
        {"nn.Conv1d": {"channels_ratio": [0]}},
        r"nn\.Conv1d → \* → channels_ratio → 0: found 0: .*greater than 0; give fractions",
    ),
    "a negative ratio": (
        {"hf.Attention": {"n_heads_ratio": (-0.5,)}},
        r"hf\.Attention → \* → n_heads_ratio → 0: found -0\.5",
    ),
    "nan": (
        {"nn.Linear": {"features_ratio": (float("nan"),)}},
        r"features_ratio → 0: found nan: .*; give fractions",
    ),
    "a ratio that is a bool": (
        {"nn.Linear": {"features_ratio": (True,)}},
        r"features_ratio → 0: found True: .*; give fractions",
    ),
    "a ratio that is text": (
        {"nn.Linear": {"features_ratio": ("0.5",)}},
        r"features_ratio → 0: found '0\.5'",
    ),
    "one ratio": ({"nn.Linear": {"features_ratio": 0.5}}, r"features_ratio: found 0\.5: .*tuple"),
    "a divisor of 0": (
        {"nn.GroupNorm": {"norm": {"channel_divisor": 0}}},
        r"nn\.GroupNorm → norm → channel_divisor: found 0: .*; give a whole number of at least 1",
    ),
    "a divisor that is a bool": (
        {"nn.Linear": {"feature_divisor": True}},
        r"feature_divisor: found True: .*; give a whole number",
    ),
    "a fractional divisor": ({"nn.Linear": {"feature_divisor": 1.5}}, r"divisor: found 1\.5"),
    "a divisor of None": ({"nn.Linear": {"feature_divisor": None}}, r"divisor: found None"),
    "a kernel size of 0": (
        {"nn.Conv2d": {"kernel_size": (3, 0)}},
        r"nn\.Conv2d → \* → kernel_size → 1: found 0: it should be a whole number.*; give whole",
    ),
    "0 in a kernel size": (
        {"nn.Conv2d": {"kernel_size": ((3, 3), (3, 0))}},
        r"kernel_size → 1: found \(3, 0\)",
    ),
    "an empty kernel size": ({"nn.Conv2d": {"kernel_size": ((),)}}, r"kernel_size → 0: found \(\)"),
    "a kernel size that is a bool": ({"nn.Conv2d": {"kernel_size": (True,)}}, r"→ 0: found True"),
    "one kernel size": ({"nn.Conv2d": {"kernel_size": 3}}, r"kernel_size: found 3: .*tuple"),
    "an unknown type": (
        {"nn.conv2d": None},
        r"GradNASConfig → nn\.conv2d: unknown type.*did you mean 'nn\.Conv2d'\?\); types are nn\.",
    ),
    "the reference's attentions, with different rules": (
        {"hf.BertAttention": None, "hf.GPTJAttention": {}},
        r"hf\.BertAttention and hf\.GPTJAttention: have different rules",
    ),
    "a type with no near name": ({"x": None}, r"GradNASConfig → x: unknown type of layer; types"),
    "a type given twice": (
        {"nn.Linear": None, "nn_linear": None},
        r"nn\.Linear: given twice, also as nn_linear; give it once",
    ),
    "an unknown key": (
        {"nn.Linear": {"*": {"feature_divsor": 4}}},
        r"nn\.Linear → \* → feature_divsor: unknown key \(did you mean 'feature_divisor'\?\); keys",
    ),
    "another type's key": (
        {"nn.Linear": {"*": {"channel_divisor": 4}}},
        r"→ channel_divisor: unknown key.*keys of this rule are features_ratio, feature_divisor",
    ),
    "an unknown key, un-nested": (
        {"nn.Linear": {"features_ratio": None, "feature_divsor": 4}},
        r"nn\.Linear → feature_divsor: unknown key .* value 4 \(did you mean 'feature_divisor'\?\)",
    ),
    "a glob beside a key": (
        {"nn.Linear": {"*": None, "feature_divisor": 4}},
        r"nn\.Linear → feature_divisor: stands beside the globs '\*'; put it into a rule of its",
    ),
    "no rule": ({"nn.Linear": 3}, r"nn\.Linear: found 3, needed None, a rule or a mapping"),
    "a list": ({"nn.Linear": [{}]}, r"nn\.Linear: found \[\{\}\], needed None, a rule or a mapp"),
    "a glob that is no text": ({"nn.Linear": {1: None}}, r"nn\.Linear: found \{1: None\}, needed"),
    "a rule of another type": ({"nn.Linear": ConvRule()}, r"nn\.Linear → \*: found ConvRule\("),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_refused_is_named_with_its_path(case):
    values, message = BAD[case]
    with pytest.raises(ValidationError, match=re.compile(message, re.DOTALL)) as caught:
        GradNASConfig.model_validate(values)
    assert isinstance(caught.value, ValueError)


def test_every_mistake_in_a_config_is_named_at_once():
    values = {
        "nn.Linear": {"a": {"feature_divisor": 0}, "b": {"features_ratio": (2, 3)}},
        "nn.Conv1d": {"channel_divisor": 0},
    }
    with pytest.raises(ValidationError) as caught:
        GradNASConfig(**values)
    for path in ("a → feature_divisor", "b → features_ratio → 0", "b → features_ratio → 1"):
        assert f"nn.Linear → {path}: found" in str(caught.value)
    assert "nn.Conv1d → * → channel_divisor: found 0" in str(caught.value)


def test_what_is_no_mapping_is_refused():
    with pytest.raises(ValidationError, match="valid dictionary"):
        GradNASConfig.model_validate([1])


EVERY_FORM = {
    "nn.Linear": {"*": {"feature_divisor": 64}, "*lm_head*": None},
    "nn.Conv2d": {"kernel_size": (3, (3, 3)), "channels_ratio": None},
    "nn.Conv1d": {"channels_ratio": ()},
    "nn.LayerNorm": None,
    "hf.Attention": {"n_heads_ratio": (1 / 3, 0.1 + 0.2)},
}


@pytest.mark.parametrize("values", [{}, EVERY_FORM], ids=["defaults", "every form"])
def test_configs_survive_json_dictionaries_copies_and_pickle(values):
    config = GradNASConfig(**values)
    again = [
        GradNASConfig.model_validate_json(config.model_dump_json()),
        GradNASConfig.model_validate_json(config.model_dump_json(by_alias=False)),
        GradNASConfig(**config.model_dump()),
        GradNASConfig(**config),
        GradNASConfig.model_validate(config),
        copy.copy(config),
        copy.deepcopy(config),
        pickle.loads(pickle.dumps(config)),
    ]
    for other in again:
        assert other == config
        assert other.model_dump() == config.model_dump()
        assert repr(other) == repr(config)
    again[-2]["nn.Linear"]["*"]["feature_divisor"] = 2
    assert config != again[-2]


def test_a_config_is_a_field_of_another_model():
    class Outer(BaseModel):
        nas: GradNASConfig = GradNASConfig()

    outer = Outer(nas=EVERY_FORM)
    assert outer.nas == GradNASConfig(**EVERY_FORM)
    assert Outer.model_validate_json(outer.model_dump_json()) == outer


def test_the_json_schema_has_every_form_under_the_types_own_names():
    schema = GradNASConfig.model_json_schema()
    assert list(schema["properties"]) == list(TABLE)
    assert schema["additionalProperties"] is False
    for key, default in TABLE.items():
        field = schema["properties"][key]
        rule, mapping, off = field["anyOf"]
        assert set(rule) == {"$ref"}
        assert mapping["additionalProperties"]["anyOf"] == [rule, {"type": "null"}]
        assert off == {"type": "null"}
        assert field["default"] == default
        model = schema["$defs"][rule["$ref"].rpartition("/")[2]]
        assert list(model["properties"]) == list(default["*"])
        assert model["additionalProperties"] is False
    json.dumps(schema)
    GradNASConfig.model_json_schema(mode="serialization")


@pytest.mark.parametrize("model", [GradNASConfig, *Rule.__subclasses__()])
def test_every_field_is_described(model):
    assert model.__doc__
    for name, field in model.model_fields.items():
        assert field.description, name


@pytest.mark.parametrize("names", [["hf.BertAttention"], ["hf.BertAttention", "hf.GPTJAttention"]])
def test_the_references_attention_keys_are_read_as_hf_attention(names):
    rule = {"n_heads_ratio": [0.5], "n_heads_divisor": 1}
    config = GradNASConfig.model_validate(dict.fromkeys(names, rule))
    assert config == GradNASConfig.model_validate({"hf.Attention": rule})
    both = GradNASConfig.model_validate({**dict.fromkeys(names, rule), "hf.Attention": None})
    assert both["hf.Attention"] == {"*": None}
