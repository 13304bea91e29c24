"""Memory that is free goes back to the system."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

import pytest

from hf_gradnas.running.freed import give_back


def resident() -> int:
    """Bytes of this process that are in no file."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.partition("RssAnon:")[2].split()[0]) << 10


@pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="needs glibc"
)
def test_blocks_between_others_that_stay_are_given_back() -> None:
    blocks = [bytearray(100_000) for _ in range(600)]
    stay = blocks[::20]
    full = resident()
    del blocks
    give_back()
    assert full - resident() > 40_000_000
    assert len(stay) == 30


def test_elsewhere_nothing_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(ctypes, "CDLL", None)
    give_back()
