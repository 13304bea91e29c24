"""Prune while a ``transformers.Trainer`` trains: one callback, a smaller checkpoint at the end."""

from .callback import GradNASCallback

__all__ = ["GradNASCallback"]
