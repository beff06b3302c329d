"""Batch norm over the shares of several processes, here threads, is that of torch over the whole batch."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn

from vqvae import distributed
from vqvae.batch_norm import BatchNorm, statistics_kept


@pytest.fixture
def on_all(monkeypatch):
    """Calls a function in as many threads as there are arguments; for them, they are the processes of a group."""
    own = threading.local()

    def call(work: Callable, arguments: list) -> list:
        given, barrier = [torch.empty(0)] * len(arguments), threading.Barrier(len(arguments), timeout=60)

        def sum_over(tensor: Tensor) -> Tensor:
            given[own.rank] = tensor
            barrier.wait()
            total = torch.stack(given).sum(0)
            barrier.wait()
            return total

        def ranked(rank: int) -> object:
            own.rank = rank
            return work(arguments[rank])

        monkeypatch.setattr(distributed, "world", lambda: len(arguments))
        monkeypatch.setattr(distributed, "sum_over", sum_over)
        with ThreadPoolExecutor(len(arguments)) as threads:
            return list(threads.map(ranked, range(len(arguments))))

    monkeypatch.setattr(torch.compiler, "disable", lambda function: function)  # it imports torch's compiler
    return call


@pytest.mark.parametrize("sizes", [(4, 3), (2, 0, 5)])
def test_shares_of_a_batch_are_normalized_as_the_whole_batch(on_all, sizes):
    x, target = torch.randn(7, 3, 4, 5) * 2 + 9, torch.randn(7, 3, 4, 5)
    theirs, ours = nn.BatchNorm2d(3, eps=0.1, momentum=0.3), [BatchNorm(3, eps=0.1, momentum=0.3) for _ in sizes]
    for parameter in theirs.parameters():
        nn.init.normal_(parameter)
    for norm in ours:
        norm.load_state_dict(theirs.state_dict())

    def step(given: tuple[nn.Module, Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        norm, images, target = given
        images = images.clone().requires_grad_()
        y = norm(images)
        (y * target).sum().backward()
        return y.detach(), images.grad

    expected = step((theirs, x, target))
    found = on_all(step, list(zip(ours, x.split(sizes), target.split(sizes), strict=True)))
    for whole, shares in zip(expected, zip(*found, strict=True), strict=True):
        torch.testing.assert_close(torch.cat(shares), whole, rtol=1e-4, atol=1e-5)
    for name, parameter in theirs.named_parameters():
        total = sum(norm.get_parameter(name).grad for norm in ours)
        torch.testing.assert_close(total, parameter.grad, rtol=1e-4, atol=1e-4)
    for norm in ours:
        torch.testing.assert_close(norm.state_dict(), theirs.state_dict(), rtol=1e-5, atol=1e-6)


def test_statistics_of_features_in_bf16_are_not_rounded_to_bf16(on_all):
    x, norms = (torch.randn(6, 3, 4, 5) * 2 + 9).bfloat16(), [BatchNorm(3, momentum=1.0) for _ in range(2)]
    on_all(lambda given: given[0](given[1]), list(zip(norms, x.split(3), strict=True)))
    variance, mean = torch.var_mean(x.double(), (0, 2, 3))
    torch.testing.assert_close(norms[0].running_mean.double(), mean, rtol=1e-5, atol=0)
    torch.testing.assert_close(norms[0].running_var.double(), variance, rtol=1e-4, atol=0)


def test_batch_norm_in_evaluation_exchanges_nothing(on_all):
    norm, x = BatchNorm(3).eval(), torch.randn(2, 3, 4, 5)
    norm.running_mean.fill_(1.0)
    found = on_all(norm, [x, x[:1]])
    torch.testing.assert_close(found[1], (x[:1] - 1) / (1 + norm.eps) ** 0.5)


def test_statistics_are_restored_after_a_block_even_if_it_fails():
    norm = BatchNorm(3)

    def fail() -> None:
        with statistics_kept(nn.Sequential(norm)):
            norm(torch.randn(2, 3, 4, 5))
            assert norm.num_batches_tracked == 1
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    torch.testing.assert_close(norm.state_dict(), BatchNorm(3).state_dict())
