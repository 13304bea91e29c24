"""Two processes, each with half of the examples, train what one process trains with all."""

import pytest
import repair_process as script
from ranks import launch


@pytest.mark.long
def test_two_processes_train_and_report_what_one_does(tmp_path):
    alone = script.trained(tmp_path, 1)
    first, second = launch(script.__file__, tmp_path)
    assert first == second
    # The Trainer sums losses in single precision.
    assert first.pop("loss") == pytest.approx(alone.pop("loss"), rel=1e-6)
    assert first == pytest.approx(alone, rel=0, abs=1e-10)
