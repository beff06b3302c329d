"""One, two and three processes that share batches compute the same, for every family. Three real processes start once.

benchmarks/ranks.py has the cases; it compares longer runs.
"""

import pytest
import torch
from torch import Tensor

from benchmarks import ranks
from vqvae import distributed, shares
from vqvae.bottlenecks import BOTTLENECKS
from vqvae.errors import OptionError
from vqvae.priors import PRIORS

# Where rounding decides between codes, runs differ from then on in fp32: the others must agree for longer.
SMOOTH = ("fsq", "lfq, batch norm", "gaussian", "free bits", "transformer, stage two")
LONG = [ranks.Job(name, "float32", 50) for name in SMOOTH]
PAIR = ("vq", "lfq, batch norm", "transformer, stage two")  # that two processes also train
# Every bottleneck and every prior; `python benchmarks/ranks.py` also combines them all with batch norm and stage two.
TWICE = [f"{name}, {more}" for name in ranks.BOTTLENECKS for more in ("batch norm", "stage two")]
NAMES = [name for name in ranks.CASES if name not in TWICE or name.split(",")[0] in ("vq", "lfq", "gumbel")]
JOBS = [ranks.Job(name, "float64", 8, name in PAIR) for name in NAMES] + LONG


def test_processes_that_share_batches_compute_what_one_does():
    """One test, so that the processes start once, whatever the number of pytest's workers."""
    found = ranks.results(JOBS)
    for count in (2, 3):
        for name in PAIR if count == 2 else NAMES:
            they_take_the_steps_of_one(found, name, count)
            they_share_the_held_out_split(found, name, count)
        for job in (job for job in JOBS if job.pair or count != 2):
            assert ranks.alike(found, count, (job.name, job.kind)), f"bits differ: {job}, {count} processes"
        for name in SMOOTH:
            one, some = (ranks.only(["loss"], found[n, 0][name, "float32"]["steps"]) for n in (1, count))
            assert ranks.difference(one, some) < 1e-5, f"{name}, {count} processes, 50 steps in fp32"
    any_number_resumes_a_run_of_any_other(found)


def they_take_the_steps_of_one(found: ranks.Results, name: str, count: int) -> None:
    one, some = (found[n, 0][name, "float64"] for n in (1, count))
    assert len(one["steps"]) == 8
    case = f"{name}, {count} processes"
    assert ranks.difference(one["steps"][:5], some["steps"][:5]) < 1e-6, case
    assert ranks.difference(one["steps"], some["steps"]) < 1e-5, case  # the likelihood is computed in fp32


def they_share_the_held_out_split(found: ranks.Results, name: str, count: int) -> None:
    one = found[1, 0][name, "float64"]
    for rank in range(count):
        some, case = found[count, rank][name, "float64"], f"{name}, rank {rank} of {count}"
        assert ranks.difference([one["before"]], [some["before"]]) < 1e-6, case
        assert ranks.difference([one["after"]], [some["after"]]) < 1e-5, case


def any_number_resumes_a_run_of_any_other(found: ranks.Results) -> None:
    whole, resumed = found[1, 0][ranks.RESUMED, "float64"], found[1, 0]["resumed", "float64"]
    assert resumed["state"]["step"] == 8
    assert ranks.difference(whole["steps"][6:], resumed["steps"]) < 1e-5
    for key, value in whole["state"]["module"].items():
        assert torch.allclose(value, resumed["state"]["module"][key], rtol=1e-5, atol=1e-7), key


@pytest.mark.parametrize("name", [name for name in ranks.CASES if "batch norm" not in name])
def test_shares_that_one_process_computes_one_after_another_are_one_batch(name):
    whole, shares = (
        ranks.train(ranks.CASES[name]._replace(accumulate=count), 3, torch.float64)["steps"] for count in (1, 3)
    )
    assert ranks.difference(whole, shares) < 1e-6


@pytest.mark.parametrize(("world", "parts", "sizes"), [(1, 1, [7]), (1, 2, [4, 3]), (2, 2, [2, 2, 2, 1])])
def test_the_shares_of_all_processes_are_numbered_and_make_up_the_batch(monkeypatch, world, parts, sizes):
    monkeypatch.setattr(distributed, "world", lambda: world)
    rows, numbers, gradient = [], [], torch.zeros(7)
    for rank in range(world):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        weights = torch.zeros(7, requires_grad=True)

        def forward(part: slice, weights: Tensor = weights) -> tuple[Tensor, dict[str, Tensor]]:
            rows.append(range(7)[part])
            numbers.append(shares.number())
            return (weights * torch.arange(7))[part].mean(), {}

        shares.descend(forward, 7, parts)
        gradient += weights.grad
    assert [len(part) for part in rows] == sizes
    assert [row for part in rows for row in part] == list(range(7))
    assert numbers == list(range(world * parts))
    assert torch.allclose(gradient, torch.arange(7) / 7)


def test_sums_are_complete_with_the_last_share_each_call_for_itself():
    x = torch.arange(14.0).view(7, 2)
    with shares.sharing(7, parts=3) as batch:
        found = [
            (shares.collect(x[part].sum(0), torch.ones(1)), shares.collect(x[part].square().sum()))
            for part in batch.each()
        ]
    assert found[:2] == [(None, None)] * 2
    (sums, count), (squares,) = found[2]
    assert (sums.tolist(), count.tolist(), squares.item()) == ([42, 49], [3], 819)


@pytest.mark.parametrize("parts", [1, 3])
def test_rows_that_all_shares_pick_add_up_to_rows_of_the_batch(monkeypatch, parts):
    rows, picked = torch.randn(14, 2), torch.zeros(50, 2)  # two rows of each example
    with shares.sharing(7, parts) as batch:
        for part in batch.each():
            shares.seed(0)
            picked += shares.pick(rows[2 * part.start : 2 * part.stop], 50)
    found = (picked[:, None] == rows).all(-1)  # [50, 14]
    assert found.any(1).all()
    assert found.any(0).sum() > 10
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    assert not shares.pick(rows, 50).any()  # those of the first process are of all


def test_batch_norm_cannot_be_computed_in_shares_one_after_another():
    with pytest.raises(OptionError, match="accumulate=2: must be 1 with batch norm"):
        ranks.train(ranks.CASES["vq, batch norm"]._replace(accumulate=2), 3, torch.float32)


def test_the_cases_have_every_bottleneck_and_every_prior_over_codes():
    assert {case.bottleneck.split()[0] for case in ranks.CASES.values()} == set(BOTTLENECKS)
    trained = {case.prior.split()[0] for case in ranks.CASES.values() if case.stage == 2}
    assert trained == set(PRIORS) - {"uniform", "normal", "made-flow"}
