"""The command line: thin commands over `GradNASPruner`; heavy imports are inside functions."""

DONE, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130
"""Exit codes; a command that was terminated (SIGTERM) ends with 143."""
