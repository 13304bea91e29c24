"""Prune while ``transformers.Trainer`` trains: one callback, and a smaller checkpoint at the end."""

from .callback import GradNASCallback

__all__ = ["GradNASCallback"]
