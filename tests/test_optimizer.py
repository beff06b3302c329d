"""AdamW and Muon, and groups of parameters: which decay, and which rate they get."""

import typing

import pytest
import torch
from torch import Tensor, nn

from vqvae.config import FIELDS
from vqvae.contracts import OptimizerName
from vqvae.optimizer import OPTIMIZERS, adamw, decay_groups, muon, orthogonal

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
        """The parameter after three steps with each optimizer. Each starts from the state of the previous one."""
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


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 20), (16, 16)])
def test_orthogonal_keeps_the_singular_vectors_and_sets_the_values_to_about_one(rows, columns):
    matrices = torch.randn(2, rows, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    u, values, v = torch.linalg.svd(matrices, full_matrices=False)
    rotated = u.mT @ orthogonal(matrices) @ v.mT
    diagonal = rotated.diagonal(dim1=1, dim2=2)
    assert torch.allclose(rotated, torch.diag_embed(diagonal), atol=1e-6)
    clear = values > 0.02 * values[:, :1]
    assert ((diagonal > 0.6) & (diagonal < 1.25))[clear].all()

    x = matrices / matrices.norm(dim=(1, 2), keepdim=True)
    for _ in range(5):
        square = x @ x.mT
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    assert torch.allclose(orthogonal(matrices), x, atol=1e-6)
    assert torch.equal(orthogonal(torch.zeros(1, rows, columns)), torch.zeros(1, rows, columns))


@pytest.mark.parametrize("make", [nn.Conv2d, nn.ConvTranspose2d], ids=["convolution", "transposed"])
def test_a_kernel_moves_as_torchs_muon_moves_its_matrix(make):
    torch.manual_seed(0)
    layer = make(6, 9, 3)
    matrix = nn.Parameter(layer.weight.detach().movedim(1, -1).flatten(1).clone())
    layer.to(memory_format=torch.channels_last)
    ours = muon(decay_groups(layer, weight_decay=0.1), CPU)
    theirs = torch.optim.Muon([matrix], lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    before = matrix.detach().clone()
    for _ in range(4):
        for group in ours.param_groups:
            group["lr"] = 0.01 * group["lr_scale"]
        layer.weight.grad = torch.randn_like(layer.weight)
        matrix.grad = layer.weight.grad.movedim(1, -1).flatten(1)
        ours.step()
        theirs.step()
    moved, expected = (after.detach() - before for after in (layer.weight.movedim(1, -1).flatten(1), matrix))
    assert (moved - expected).norm() < 0.03 * expected.norm()  # torch iterates in bfloat16


def test_muon_moves_kernels_of_hidden_layers_only_and_adamw_the_rest():
    module = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Embedding(9, 9), nn.Linear(8, 3), nn.Linear(8, 5))
    groups = muon(decay_groups(module, weight_decay=0.1), CPU).param_groups
    kernels = [p for group in groups if "momentum" in group for p in group["params"]]
    assert {id(p) for p in kernels} == {id(module[i].weight) for i in (1, 4)}
    assert sum(len(group["params"]) for group in groups) == len(list(module.parameters()))
    assert {group["weight_decay"] for group in groups if "momentum" in group} == {0.1}
    assert {group["lr_scale"] for group in groups if "momentum" not in group} == {1.0}


def test_muon_goes_on_from_its_state_bitwise_and_leaves_parameters_without_a_gradient():
    def step(optimizer: torch.optim.Optimizer, times: int, start: int) -> None:
        for i in range(start, start + times):
            torch.manual_seed(i)
            for p in list(module.parameters())[:-2]:
                p.grad = torch.randn_like(p)
            optimizer.step()

    ends = []
    for parts in ([4], [2, 2]):
        torch.manual_seed(9)
        module = nn.Sequential(nn.Linear(8, 8), nn.Conv2d(6, 7, 3), nn.Linear(8, 8))
        last, state = module[2].weight.detach().clone(), None
        for start, times in enumerate(parts):
            optimizer = muon(decay_groups(module, weight_decay=0.0), CPU)
            if state:
                optimizer.load_state_dict(state)
            step(optimizer, times, 2 * start)
            state = optimizer.state_dict()
        assert torch.equal(module[2].weight, last)
        ends.append(torch.cat([p.detach().flatten() for p in module.parameters()]))
    assert torch.equal(*ends)


def test_the_optimizers_of_the_flag_the_types_and_the_table_are_the_same():
    assert typing.get_args(OptimizerName) == tuple(OPTIMIZERS)
    assert typing.get_args(FIELDS["optimizer"].kind) == ("auto", *OPTIMIZERS)
