"""Where the prunable axes of a model stand: found by running it, not by looking up its name."""
