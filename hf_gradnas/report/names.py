"""Short names of modules, for the rows of tables and pictures."""

from __future__ import annotations

from collections.abc import Sequence

LONGEST = 30


def short_names(modules: Sequence[str]) -> list[str]:
    """Module paths without the parts that all of them have, so that they still differ.

    ``bert.encoder.layer.0.attention`` … ``bert.encoder.layer.5.attention`` become ``0`` … ``5``.
    A long name loses its middle.
    """
    if len(modules) <= 1:
        return [_clip(module) for module in modules]
    paths = [module.split(".") for module in modules]
    common = set(paths[0]).intersection(*paths[1:])
    short = [[part for part in path if part.isdigit() or part not in common] for path in paths]
    if not _differ(short, modules):
        short = paths
    for first in (False, True):  # numbers that tell nothing: the last, then the first of each
        fewer = [_without_number(path, first=first) for path in short]
        while _differ(fewer, modules):
            short, fewer = fewer, [_without_number(path, first=first) for path in fewer]
    return [_clip(".".join(path)) for path in short]


def _differ(paths: Sequence[Sequence[str]], modules: Sequence[str]) -> bool:
    """Whether shortened paths are as many as the modules, and none is empty."""
    return all(paths) and len({tuple(path) for path in paths}) == len(set(modules))


def _without_number(path: Sequence[str], *, first: bool) -> list[str]:
    """A path without its last or first number, or nothing where it has none."""
    places = [place for place, part in enumerate(path) if part.isdigit()]
    if not places:
        return []
    place = places[0] if first else places[-1]
    return [*path[:place], *path[place + 1 :]]


def _clip(name: str) -> str:
    if len(name) <= LONGEST:
        return name
    half = (LONGEST - 1) // 2
    return f"{name[:half]}…{name[-half:]}"
