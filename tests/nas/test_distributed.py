"""Two processes, each with half of the batches, choose what one process chooses with all."""

import distributed_process as script
import numpy as np
import pytest
from ranks import launch


@pytest.mark.long
def test_two_processes_choose_what_one_does(tmp_path):
    alone = script.chosen(0, 1)
    first, second = launch(script.__file__, tmp_path)
    assert first == second
    assert first["config"] == alone["config"]
    for name, values in alone["scores"].items():
        np.testing.assert_allclose(first["scores"][name], values, rtol=1e-12)
