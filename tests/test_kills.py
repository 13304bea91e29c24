"""Nothing is lost where a process is killed, and the next run leaves nothing over."""

import json
import subprocess
import sys

import pytest
from places import SUPPORT

SCRIPT = SUPPORT / "kill_process.py"


def kill(folder, count, seed):
    command = [sys.executable, str(SCRIPT), str(folder), str(count), str(seed)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert set(found) == {"Scoring", "Saving", "Training", "Cutting"}
    for name, figures in found.items():
        assert figures["kills"] == count, name
        assert figures["lost"] == figures["left_over"] == 0, (name, figures, done.stderr[-3000:])


def test_a_kill_at_a_random_moment_loses_nothing(tmp_path):
    kill(tmp_path, 1, seed=0)


@pytest.mark.long
def test_a_hundred_kills_lose_nothing(tmp_path):
    kill(tmp_path, 34, seed=1)
