"""The command line: thin commands over `GradNASPruner`; heavy imports are inside functions."""

DONE, FAILED, BAD_INPUT, INTERRUPTED, TERMINATED = 0, 1, 2, 130, 143
"""Exit codes; the last is of a command that SIGTERM ended, as a shell gives it."""
