"""Where the prunable axes of a model are: found by running it, not by looking up its name."""
