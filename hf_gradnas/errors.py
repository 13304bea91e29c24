"""Errors and warnings of hf_gradnas.

Every message has four parts: what went wrong, where (module path or file), what was found against
what was needed, and what to do. Children also inherit the builtin that a caller would expect.
"""

from __future__ import annotations

from collections.abc import Iterable

from ._redaction import sayable


class GradNASError(Exception):
    """Base of every error that hf_gradnas raises on purpose.

    Whatever a message quotes of names, data and other libraries, it holds neither secrets nor
    control characters.
    """

    def __init__(self, *args: object) -> None:
        super().__init__(*_sayable(args))


class StructureError(GradNASError, ValueError):
    """The model holds no axis that was asked for, or one that cannot be proved."""


class CutError(StructureError):
    """A cut model that does not do what its masks did; the model in memory is not usable."""


class BudgetError(GradNASError, ValueError):
    """A budget that cannot be read or cannot be reached."""


class PlanError(GradNASError, ValueError):
    """A plan or a rule that does not fit the model."""


class ScoresError(GradNASError, ValueError):
    """Scores that are damaged or belong to another model, data set or setting."""


class RepairError(GradNASError, ValueError):
    """A repair that belongs to another plan or model, or that cannot be made."""


class RecipeError(GradNASError, ValueError):
    """A recipe, flag or combination of flags that cannot be used."""


class DataError(GradNASError, ValueError):
    """Calibration data that the model cannot be scored with."""


class CheckpointError(GradNASError, OSError):
    """A checkpoint that cannot be written, or that does not load back as it was."""


class HubError(GradNASError, OSError):
    """A push to the Hub that cannot be made, or that failed; the local result is as it was."""


class OrderError(GradNASError, RuntimeError):
    """A step was called before the one it needs; the message names the missing call."""


def check_choice(
    name: str, value: object, known: Iterable[str], error: type[GradNASError] = PlanError
) -> None:
    """Check that a value is one of those that are known.

    Raises:
        GradNASError: It is not; of the class `error`.
    """
    if not isinstance(value, str) or value not in known:
        raise error(f"{name}={value!r} is not known; choose one of {', '.join(known)}.")


def first_line(error: BaseException) -> str:
    """First line of an error's text: what other libraries add below it helps no user."""
    lines = str(error).strip().splitlines()
    return lines[0].strip() if lines else type(error).__name__


def described(error: BaseException, *, whole: bool = False) -> str:
    """Class and first line of an error, or its `whole` text in one line."""
    name = type(error).__name__
    text = " ".join(str(error).split()) if whole else first_line(error)
    return name if text in ("", name) else f"{name}: {text}"


class GradNASWarning(UserWarning):
    """Something the user should know, which does not stop the run."""

    def __init__(self, *args: object) -> None:
        super().__init__(*_sayable(args))


def _sayable(args: tuple[object, ...]) -> list[object]:
    return [sayable(each) if isinstance(each, str) else each for each in args]
