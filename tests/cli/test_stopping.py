"""What ends a command from outside: signals, and full disks."""

import errno
import signal
import sys

import pytest

from hf_gradnas.cli.stopping import run_stoppable


def test_a_terminated_command_says_what_is_left_as_an_interrupted_one(capsys):
    def command():
        try:
            signal.raise_signal(signal.SIGTERM)
        except KeyboardInterrupt:
            assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL  # the next ends it at once
            sys.exit(130)

    assert run_stoppable(command) == 143
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_command_that_ends_nevertheless_has_its_own_code():
    def command():
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)

    assert run_stoppable(command) == 0


@pytest.mark.parametrize("launcher", ["WORLD_SIZE", "OMPI_COMM_WORLD_SIZE"])
def test_one_of_several_processes_is_left_to_its_launcher(launcher, monkeypatch):
    monkeypatch.setenv(launcher, "2")
    seen = []
    run_stoppable(lambda: seen.append(signal.getsignal(signal.SIGTERM)))
    assert seen == [signal.SIG_DFL]


def test_a_handler_of_the_program_stays():
    def own(number, frame):
        raise AssertionError

    seen = []
    previous = signal.signal(signal.SIGTERM, own)
    try:
        run_stoppable(lambda: seen.append(signal.getsignal(signal.SIGTERM)))
    finally:
        signal.signal(signal.SIGTERM, previous)
    assert seen == [own]


def test_a_full_disk_is_said_without_a_traceback(capsys):
    def command(*where):
        raise OSError(errno.ENOSPC, "No space", *where)

    assert run_stoppable(command) == 1
    assert capsys.readouterr().err.startswith("Error: standard output, or a folder for temporary")
    assert run_stoppable(lambda: command("here/x.bin")) == 1
    assert capsys.readouterr().err.startswith("Error: here/x.bin: No space left on device")


def test_other_errors_of_the_system_are_not_hidden():
    def command():
        raise OSError(errno.ENOTDIR, "no folder")

    with pytest.raises(OSError, match="no folder"):
        run_stoppable(command)
