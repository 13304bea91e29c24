"""The command line: thin commands over `GradNASPruner`; heavy imports stand inside functions."""
