"""Choices: the nearest multiple that is never far below, and the units that it means."""

from dataclasses import replace

import pytest

from hf_gradnas.errors import GradNASError, PlanError
from hf_gradnas.nas.choices import axis_choices, check_kernel_size, choices_of, make_divisible
from hf_gradnas.nas.config import GradNASConfig
from hf_gradnas.nas.rules import ConvRule
from hf_gradnas.types import Axis, Kind, Tap

RATIOS = tuple(0.05 * i for i in range(1, 21))
OF_1536 = (
    *(96, 160, 224, 320, 384, 448, 544, 608, 704, 768),
    *(832, 928, 992, 1088, 1152, 1216, 1312, 1376, 1472, 1536),
)
FFN = Axis("ffn:neurons", "ffn", Kind.NEURONS, 1536, (), (Tap("ffn.down", "input", -1),))


def channels(size, width=1, minimum=1):
    taps = (Tap("conv", "output", 1, width, 0, width),)
    return Axis("conv:channels", "conv", Kind.CHANNELS, size, (), taps, minimum=minimum)


@pytest.mark.parametrize(
    ("value", "divisor", "result"),
    [
        (76.8, 32, 96),  # the nearest is 64, which is under 90 %
        (998.4, 32, 992),
        (48, 32, 64),  # half is rounded up
        (47.9, 32, 64),  # 32 is under 90 %
        (1, 32, 32),  # never 0
        (35, 32, 32),
        (36, 32, 64),
        (10, 1, 10),
        (2.5, 1, 3),
        (0.2, 1, 1),
    ],
)
def test_sizes_are_rounded_as_in_mobilenet(value, divisor, result):
    assert make_divisible(value, divisor) == result


def test_a_rounded_size_is_a_near_multiple():
    for divisor in (1, 4, 7, 32):
        for tenth in range(1, 3000, 7):
            value = tenth / 10
            size = make_divisible(value, divisor)
            assert size % divisor == 0
            assert size >= max(0.9 * value, divisor)
            assert size - value < max(divisor / 2 + 0.1 * value, divisor) + 1e-9
            assert size == divisor or size - divisor < value


def test_the_minimum_holds_besides_the_divisor():
    assert make_divisible(3, 4, 16) == 16
    assert make_divisible(3, 4, 1) == 4
    assert make_divisible(100, 4, 16) == 100


def test_the_choices_of_1536_features():
    assert choices_of(1536, RATIOS, 32) == OF_1536
    assert axis_choices(FFN, "nn.Linear", "ffn.up", GradNASConfig()) == OF_1536


def test_without_ratios_every_multiple_is_a_choice():
    assert choices_of(12, None, 1) == tuple(range(1, 13))
    assert choices_of(10, None, 4) == (4, 8, 10)
    assert choices_of(3, None, 4) == (3,)


def test_choices_are_sorted_distinct_and_at_most_the_size():
    assert choices_of(8, (1.0, 0.5, 0.5, 0.55), 4) == (4, 8)
    assert choices_of(20, RATIOS, 32) == (20,)
    assert choices_of(40, RATIOS, 32) == (32, 40)
    assert choices_of(40, (), 32) == (40,)


def test_heads_are_one_to_all():
    heads = Axis("a:heads", "a", Kind.HEADS, 12, (), (Tap("a.out", "input", -1, 64, 0, 64),))
    assert axis_choices(heads, "hf.Attention", "a", GradNASConfig()) == tuple(range(1, 13))
    config = GradNASConfig(hf_attention={"n_heads_ratio": (0.5,), "n_heads_divisor": 4})
    assert axis_choices(heads, "hf.Attention", "a", config) == (8, 12)


def test_a_rule_that_is_off_has_no_choices():
    config = GradNASConfig(nn_linear={"*": {}, "*up*": None}, nn_conv2d={"other": {}})
    assert axis_choices(FFN, "nn.Linear", "ffn.up", config) is None
    assert axis_choices(channels(8), "nn.Conv2d", "conv", config) is None
    assert axis_choices(FFN, "nn.Linear", "ffn.gate", config) is not None


def test_channels_count_where_they_are_whole_units():
    config = GradNASConfig(nn_conv2d={"channel_divisor": 4})
    assert axis_choices(channels(8), "nn.Conv2d", "conv", config) == (4, 8)
    # 16 channels in units of 2: 4, 8, 12, 16 channels; 24 in units of 3: 12 and 24.
    assert axis_choices(channels(8, width=2), "nn.Conv2d", "conv", config) == (2, 4, 6, 8)
    assert axis_choices(channels(8, width=3), "nn.Conv2d", "conv", config) == (4, 8)
    assert axis_choices(channels(7, width=3), "nn.Conv2d", "conv", config) == (4, 7)
    default = GradNASConfig()
    assert axis_choices(channels(64, width=3), "nn.Conv2d", "conv", default) == (32, 64)


def test_fewer_units_than_the_minimum_are_no_choice():
    config = GradNASConfig(nn_conv2d={})
    assert axis_choices(channels(4, minimum=3), "nn.Conv2d", "conv", config) == (3, 4)
    none = replace(channels(4), minimum=0)
    assert axis_choices(none, "nn.Conv2d", "conv", config) == (1, 2, 3, 4)


@pytest.mark.parametrize("sizes", [(), (3,), ((3, 3),), (3, (3, 3), 3)])
def test_the_present_kernel_size_is_no_change(sizes):
    check_kernel_size(ConvRule(kernel_size=sizes), (3, 3), "conv")


@pytest.mark.parametrize("sizes", [(1,), (3, 5), ((3, 1),), ((3,),), ((3, 3, 3),)])
def test_another_kernel_size_is_refused(sizes):
    message = (
        r"net\.conv: the rule's kernel_size has the choice .*, the layer has \(3, 3\); kernel sizes"
        r" are not searched: leave kernel_size empty, or turn the layer off with \{'net\.conv': No"
    )
    with pytest.raises(PlanError, match=message):
        check_kernel_size(ConvRule(kernel_size=sizes), (3, 3), "net.conv")
    assert issubclass(PlanError, GradNASError)
