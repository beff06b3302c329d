"""AdamW and its groups: which parameters decay, and which rate they get."""

import pytest
import torch
from torch import Tensor, nn

from vqvae.optimizer import adamw, decay_groups

CPU = torch.device("cpu")


def test_only_weights_of_convolutions_and_linear_layers_decay():
    module = nn.Sequential(
        nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1), nn.Linear(1, 1), nn.Embedding(2, 2), nn.ConvTranspose2d(1, 1, 1)
    )
    groups = adamw(decay_groups(module, weight_decay=0.1), CPU).param_groups
    decayed = [p for group in groups if group["weight_decay"] == 0.1 for p in group["params"]]
    assert {id(p) for p in decayed} == {id(module[i].weight) for i in (0, 2, 4)}
    assert {group["weight_decay"] for group in groups} == {0.1, 0.0}
    assert sum(len(group["params"]) for group in groups) == len(list(module.parameters()))


def test_frozen_parameters_and_empty_groups_are_left_out():
    module = nn.Sequential(nn.Linear(1, 1), nn.LayerNorm(1))
    module[0].requires_grad_(False)
    groups = decay_groups(module, weight_decay=0.1)
    assert [[id(p) for p in group["params"]] for group in groups] == [[id(p) for p in module[1].parameters()]]


def test_groups_have_a_scale_of_the_rate():
    parameters = [nn.Parameter(torch.zeros(1)) for _ in range(2)]
    groups = [{"params": parameters[:1]}, {"params": parameters[1:], "lr_scale": 2.0, "betas": (0.5, 0.9)}]
    optimizer = adamw(groups, CPU)
    assert [group["lr_scale"] for group in optimizer.param_groups] == [1.0, 2.0]
    assert [group["betas"] for group in optimizer.param_groups] == [(0.9, 0.999), (0.5, 0.9)]
    assert [group["betas"] for group in adamw(groups, CPU, 0.99).param_groups] == [(0.9, 0.99), (0.5, 0.9)]


@pytest.mark.parametrize("weight_decay", [0.0, 0.5])
def test_decay_shrinks_a_weight_without_a_gradient_of_its_own(weight_decay):
    module = nn.Linear(1, 1)
    nn.init.ones_(module.weight)
    optimizer = adamw(decay_groups(module, weight_decay), CPU)
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    module.weight.grad = torch.zeros_like(module.weight)
    optimizer.step()
    assert module.weight.item() == pytest.approx(1 - 0.1 * weight_decay)


def test_a_step_is_that_of_torch_and_each_goes_on_from_the_state_of_the_other():
    start = torch.randn(5, generator=torch.Generator().manual_seed(0))

    def ours() -> torch.optim.Optimizer:
        return adamw([{"params": [nn.Parameter(start.clone())]}], CPU)

    def theirs() -> torch.optim.Optimizer:
        return torch.optim.AdamW([{"params": [nn.Parameter(start.clone())], "lr_scale": 1.0}], fused=True)

    def after(*makers) -> Tensor:
        """The parameter after three steps with each optimizer, which starts from the state of the one before."""
        parameter, state = start, None
        for make in makers:
            optimizer = make()
            parameter, previous = optimizer.param_groups[0]["params"][0], parameter
            parameter.data.copy_(previous.data)
            if state:
                optimizer.load_state_dict(state)
            for _ in range(3):
                optimizer.zero_grad()
                (parameter**4).sum().backward()
                optimizer.step()
            state = optimizer.state_dict()
        return parameter.detach()

    expected = after(theirs, theirs)
    assert not expected.equal(start)
    for makers in ((ours, ours), (ours, theirs), (theirs, ours)):
        assert after(*makers).equal(expected)
