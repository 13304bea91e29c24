"""Nothing is lost where a process is killed, and the next run leaves nothing over."""

import json
import signal
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


@pytest.mark.long
def test_a_command_that_is_killed_as_its_second_file_begins_goes_on_with_it(tmp_path):
    command = [sys.executable, str(SUPPORT / "kill_command.py"), str(tmp_path)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert (found["killed"], found["is_there"]) == (-signal.SIGKILL, False)
    assert (found["again"], found["whole"]) == (0, 0), done.stderr[-3000:]
    ours, whole = found["written"]
    assert len(whole) > 2
    assert ours == whole  # each once: the first is that of the run that was killed
    assert found["names"][0] == found["names"][1]
    assert set(found["differing"]) <= {"README.md", "gradnas.json"}  # they name the folder
    assert found["left_over"] == []
