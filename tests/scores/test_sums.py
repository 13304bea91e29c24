"""Products that are summed a few examples at a time are those of all at once."""

from __future__ import annotations

import pytest
import torch

from hf_gradnas.scores import sums


@pytest.mark.parametrize(("shape", "dim"), [((5, 4, 6), 2), ((5, 6, 3, 2), 1), ((5, 24), 1)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_sums_of_portions(shape: tuple[int, ...], dim: int, dtype, monkeypatch) -> None:
    monkeypatch.setattr(sums, "CACHED", 60)  # of 24 or 36 entries an example
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    generator = torch.Generator().manual_seed(0)
    x, gradient = (torch.randn(shape, generator=generator, dtype=dtype) for _ in range(2))
    buffer = sums.ProductBuffer()
    found = buffer.sums(x, gradient, dim)
    places = [d for d in range(1, len(shape)) if d != dim]
    product = (x.double() * gradient.double()).sum(places) if places else x.double() * gradient
    near = 1e-12 if dtype == torch.float64 else 1e-5
    assert found.dtype == torch.float64
    assert (found - product).abs().max() < near
    assert max(made.numel() for made in buffer._buffers.values()) <= 60
