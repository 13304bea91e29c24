"""What may be shown and saved of a text: no secrets, no control characters, no absolute paths.

Everything that the package shows (`sayable`) or saves beside a model (`shareable`) passes here.
Knows texts; knows neither recipes nor models.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path, PureWindowsPath
from typing import Any

HIDDEN = "***"
SHORTENED = ".../"
"""Begins what is left of an absolute path: its last part."""
_SHORTEST_SECRET = 8
# Names of options and variables that hold a secret; not pad_token, max_new_tokens and their kind.
_NAME = (
    r"(?:[\w-]*[_-])?(?:pass(?:word|wd|phrase)|pwd|secrets?|credentials?|authorization"
    r"|(?:api|access|account|private|secret|shared)[_-]?keys?(?:[_-]id)?"
    r"|(?:hf|hub|hugging_?face|access|auth|api|bearer|user|session|refresh|github|gitlab|wandb)"
    r"[_-]?tokens?)"
    r"|(?-i:[A-Z][A-Z0-9_]*_(?:TOKEN|KEY))|token"
)
_IS_NAME = re.compile(_NAME, re.IGNORECASE)
_VALUE = r"""(?:"[^"]*"|'[^']*'|[^\s,;)}\]'"]*[^\s,;)}\]'":.])"""
_SECRETS = (
    # scheme://user:password@host
    (re.compile(r"([a-z][a-z0-9+.-]{0,20}://)[^/\s@'\"]+@", re.IGNORECASE), rf"\1{HIDDEN}@"),
    # ?token=…, &X-Amz-Signature=…
    (
        re.compile(
            r"([?&;][\w.~-]*(?:token|secret|passw|pwd|key|sig|auth|credential)[\w.~-]*=)"
            r"[^&#\s'\"<>]+",
            re.IGNORECASE,
        ),
        rf"\1{HIDDEN}",
    ),
    # Bearer …, Basic …
    (re.compile(r"\b(bearer|basic)(\s+)[\w.~+/=-]{8,}", re.IGNORECASE), rf"\1\2{HIDDEN}"),
    # NAME=value; 'name': 'value'; NAME: value
    (re.compile(rf"(?<![\w?&;-])((?:{_NAME})\s*=\s*){_VALUE}", re.IGNORECASE), rf"\1{HIDDEN}"),
    (
        re.compile(rf"((['\"])(?:{_NAME})\2\s*:\s*)(['\"]).*?\3", re.IGNORECASE),
        rf"\1\3{HIDDEN}\3",
    ),
    (re.compile(rf"(?<![\w-])([A-Z][A-Z0-9_]*_(?:TOKEN|KEY)\s*:\s*){_VALUE}"), rf"\1{HIDDEN}"),
    # Tokens by their own form: Hugging Face, OpenAI, GitHub, GitLab, Slack, AWS, Google, JSON Web.
    (
        re.compile(
            r"(?<![A-Za-z0-9])(hf_|api_org_)(?:(?=[a-z0-9]*[A-Z])[A-Za-z0-9]{6,}"
            r"|(?=[a-z]*[0-9])[a-z0-9]{12,}|[a-z]{18,})"
        ),
        rf"\1{HIDDEN}",
    ),
    (
        re.compile(
            r"(?<![A-Za-z0-9])(sk-|gh[pousr]_|github_pat_|glpat-|xox[abprs]-|AKIA|ASIA|AIza|eyJ)"
            r"[A-Za-z0-9_.-]{16,}"
        ),
        rf"\1{HIDDEN}",
    ),
)
# What a terminal acts upon or hides, and what no text may hold: controls but for tab and newline,
# marks and overrides of direction, separators of lines, lone surrogates, tags.
_UNSEEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff"
    "\ud800-\udfff\U000e0000-\U000e007f]"
)
_PART = r"[^\s/\\'\"`<>|:,;()\[\]{}]+"
_PATHS = re.compile(
    rf"(?:file://|(?<![\w.~:/\\)-]))/(?:{_PART}/)+(?:{_PART})?"
    rf"|(?<![\w.~/\\-])[A-Za-z]:\\(?:{_PART}\\)*(?:{_PART})?"
)


def sayable(text: str) -> str:
    """A text for a terminal or an error message: without secrets and control characters."""
    return visible(without_secrets(text))


def visible(text: str) -> str:
    r"""A text with its control characters written out (``\x1b``), but for tabs and newlines."""
    return _UNSEEN.sub(lambda found: ascii(found[0])[1:-1], text)


def without_secrets(text: str) -> str:
    """A text with tokens, passwords and what environment variables hold of them written ``***``."""
    return _without(text, os.environ.items())


def _without(text: str, variables: Iterable[tuple[str, str]]) -> str:
    for pattern, replacement in _SECRETS:
        text = pattern.sub(replacement, text)
    for name, value in variables:
        if len(value) >= _SHORTEST_SECRET and value in text and is_secret_name(name):
            text = text.replace(value, HIDDEN)
    return text


def is_secret_name(name: str) -> bool:
    """Whether an option or variable of this name holds a secret."""
    return name != "PWD" and _IS_NAME.fullmatch(name) is not None  # the shell's working folder


def without_paths(text: str) -> str:
    """A text in which no absolute path is left, see `portable`."""
    if "\n" not in text and (text.startswith("/") or PureWindowsPath(text).is_absolute()):
        return portable(text)
    return _PATHS.sub(lambda found: portable(found[0].removeprefix("file://")), text)


def portable(path: str) -> str:
    """A path as others may see it; a relative one as it is.

    One in the home directory begins with ``~``, one in the working folder with ``.``. Of any other,
    the last part is left, after ``.../``.
    """
    place = Path(path)
    if not place.is_absolute():
        name = PureWindowsPath(path).name if PureWindowsPath(path).is_absolute() else None
        return path if name is None else SHORTENED + name
    for base, prefix in ((Path.home(), "~/"), (_working_folder(), "./")):
        for folder in {base, base.resolve()} - {Path(base.anchor)}:
            if place.is_relative_to(folder):
                return prefix + place.relative_to(folder).as_posix()
    return SHORTENED + place.name


def shareable(value: Any) -> Any:
    """Data for JSON or YAML with no secret and no absolute path in it, at any depth."""
    return _shareable(value, list(os.environ.items()))  # decoded once


def _shareable(value: Any, variables: list[tuple[str, str]]) -> Any:
    if isinstance(value, str):
        return without_paths(_without(value, variables))
    if isinstance(value, Mapping):
        return {
            _shareable(key, variables): HIDDEN
            if isinstance(key, str) and isinstance(item, str) and is_secret_name(key)
            else _shareable(item, variables)
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [_shareable(item, variables) for item in value]
    return value


def _working_folder() -> Path:
    try:
        return Path.cwd()
    except OSError:  # it was deleted
        return Path.home()
