"""A convolutional network on real images: pruned to 60 % of its FLOPs, it recovers in one epoch."""

import sys

import pytest
from places import EXAMPLES

sys.path.insert(0, str(EXAMPLES / "benchmarks"))

import digits


@pytest.mark.long
def test_a_resnet_keeps_its_accuracy_at_60_percent_of_its_flops(capsys):
    found = digits.main(["--flops", "60%"])
    assert found["whole"] > 0.97
    assert found["flops_ratio"] <= 0.6
    assert found["recovered"] >= found["whole"] - 0.02
    assert "recovered" in capsys.readouterr().out
