"""Averaged weights have the right values, and the weights of training are kept."""

import torch
from torch import nn

from vqvae.averaging import AveragedWeights


def module(value: float = 0.0) -> nn.Module:
    made = nn.BatchNorm1d(2)
    with torch.no_grad():
        made.weight.fill_(value)
    return made


def test_the_average_is_the_recursion_over_all_weights_and_buffers():
    net, expected = module(1.0), 1.0
    averaged = AveragedWeights(net, 0.5)
    for n, value in enumerate((3.0, -2.0, 5.0, 4.0, 4.5, 8.0)):
        with torch.no_grad():
            net.weight.fill_(value)
            net.running_mean.fill_(value)
        net.num_batches_tracked.fill_(n)
        averaged.update(n)
        decay = min(0.5, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * value
    with averaged.in_use():
        assert torch.allclose(net.weight, torch.full((2,), expected))
        assert net.num_batches_tracked == 5
        assert averaged.other["weight"].tolist() == [8.0, 8.0]
    assert net.weight.tolist() == [8.0, 8.0]


def test_weights_that_do_not_change_stay_bit_for_bit():
    net = nn.Linear(5, 7)
    before, averaged = net.weight.detach().clone(), AveragedWeights(net, 0.999)
    for n in range(20):
        averaged.update(n)
    with averaged.in_use():
        assert torch.equal(net.weight, before)


def test_a_decay_of_0_has_no_average():
    net = module(1.0)
    averaged = AveragedWeights(net, 0)
    averaged.update(0)
    with averaged.in_use():
        assert averaged.other == {}
        assert net.weight.tolist() == [1.0, 1.0]


def test_the_weights_of_training_return_when_an_evaluation_fails():
    net = module(1.0)
    averaged = AveragedWeights(net, 0.9)
    with torch.no_grad():
        net.weight.fill_(2.0)
    try:
        with averaged.in_use():
            raise RuntimeError
    except RuntimeError:
        assert net.weight.tolist() == [2.0, 2.0]


def test_training_goes_on_from_its_own_weights():
    net = module(1.0)  # as loaded: the average
    averaged = AveragedWeights(net, 0.9, module(5.0).state_dict())
    assert net.weight.tolist() == [5.0, 5.0]
    with averaged.in_use():
        assert net.weight.tolist() == [1.0, 1.0]
