"""A training step as a CUDA graph."""

import pytest
import torch

from training.captured import CapturedStep

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def test_what_an_earlier_pass_has_left_does_not_spoil_a_step():
    weight = torch.ones(4, device="cuda", requires_grad=True)
    total = torch.zeros((), device="cuda")
    left = [(weight * 2).sum()]
    left.append(left)  # a cycle, which keeps the pass's graph until it is looked for

    def step():
        loss = (weight * 3).sum()
        loss.backward()
        return total.add_(weight.grad.sum()).clone()

    del left
    captured = CapturedStep(step)
    seen = [captured(key=0).item() for _ in range(8)]
    assert seen == sorted(seen) and len(set(seen)) == 8
