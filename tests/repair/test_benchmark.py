"""The benchmark of repairs: that it runs, on a tiny model."""

from __future__ import annotations

import re
import sys

import pytest
from places import EXAMPLES

sys.path.insert(0, str(EXAMPLES / "benchmarks"))

import repair  # the module of the benchmark

pytestmark = pytest.mark.skipif(not repair.STATUS.exists(), reason="only Linux tells its memory")


def test_it_tells_the_peak_of_memory(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--width", "64", "--hidden", "256", "--examples", "6", "--length", "16"]
    repair.main(["memory", *sizes, "--budget", "97%"])
    found = re.fullmatch(
        r"(\d+) inputs of 256 outputs: (-?\d+\.\d+) GiB above (\d+\.\d+) GiB\n",
        capsys.readouterr().out,
    )
    assert found is not None
    assert float(found[2]) < 1 < float(found[3]) * 10
