"""What is said of a repair."""

from __future__ import annotations

from hf_gradnas.repair import Repair, Site
from hf_gradnas.report import say_repair


def record(*sites: Site, tensors: dict | None = None, **values: float) -> dict:
    return Repair(tensors or {}, sites, "plan", "model", examples=512, **values).record()


def test_a_repair_that_was_accepted_says_how_far_the_divergence_fell():
    sites = (Site("a", 9, 3), Site("b", 9, 3), Site("c", 9, 0, reason="nothing is left of it"))
    found = record(*sites, tensors={"a.weight": 0}, kl_before=0.29912, kl_after=0.05141)
    assert say_repair(found) == (
        "Repaired 2 of 3 layers by least squares on 512 examples, without training: the KL "
        "divergence from the original's predictions fell from 0.2991 to 0.05141 nats per label, "
        "on held-out batches."
    )


def test_one_that_was_not_says_so():
    found = record(Site("a", 9, 3), kl_before=0.1, kl_after=0.2)
    assert say_repair(found) == (
        "Not repaired: new weights by least squares on 512 examples did not lower the KL "
        "divergence from the original's predictions (0.1 before, 0.2 with new weights), so the "
        "weights are as they were."
    )
    assert "predictions, so the weights" in say_repair(record(Site("a", 9, 3)))


def test_nothing_to_repair():
    assert say_repair(record()) == "Not repaired: no layer reads what is pruned."
