"""Two processes that train one model have the same weights, which are those of one process up to rounding.

torchrun starts this file once, as two processes that call `work`.
"""

import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.helpers import CONSTANT, ROOT, SMALL, choose, make, run_train, training
from vqvae import checkpoint, cli, distributed, tokens
from vqvae.autoencoder import Autoencoder
from vqvae.bottlenecks.codebook import kmeans_codebook
from vqvae.errors import OptionError, UserError
from vqvae.registry import Choice
from vqvae.runs import NullRun
from vqvae.schedules import Schedule
from vqvae.stage_two import extract_codes
from vqvae.training import Plan, Stage, fit, seed_step

IMAGES = torch.randint(256, (21, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
ROWS = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
EXACT = {  # the same in two processes as in one, up to rounding: no noise, no statistics of one share only
    "ema": choose("bottleneck", "vq", codebook="ema", revive=0.0),
    "gradient": choose("bottleneck", "vq", codebook="gradient", revive=0.0),
    "simvq": choose("bottleneck", "simvq"),
    "fsq": choose("bottleneck", "fsq"),
}
TRAINED = EXACT | {
    "reviving": choose("bottleneck", "vq", revive=0.9, decay=0.5),  # judged from the first batch on
    "diversity": choose("bottleneck", "cosine", diversity=0.1, revive=0.9, decay=0.5),
    "lfq": choose("bottleneck", "lfq"),
    "residual": choose("bottleneck", "residual", dropout=0.9),
    "hierarchy": choose("bottleneck", "hierarchy"),
    "categorical": choose("bottleneck", "categorical", num_samples=2, average_samples=True, init="kmeans"),
    "gumbel": choose("bottleneck", "gumbel", num_samples=2),
}
LINE = [*SMALL, *CONSTANT, "--dataset", "digits", "--max-steps", "4", "--bottleneck", "vq", "revive=0", "--name"]
State = dict[str, Tensor]


class Logged(NullRun):
    """Keeps the last metrics of each kind in memory."""

    def __init__(self) -> None:
        super().__init__(Path("nowhere"))
        self.metrics: dict[str, float] = {}

    def log(
        self,
        kind: str,
        step: int,
        epoch: int,
        metrics: Mapping[str, float],
        settings: Mapping[str, float] = {},
        *,
        held_out: str = "",
    ) -> None:
        self.metrics |= metrics


def trained(name: str) -> tuple[State, State, dict[str, float]]:
    """Weights before and after three steps on batches of 7, which two processes share as 4 and 3, and the metrics."""
    torch.manual_seed(0)
    module = training(bottleneck=TRAINED[name])
    before = copy(module.state_dict())
    plan = Plan(
        epochs=1, batch_size=7, lr=Schedule.parse("1e-3"), weight_decay=0.0, seed=0,
        device=torch.device("cpu"), precision="fp32", log_every=100, checkpoint_every=(1000, None),
    )  # fmt: skip
    run = Logged()
    held_out = lambda: {"neg_elbo": float(sum(distributed.gather_objects(distributed.rank())))}  # noqa: E731
    fit(Stage(module, IMAGES, torch.zeros(21, dtype=torch.int64), held_out), plan, run)
    return before, copy(module.state_dict()), run.metrics


def copy(state: State) -> State:
    return {key: value.clone() for key, value in state.items()}


def to_encode() -> tuple[Autoencoder, tokens.DatasetSplit]:
    """A model and 40 images in batches of 4, which two processes share evenly."""
    torch.manual_seed(0)
    model = make((1, 16, 16), bottleneck="lfq").eval()
    return model, tokens.DatasetSplit(Choice("digits", {}), model, 4, limit=40)


def encode(folder: Path) -> list[tuple[int, int]]:
    """Encode the same images twice; returns the numbers of images and of files that were finished already, for each."""
    model, source = to_encode()
    found = [tokens.encode_shards(folder / "codes.npz", model, source, resume=resume) for resume in (False, True)]
    return [(done.images, done.kept) for done in found]


def for_prior(folder: Path) -> Tensor:
    model, source = to_encode()
    return extract_codes(model, source.images, folder / "codes-train.npz", batch_size=4)


def kmeans() -> Tensor:
    """A codebook fitted to 50 rows, of which two processes have 33 and 17."""
    seed_step(0, -1)
    return kmeans_codebook(ROWS if distributed.world() == 1 else ROWS.split(33)[distributed.rank()], num_codes=5)


def test_a_group_that_cannot_send_from_the_cpu_sends_from_the_gpu(monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    for backends, carrier in (("cuda:nccl", cuda), ("cpu:gloo,cuda:nccl", cpu), ("cpu:gloo,cuda:gloo", cpu)):
        monkeypatch.setattr(torch.distributed, "get_backend_config", lambda found=backends: found)
        assert distributed._carrier(cpu) == carrier
        assert distributed._carrier(cuda) == cuda


def refuse() -> None:
    raise OptionError("decay", 2, "must be from 0 to below 1", owner="vq", slot="bottleneck")


def work(folder: Path) -> None:
    """The work of each of two processes: it stores what it finds, then runs train.py."""
    distributed.start(torch.device("cpu"))
    number = distributed.rank()
    found: dict[str, Any] = {
        "rows": distributed.gather_rows(torch.full((number + 1, 2), number)),
        "none": distributed.gather_rows(torch.ones(number, 2)),
        "sum": distributed.sum_over(torch.tensor([1.0, number])),
        "first": distributed.broadcast(torch.tensor(number)),
        "any": distributed.any_of(number == 1, False),
        "on_first": distributed.on_first(lambda: f"of {number}"),
        "share": distributed.share(torch.arange(7)),
        "kmeans": kmeans(),
        "encoded": encode(folder),
        "for_prior": for_prior(folder / "prior"),
        "trained": {name: trained(name) for name in TRAINED},
    }
    try:
        distributed.on_first(refuse)
    except OptionError as problem:
        found["refusal"] = problem.flagged
    seed_step(0, 3)
    found["noise"] = torch.randn(3)
    parameter = torch.zeros(2, requires_grad=True)
    parameter.grad = torch.tensor([1.0, 2.0]) * (number + 1)
    metrics = {"loss": torch.tensor(10.0 * number), "usage": torch.tensor([[1.0, number]])}
    found["metrics"] = distributed.sum_step([parameter], metrics)
    found["gradient"] = parameter.grad
    path = folder / "file"
    with distributed.first_goes_first():
        if number == 0:
            path.write_text("made by the first")
        found["file"] = path.read_text()
    torch.save(found, folder / f"{number}.pt")
    sys.argv = ["train.py", *LINE, "two"]
    runpy.run_path(str(ROOT / "train.py"), run_name="__main__")


class Two(NamedTuple):
    """The findings of two processes, the folder in which they ran, and what they printed."""

    found: list[dict[str, Any]]
    folder: Path
    printed: str


@pytest.fixture(scope="module")
def torchrun(tmp_path_factory) -> Two:
    folder = tmp_path_factory.mktemp("two")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", __file__]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return Two([torch.load(folder / f"{number}.pt") for number in range(2)], folder, done.stdout)


@pytest.fixture
def two(torchrun) -> list[dict[str, Any]]:
    return torchrun.found


def flat(state: State) -> Tensor:
    """All weights as one vector, in float64."""
    return torch.cat([state[key].double().flatten() for key in sorted(state)])


def test_processes_exchange_rows_sums_wishes_and_results(two):
    for found in two:
        assert found["rows"].tolist() == [[0, 0], [1, 1], [1, 1]]
        assert found["none"].tolist() == [[1, 1]]
        assert found["sum"].tolist() == [2, 1]
        assert found["first"] == 0
        assert found["any"] == (True, False)
        assert found["on_first"] == "of 0"
        assert found["refusal"] == "--bottleneck vq decay=2: must be from 0 to below 1"
        assert found["file"] == "made by the first"
    assert [found["share"].tolist() for found in two] == [[0, 1, 2, 3], [4, 5, 6]]


def test_gradients_and_metrics_are_summed(two):
    for found in two:
        assert found["gradient"].tolist() == [3.0, 6.0]
        assert found["metrics"]["loss"] == 10
        assert found["metrics"]["usage"].tolist() == [[2.0, 1.0]]


def test_each_process_writes_a_shard_of_the_codes_and_both_are_read_as_one(two, torchrun):
    assert [found["encoded"] for found in two] == 2 * [[(40, 0), (40, 2)]]
    shards = sorted(path.name for path in torchrun.folder.glob("codes*"))
    assert shards == ["codes-00000-of-00002.npz", "codes-00001-of-00002.npz"]
    model, source = to_encode()
    assert np.array_equal(tokens.load_codes(torchrun.folder / "codes.npz").codes, tokens.encode(model, source, 40))


def test_processes_share_the_images_to_encode_for_a_prior(two):
    model, source = to_encode()
    codes = torch.from_numpy(tokens.encode(model, source, 40).astype(np.int32))
    assert all(torch.equal(found["for_prior"], codes) for found in two)


def test_one_process_exchanges_nothing():
    rows = torch.randn(3, 2)
    assert distributed.gather_rows(rows) is distributed.sum_over(rows) is distributed.broadcast(rows) is rows
    assert distributed.any_of(True, False) == (True, False)
    assert torch.equal(distributed.share(rows), rows)
    metrics = {"loss": rows}
    assert distributed.sum_step([rows], metrics) is metrics
    assert distributed.gather_objects("one") == ["one"]


@pytest.mark.parametrize(("world", "parts"), [(1, 1), (3, 1), (4, 2), (6, 3)])
def test_the_shares_of_all_processes_make_up_all_parts_in_order(monkeypatch, world, parts):
    monkeypatch.setattr(distributed, "world", lambda: world)
    of_parts, shares, firsts = [torch.arange(5) + 10 * part for part in range(parts)], [], 0
    for rank in range(world):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        shares.append(distributed.share(of_parts[distributed.part_of(parts)], parts))
        firsts += distributed.first_of_part(parts)
    assert torch.equal(torch.cat(shares), torch.cat(of_parts))
    assert firsts == parts


def test_noise_differs_between_processes_and_the_first_draws_the_noise_of_a_single_process(two):
    seed_step(0, 3)
    assert torch.equal(two[0]["noise"], torch.randn(3))
    assert not torch.equal(two[0]["noise"], two[1]["noise"])


def test_kmeans_sees_unequal_shares_and_gives_every_process_the_same(two):
    assert torch.equal(two[0]["kmeans"], two[1]["kmeans"])
    assert torch.allclose(two[0]["kmeans"], kmeans(), atol=1e-4)


@pytest.mark.parametrize("name", TRAINED)
def test_processes_keep_the_same_weights_bit_for_bit(two, name):
    (before, weights, metrics), (_, other, _) = (found["trained"][name] for found in two)
    assert weights.keys() == other.keys()
    for key, value in weights.items():
        assert torch.equal(value, other[key]), key
    assert not torch.equal(flat(weights), flat(before))
    assert metrics["held_out_neg_elbo"] == 1  # evaluated by both processes


@pytest.mark.parametrize("name", EXACT)
def test_two_processes_take_the_steps_of_one(two, name):
    before, expected, alone = trained(name)
    moved = (flat(expected) - flat(before)).norm()
    for start, weights, metrics in (found["trained"][name] for found in two):
        assert torch.equal(flat(start), flat(before))
        assert (flat(weights) - flat(expected)).norm() < 1e-2 * moved
        for key in {"train_loss", "train_mse", "train_commitment", "train_active_codes"} & alone.keys():
            assert metrics[key] == pytest.approx(alone[key], rel=1e-4), key


def test_a_device_that_cannot_be_shared_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(OptionError, match="2 processes cannot share it; use cpu, or one process") as caught:
        distributed.start(torch.device("mps"))
    assert caught.value.flagged.startswith("--device mps: ")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(OptionError, match="2 processes but 1 GPUs"):
        distributed.start(torch.device("cuda"))


def test_torchrun_trains_one_run_as_one_process_does(torchrun, tmp_path, monkeypatch):
    assert torchrun.printed.count("\ndone: ") == 1  # only the first process prints
    assert "batch 20 over 2 processes" in torchrun.printed
    assert [path.name for path in (torchrun.folder / "logs").iterdir()] == ["two"]
    monkeypatch.chdir(tmp_path)
    assert run_train(*LINE, "one", small=False) == 0
    one, two = (checkpoint.read(folder) for folder in (Path("logs/one"), torchrun.folder / "logs/two"))
    assert two["step"] == 4
    weights = flat(one["model"])
    assert (flat(two["model"]) - weights).norm() < 1e-4 * weights.norm()
    logged = [json.loads(row) for row in (torchrun.folder / "logs/two/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in logged if row["kind"] == "epoch"] == [3, 4]


def die_or_wait(how: str) -> int:
    """The last process is killed, or raises an error; the others wait for it, or compute."""
    distributed.start(torch.device("cpu"))
    distributed.on_lost_process(lambda: "this is how to go on")
    try:
        if distributed.rank() == distributed.world() - 1:
            if how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise UserError("no such image")
        while how == "refused while others compute":
            time.sleep(0.01)
        distributed.barrier()
    finally:
        distributed.stop()
    return 0


@pytest.mark.parametrize(
    ("how", "line"),
    [
        ("killed", "error: process 2 of 3 ended without a word; this is how to go on"),
        ("refused", "error: no such image"),
        ("refused while others compute", "error: no such image"),
    ],
)
def test_a_process_that_ends_early_ends_the_others_and_one_says_why(how, line):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    about = {"WORLD_SIZE": "3", "LOCAL_WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, how], stderr=subprocess.PIPE, text=True,
            env=os.environ | about | {"RANK": n, "LOCAL_RANK": n, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        )
        for n in "012"
    ]  # fmt: skip
    said = [process.communicate(timeout=120)[1] for process in processes]
    assert all(process.returncode for process in processes)
    assert "".join(said).splitlines() == [line]


if __name__ == "__main__":
    sys.exit(cli.run(lambda words: die_or_wait(*words)) if sys.argv[1:] else work(Path.cwd()))
