"""A training step never waits for the GPU. Most tests need no GPU, because they use tensors that have no values."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.helpers import choose, images, make, training
from tests.test_stage_one import ROWS
from vqvae import devices
from vqvae.data.batches import crop_flip
from vqvae.devices import choose_compile, choose_precision
from vqvae.priors import PRIORS
from vqvae.runs import NullRun
from vqvae.schedules import Schedule
from vqvae.stage_two import PriorTraining
from vqvae.training import Loop, Plan, _resident

CUDA, CPU, META = torch.device("cuda"), torch.device("cpu"), torch.device("meta")


class NoTransfers(TorchDispatchMode):
    """Refuses every operation on tensors of two devices, copies included."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        devices = {t.device for t in tree_leaves((args, kwargs, out)) if isinstance(t, Tensor)}
        assert len(devices) <= 1, f"{function} passes values between {devices}"
        return out


def loop_on(
    device: torch.device, module: nn.Module, examples: Tensor, augment: Any = crop_flip, precision: str = "fp32"
) -> Loop:
    plan = Plan(
        epochs=1, batch_size=4, lr=Schedule.parse("linear:0:1e-3:10"), weight_decay=0.1, seed=0, optimizer="muon",
        device=device, precision=precision, log_every=100, checkpoint_every=(1000, None), augment=augment,
    )  # fmt: skip
    labels = torch.zeros(len(examples), dtype=torch.int64)
    module.to(device).train()
    return Loop(module, *_resident(examples, labels, device), plan, NullRun(Path("nowhere")), {})


@pytest.fixture
def no_autocast(monkeypatch):
    """The meta device, whose tensors have no values, has no autocast.

    torch's own functions are not replaced, because torch.export, in a later test, would not know the replacements.
    """
    monkeypatch.setattr("vqvae.training.autocast", lambda *args, **keywords: nullcontext())


def take_steps(loop: Loop) -> None:
    order = loop.order(batch_size=4, epoch=0)
    with NoTransfers():
        for index in order:
            loop.train_step(index)
    assert loop.step == 2


@pytest.mark.parametrize("names", ROWS, ids=lambda names: "-".join(names.values()))
def test_no_step_reads_or_moves_a_value(names, no_autocast):
    take_steps(loop_on(META, training(**names), images(8)))


@pytest.mark.parametrize(
    "words",
    [
        "elbo reduction=sum free_bits=2 kl_weight=linear:0:1:10",
        "probabilistic sum_over_latents=no stop_gradient_for_prior=yes entropy_scale=0",
        "probabilistic iaf_startup_steps=1 stop_training_encoder_after_startup=yes",
    ],
)
def test_no_objective_reads_or_moves_a_value(words, no_autocast):
    gumbel = choose("bottleneck", "gumbel", iaf_flows=1, iaf_parameters="triangular")
    take_steps(loop_on(META, training(words, bottleneck=gumbel, prior="unigram"), images(8)))


@pytest.mark.parametrize("prior", ["unigram", "pixelcnn", "gated-pixelcnn", "transformer", "masked"])
def test_no_step_of_the_second_stage_reads_or_moves_a_value(prior, no_autocast):
    assert prior in PRIORS
    codes = torch.randint(7, (8, 2, 2), dtype=torch.int32)
    take_steps(loop_on(META, PriorTraining(make(prior=prior), conditional=False), codes, augment=None))


def test_this_check_sees_values_that_are_read_and_moved(no_autocast):
    loop = loop_on(META, training(), images(8))
    index = loop.order(batch_size=4, epoch=0)[0]
    with NoTransfers(), pytest.raises(AssertionError, match="passes values between"):
        loop.train_step(torch.arange(4))  # an index on the host
    loop.plan = loop.plan._replace(augment=lambda batch: batch[: int(batch.sum())])
    with NoTransfers(), pytest.raises(RuntimeError, match="meta"):
        loop.train_step(index)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("resident", [True, False])
def test_no_step_waits_for_the_gpu(resident):
    for names in ROWS:
        loop = loop_on(CUDA, training(**names), images(12), precision="bf16")
        if not resident:
            loop.examples, loop.labels = loop.examples.cpu(), loop.labels.cpu()
        warm_up, *order = loop.order(batch_size=4, epoch=0)
        loop.train_step(warm_up)  # allocates memory and chooses kernels
        torch.cuda.set_sync_debug_mode("error")
        try:
            for index in order:
                loop.train_step(index)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("supported", [True, False])
def test_auto_is_bf16_on_a_gpu_with_bf16_hardware(supported, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: supported)
    assert choose_precision("auto", CUDA) == ("bf16" if supported else "fp32")
    assert choose_precision("auto", CPU) == "fp32"
    assert choose_precision("bf16", CPU) == "bf16"
    assert choose_precision("fp32", CUDA) == "fp32"


@pytest.mark.parametrize("works", [True, False])
def test_long_runs_on_a_gpu_are_compiled_where_that_works(works, monkeypatch):
    monkeypatch.setattr(devices, "_compiles", lambda device: works)
    assert choose_compile(None, CUDA, 2000) == works
    assert not choose_compile(None, CUDA, 1999)
    assert not choose_compile(None, CPU, 10**6)
    assert choose_compile(True, CPU, 1)
    assert not choose_compile(False, CUDA, 10**6)


def test_a_compiler_that_fails_is_a_warning(monkeypatch):
    def compile(function):
        raise RuntimeError("no C compiler")

    monkeypatch.setattr(torch, "compile", compile)
    with pytest.warns(UserWarning, match=r"the nets are not compiled because .*no C compiler"):
        assert not devices._compiles(CPU)
