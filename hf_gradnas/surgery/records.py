"""Records of models that are cut more than once: what a config keeps of all cuts together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from . import modeling_gradnas

Record = Mapping[str, Any]


def merge_records(old: Record, new: Record) -> Record:
    """Record of a model that was cut before and is cut again: `new` wins where both speak."""
    removed = {**old.get("removed", {}), **new["removed"]}
    own = {**old.get("own_position_bias", {}), **new.get("own_position_bias", {})}
    modules = {path: dict(entry) for path, entry in old.get("modules", {}).items()}
    adapted = {**old.get("adapted", {}), **new.get("adapted", {})}
    for path in old.get("adapted", {}).keys() & new.get("adapted", {}).keys():
        adapted[path] = _composed(old["adapted"][path], new["adapted"][path])
    for path, entry in new["modules"].items():
        parent, _, leaf = path.rpartition(".")
        if leaf in {row.table for row in modeling_gradnas.SHARED_TABLES} and own.get(parent):
            own[parent] = entry["weight"]
            continue
        before = modules.get(path, {})
        config = {**before.get("config", {}), **entry.get("config", {})}
        modules[path] = {**before, **entry, **({"config": config} if config else {})}

    lists = {path: list(names) for path, names in old.get("lists", {}).items()}
    for path, names in new.get("lists", {}).items():
        lists[path] = [*names, *lists.get(path, [])]

    def gone(path: str) -> bool:
        return any(path == r or path.startswith(r + ".") for r in removed) or any(
            path.startswith(f"{holder}.")
            and path.removeprefix(f"{holder}.").partition(".")[0] in names
            for holder, names in lists.items()
        )

    left = {path: entry for path, entry in adapted.items() if not gone(path)}
    return {
        **new,
        **({"adapted": left} if left else {}),
        **({"lists": {p: names for p, names in lists.items() if not gone(p)}} if lists else {}),
        "modules": {path: entry for path, entry in modules.items() if not gone(path)},
        "removed": removed,
        "own_position_bias": {path: size for path, size in own.items() if not gone(path)},
    }


def _composed(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """What the calls of a module need that was cut twice."""
    width = [*old["width"][:1], *new["width"][1:]] if old["width"] else new["width"]
    return {
        "arguments": sorted({*old["arguments"], *new["arguments"]}),
        "units": [old["units"][0], [old["units"][1][unit] for unit in new["units"][1]]],
        "width": width,
    }
