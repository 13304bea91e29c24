"""Cutting: rows of tensors, a cut as data, applying it, and the file that loads what was cut."""
