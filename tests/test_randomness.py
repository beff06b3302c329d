"""Every use of random numbers has a generator of its own."""

import itertools

import pytest
import torch

from vqvae.data.batches import batch_indices
from vqvae.randomness import PURPOSES, generator, seed_globally, stream
from vqvae.training import seed_step


def on_cpu(number: int) -> int:
    """The part of a seed that PyTorch's generator of a CPU uses."""
    return number % 2**32


def test_no_two_uses_of_a_seed_share_a_generator():
    for seed in (0, 1, 2**63 - 1):
        numbers = [on_cpu(stream(seed, purpose, i)) for purpose in PURPOSES for i in range(3000)]
        assert len(set(numbers)) == len(numbers)


def test_seeds_that_agree_in_their_lower_or_upper_bits_have_different_generators():
    seeds = [base + (high << 32) for base in (0, 1, 7) for high in (0, 1, 2, 2**30)]
    processes = range(3)
    for purpose in PURPOSES:
        numbers = {on_cpu(stream(s, purpose, process=p)) for s, p in itertools.product(seeds, processes)}
        assert len(numbers) == len(seeds) * len(processes)


@pytest.mark.parametrize("seed", [0, 5, 2**40])
def test_the_first_draws_of_all_purposes_and_indices_differ(seed):
    uses = list(itertools.product(PURPOSES, range(-1, 12)))
    draws = torch.stack([torch.rand(4, generator=generator(seed, purpose, i)) for purpose, i in uses])
    assert len(draws.unique(dim=0)) == len(uses)


def test_a_stream_is_a_function_of_its_use():
    """These numbers decide every run. If they changed, runs of earlier versions would not resume exactly."""
    assert stream(0, "weights") == stream(0, "weights")
    assert [stream(0, "order", i) - stream(0, "order", 0) for i in range(3)] == [0, 1, 2]
    assert all(0 <= stream(seed, "decoder", 5, process=9) < 2**63 for seed in range(100))


def test_the_order_of_an_epoch_and_the_noise_of_a_step_have_nothing_in_common():
    for epoch in range(4):
        order = batch_indices(50, 1, seed=0, epoch=epoch).flatten()
        for step in range(-1, 5):
            seed_step(0, step)
            assert not torch.equal(order, torch.randperm(50))


def test_seeds_that_are_2_to_the_32_apart_draw_different_batches_and_noise():
    orders = [batch_indices(50, 1, seed=seed, epoch=0).flatten() for seed in (3, 3 + 2**32)]
    assert not torch.equal(*orders)
    noise = []
    for seed in (3, 3 + 2**32):
        seed_step(seed, 0)
        noise.append(torch.rand(4))
    assert not torch.equal(*noise)


def test_the_global_generators_begin_at_the_stream():
    seed_globally(3, "start", 2)
    assert torch.equal(torch.rand(4), torch.rand(4, generator=generator(3, "start", 2)))
