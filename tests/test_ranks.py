"""Two processes that train one model: the same weights in both, and those of one process up to rounding."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import train
from tests.test_autoencoder import choose, make
from tests.test_scripts import SMALL
from vqvae import ranks
from vqvae.bottlenecks.codebook import Codebook
from vqvae.errors import UserError
from vqvae.runs import Bystander
from vqvae.schedules import Schedule
from vqvae.training import Plan, fit, seed_step

ROOT = Path(__file__).parent.parent
IMAGES = torch.randint(256, (21, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
ROWS = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
EXACT = {  # what two processes do as one would, up to rounding: no noise, no statistics of a share alone
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


def trained(name: str) -> tuple[dict, dict]:
    """Weights and monitors after three steps on batches of 7, which two processes share as 4 and 3."""
    torch.manual_seed(0)
    model = make(bottleneck=TRAINED[name])
    plan = Plan(
        epochs=1, batch_size=7, lr=Schedule.parse("--lr", "1e-3"), weight_decay=0.0, seed=0,
        device=torch.device("cpu"), precision="fp32", log_every=100, save_every=(1000, None),
    )  # fmt: skip
    logged = {}
    run = Bystander(Path("nowhere"))
    run.log = lambda kind, step, epoch, numbers: logged.update(numbers)
    fit(
        model, IMAGES, torch.zeros(21, dtype=torch.int64), plan, run,
        evaluate=lambda: {"neg_elbo": float(ranks.rank())}, after_epoch=lambda *_: None,
    )  # fmt: skip
    return {key: value.clone() for key, value in model.state_dict().items()}, logged


def kmeans() -> torch.Tensor:
    """A codebook fitted to 50 rows, of which two processes have 33 and 17."""
    seed_step(0, -1)
    codebook = Codebook(5, 3, init="kmeans")
    codebook.initialise(ROWS if ranks.world() == 1 else ROWS.split(33)[ranks.rank()])
    return codebook.vectors


def refuse():
    raise UserError("--flag: not so")


def work(number: int, port: int, folder: str) -> None:
    """What each of two processes does; what it finds, it stores."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(number), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks.start(torch.device("cpu"))
    found = {
        "rank": ranks.rank(),
        "rows": ranks.gather_rows(torch.full((number + 1, 2), number)),
        "none": ranks.gather_rows(torch.ones(number, 2)),
        "sum": ranks.sum_over(torch.tensor([1.0, number])),
        "first": ranks.broadcast(torch.tensor(number)),
        "any": ranks.any_of(number == 1, False),
        "on_first": ranks.on_first(lambda: f"of {number}"),
        "share": ranks.share(torch.arange(7)),
        "kmeans": kmeans(),
        "trained": {name: trained(name) for name in TRAINED},
    }
    try:
        ranks.on_first(refuse)
    except UserError as problem:
        found["refusal"] = str(problem)
    seed_step(0, 3)
    found["noise"] = torch.randn(3)
    path = Path(folder) / "file"
    with ranks.first_goes_first():
        if number == 0:
            path.write_text("made by the first")
        found["file"] = path.read_text()
    torch.save(found, Path(folder) / f"{number}.pt")
    ranks.stop()


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> list[dict]:
    """What two processes found."""
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(work, (port, str(folder)), nprocs=2)
    return [torch.load(folder / f"{number}.pt") for number in range(2)]


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_processes_exchange_rows_sums_wishes_and_results(two):
    for found in two:
        assert found["rows"].tolist() == [[0, 0], [1, 1], [1, 1]]
        assert found["none"].tolist() == [[1, 1]]
        assert found["sum"].tolist() == [2, 1]
        assert found["first"] == 0
        assert found["any"] == (True, False)
        assert found["on_first"] == "of 0"
        assert found["refusal"] == "--flag: not so"
        assert found["file"] == "made by the first"
    assert [found["rank"] for found in two] == [0, 1]
    assert [found["share"].tolist() for found in two] == [[0, 1, 2, 3], [4, 5, 6]]


def test_one_process_exchanges_nothing():
    rows = torch.randn(3, 2)
    assert ranks.gather_rows(rows) is ranks.sum_over(rows) is ranks.broadcast(rows) is rows
    assert ranks.any_of(True, False) == (True, False)
    assert torch.equal(ranks.share(rows), rows)


def test_noise_differs_between_processes_and_the_firsts_is_that_of_one(two):
    seed_step(0, 3)
    assert torch.equal(two[0]["noise"], torch.randn(3))
    assert not torch.equal(two[0]["noise"], two[1]["noise"])


def test_kmeans_sees_unequal_shares_and_gives_every_process_the_same(two):
    assert torch.equal(two[0]["kmeans"], two[1]["kmeans"])
    assert torch.equal(two[0]["kmeans"], kmeans())


@pytest.mark.parametrize("name", TRAINED)
def test_processes_keep_the_same_weights_bit_for_bit(two, name):
    (weights, monitors), (other, _) = (found["trained"][name] for found in two)
    assert same(weights, other)
    assert monitors["held_out_neg_elbo"] == 0  # the first process's figure, in both


@pytest.mark.parametrize("name", EXACT)
def test_two_processes_take_the_steps_of_one(two, name):
    expected, monitors = trained(name)
    for weights, logged in (found["trained"][name] for found in two):
        assert weights.keys() == expected.keys()
        for key, value in weights.items():
            assert torch.allclose(value, expected[key], atol=1e-5), key
        for key in {"train_loss", "train_mse", "train_commitment", "train_active_codes"} & monitors.keys():
            assert logged[key] == pytest.approx(monitors[key], abs=1e-5), key


def test_a_device_that_cannot_be_shared_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="--device mps: cannot be shared by 2 processes; use --device cpu"):
        ranks.start(torch.device("mps"))


def test_torchrun_trains_one_run_as_one_process_does(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line = [*SMALL, "--dataset", "digits", "--max-steps", "4", "--bottleneck", "vq", "revive=0", "--name"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [*torchrun, str(ROOT / "train.py"), *line, "two"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("done. Look at it") == 1  # the first process alone speaks
    assert train.main([*line, "one"]) == 0
    assert sorted(path.name for path in (tmp_path / "logs").iterdir()) == ["one", "two"]
    one, two = (torch.load(tmp_path / "logs" / name / "checkpoint.pt", weights_only=True) for name in ("one", "two"))
    assert two["step"] == 4
    for key, value in one["model"].items():
        assert torch.allclose(two["model"][key], value, atol=1e-5), key
    logged = [json.loads(row) for row in (tmp_path / "logs/two/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in logged if row["kind"] == "epoch"] == [3, 4]
