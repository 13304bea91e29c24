"""Closed forms of what a model costs, by how many units each axis keeps."""
