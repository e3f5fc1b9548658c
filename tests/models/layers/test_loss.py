"""The loss over a vocabulary cut over ranks is torch's, its gradient is written over the logits, and once only."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from megabridge.models.layers import loss
from megabridge.parallel.topology import Topology
from tests.support.rank_server import RankServer


class Alone:
    """A group of one rank."""

    def rank(self) -> int:
        return 0

    def size(self) -> int:
        return 1


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 2e-5), ("bfloat16", 2e-3)])
@pytest.mark.parametrize("tp", [1, 3])
def test_losses_and_gradients_are_torchs(ranks: RankServer, tp: int, dtype: str, tolerance: float) -> None:
    """Logits are rounded before; fp32 sums of values up to 200 are off by 2e-5, and bf16 gradients, at most 1, by 1/512."""
    for vocab in (2, 1001):
        found = ranks.run("tests.support.loss:difference", topology=Topology(tp=tp), kwargs={"dtype": dtype, "vocab": vocab})
        for of_losses, of_gradients in found:
            assert of_losses < 2e-5 and of_gradients < tolerance


def test_pieces_are_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, labels = torch.randn(50, 1, 40), torch.randint(40, (50, 1))

    def gradient() -> torch.Tensor:
        leaf = logits.clone().requires_grad_()
        loss.cross_entropy(leaf * 1, labels, Alone()).sum().backward()
        assert leaf.grad is not None
        return leaf.grad

    whole = gradient()
    for size in (1, 41, 200):
        monkeypatch.setattr(loss, "_PIECE", size)
        assert torch.equal(gradient(), whole)


def test_the_gradient_lies_where_the_logits_lay() -> None:
    leaf = torch.randn(6, 2, 10, requires_grad=True)
    logits = leaf * 1
    logits.register_hook(lambda gradient: places.append(gradient.data_ptr()))
    places: list[int] = []
    losses = loss.cross_entropy(logits, torch.zeros(6, 2, dtype=torch.long), Alone())
    losses.sum().backward(retain_graph=True)
    assert places == [logits.data_ptr()]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        losses.sum().backward()


def test_a_label_outside_the_vocabulary_draws_nothing_towards_it() -> None:
    leaf = torch.randn(2, 1, 10, requires_grad=True)
    losses = loss.cross_entropy(leaf * 1, torch.tensor([[-100], [3]]), Alone())
    losses.sum().backward()
    assert leaf.grad is not None and torch.isfinite(losses).all()
    torch.testing.assert_close(leaf.grad[0, 0], F.softmax(leaf[0, 0].detach(), 0))
