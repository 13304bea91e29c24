"""What a plan predicts, in a sentence, and how far that can be trusted."""

from __future__ import annotations


def say_prediction(increase: float, unit: str, before: float | None, *, score: str) -> str:
    """The predicted loss increase with its unit, the loss it adds to, and its worth.

    Args:
        increase: In `unit`, or a sum of scores where that is "".
        unit: Such as ``"nats per token"``.
        before: Loss of the whole model while scoring, in `unit`.
        score: Name of the score.
    """
    if not unit:
        return (
            f"Sum of the pruned scores: {increase:.4g} ({score or 'unknown'} scores, without a "
            "unit; it ranks plans and is no loss)."
        )
    beside = (
        "" if before is None else f", beside {before:.4g} of the whole model on the data scored"
    )
    if score == "taylor":
        return (
            f"Predicted change of the loss: {increase:.4g} {unit} at most{beside} (first order, "
            "signs left out, every unit as if it went alone; it ranks plans and is no forecast)."
        )
    return (
        f"Predicted loss increase: {increase:.4g} {unit}{beside} (second order, every unit as if "
        "it went alone; it ranks plans and is no forecast: measured, it is often several times as "
        "large)."
    )
