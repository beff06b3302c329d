"""A prior on frozen codes: what trains, what is cached, the cost of codes, and both stages from the command line."""

import json
import math
import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.helpers import CONSTANT, choose, images, make, run_train
from vqvae import cli, load
from vqvae.commands import visualize
from vqvae.errors import OptionError
from vqvae.evaluation import evaluate, evaluate_prior
from vqvae.stage_two import PriorTraining, extract_codes, store_codes

LABELS = torch.zeros(12, dtype=torch.int64)
SMALL_PIXELCNN = ("--prior", "pixelcnn", "channels=8", "blocks=1", "head=8")


@pytest.fixture
def there(tmp_path, monkeypatch):
    """An empty folder to run in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def train(line: str) -> int:
    return run_train(*line.split(), small=False)


def test_only_the_prior_trains():
    model = make(prior="pixelcnn")
    module = PriorTraining(model, conditional=False).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    groups = module.parameter_groups(weight_decay=0.1)
    assert sum(len(group["params"]) for group in groups) == len(list(model.prior.parameters()))
    optimizer = torch.optim.Adam(groups, 0.01)
    module(torch.randint(7, (12, 2, 2)), LABELS, 0).loss.backward()
    optimizer.step()
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved
    assert all(name.startswith("prior.") for name in moved)
    assert model.prior.training
    assert not model.bottleneck.training  # its EMA would go on
    assert not module.eval().model.prior.training


def test_the_loss_is_nats_per_code():
    module = PriorTraining(make(prior="pixelcnn"), conditional=False).eval()
    codes = torch.randint(7, (12, 2, 2))
    out = module(codes, LABELS, 0)
    held_out = module.evaluate(codes, LABELS)
    assert out.loss.item() == pytest.approx(held_out["prior_nats"] / 4, rel=1e-4)
    numbers = module.summary(out.metrics)
    for name in ("prior_nats", "bits_per_code", "code_perplexity"):
        assert numbers[name] == pytest.approx(held_out[name], rel=1e-4)
    assert set(module.headline) <= set(numbers)
    assert module.monitor in held_out


def test_a_uniform_prior_costs_log_k_a_code():
    model = make(prior="unigram")  # its untrained logits are equal
    results = evaluate_prior(model, torch.randint(7, (12, 2, 2)), LABELS, conditional=False, batch_size=5)
    assert results["bits_per_code"] == pytest.approx(math.log2(7), rel=1e-6)
    assert results["uniform_bits_per_code"] == pytest.approx(math.log2(7))
    assert results["prior_nats"] == pytest.approx(4 * math.log(7), rel=1e-6)
    assert results["prior_nats_se"] == pytest.approx(0, abs=1e-6)
    assert results["code_bits_per_dim"] == pytest.approx(4 * math.log2(7) / 192, rel=1e-6)
    assert results["code_perplexity"] == pytest.approx(7, rel=1e-5)


def test_both_evaluations_agree_on_the_priors_cost():
    model, batch = make(prior="pixelcnn"), images(12)
    codes = model.eval().encode(batch).int()
    of_codes = evaluate_prior(model, codes, LABELS, conditional=False)
    of_images = evaluate(model, batch, LABELS)
    for name in ("prior_nats", "bits_per_code", "code_bits_per_dim"):
        assert of_codes[name] == pytest.approx(of_images[name], rel=1e-4)


def test_labels_reach_a_conditional_prior():
    model = make(prior="pixelcnn", num_classes=3)
    codes = torch.randint(7, (12, 2, 2))
    with torch.no_grad():
        for p in model.prior.parameters():
            torch.nn.init.normal_(p, std=0.5)
    module = PriorTraining(model, conditional=True)
    assert module.evaluate(codes, LABELS)["prior_nats"] != module.evaluate(codes, LABELS + 1)["prior_nats"]
    with pytest.raises(ValueError, match="needs labels"):
        PriorTraining(model, conditional=False)(codes, LABELS, 0)


def test_codes_are_cached_with_what_they_come_from(tmp_path):
    model, batch, cache = make().eval(), images(12), tmp_path / "codes.npz"
    codes = extract_codes(model, batch, cache, batch_size=5)
    assert codes.dtype == torch.int32
    stored = np.load(cache)
    assert stored["codes"].dtype == np.uint8
    source = str(stored["source"])
    changed = codes.clone()
    changed[0, 0, 0] = 6 - changed[0, 0, 0]

    def store() -> None:
        store_codes(cache, changed.numpy().astype(np.uint8), source)

    store()
    assert torch.equal(extract_codes(model, batch, cache, batch_size=5), changed)  # from the cache
    assert torch.equal(extract_codes(model, batch[:10], cache, batch_size=5), codes[:10])  # fewer images
    store()
    other = batch.clone()
    other[-1] = 255 - other[-1]
    found = extract_codes(model, other, cache, batch_size=5)  # as many other images
    assert torch.equal(found[:-1], codes[:-1])
    assert torch.equal(found[-1:], model.encode(other[-1:]))
    store()
    with torch.no_grad():
        model.bottleneck.codebook.vectors.copy_(model.bottleneck.codebook.vectors.flip(0))
    assert torch.equal(extract_codes(model, batch, cache, batch_size=5), 6 - codes)  # of other weights
    assert np.array_equal(np.load(cache)["codes"], 6 - codes)


@pytest.mark.parametrize(("num_codes", "kind"), [(256, np.uint8), (257, np.uint16)])
def test_the_cache_has_the_smallest_type_that_holds_the_largest_code(tmp_path, num_codes, kind):
    model, batch, cache = (
        make(bottleneck=choose("bottleneck", "vq", num_codes=num_codes)),
        images(3),
        tmp_path / "c.npz",
    )
    model.encode = lambda images: torch.full((len(images), 2, 2), num_codes - 1)
    codes = [extract_codes(model, batch, cache) for _ in range(2)]  # the second time from the cache
    assert np.load(cache)["codes"].dtype == kind
    assert all(found.unique().tolist() == [num_codes - 1] for found in codes)


def test_codes_are_used_where_their_cache_cannot_be_written(tmp_path):
    model, batch = make().eval(), images(5)
    with pytest.warns(UserWarning, match="cannot be written: the next prior will encode the images again"):
        codes = extract_codes(model, batch, tmp_path)  # a folder has this name
    assert torch.equal(codes.long(), model.encode(batch))


def test_stage_two_trains_on_draws_where_the_posterior_is_a_distribution(tmp_path):
    model = make(bottleneck="gumbel").train()
    batch = images(1).expand(2000, -1, -1, -1)  # the same image, many times
    codes = extract_codes(model, batch, tmp_path / "codes.npz")
    assert model.training
    with torch.no_grad():
        logits, _ = model.bottleneck.logits(model.eval().features(batch[:1] / 255), model.bottleneck.code_vectors())
    expected = logits[0].softmax(-1)  # [h, w, K]
    shares = torch.nn.functional.one_hot(codes.long(), 7).double().mean(0)
    assert float((shares - expected).abs().max()) < 5 * 0.5 / math.sqrt(2000)
    assert len(codes.unique()) > 1
    assert torch.equal(codes, extract_codes(model, batch, tmp_path / "again.npz"))  # draws of one seed
    point = make().eval()
    assert torch.equal(extract_codes(point, batch[:5], tmp_path / "point.npz"), point.encode(batch[:5]).int())


def test_a_cache_with_a_flipped_bit_is_made_again(tmp_path):
    model, batch, cache = make().eval(), images(12), tmp_path / "codes.npz"
    codes = extract_codes(model, batch, cache)
    raw, draw = cache.read_bytes(), random.Random(0)
    for _ in range(60):
        at = draw.randrange(len(raw))
        cache.write_bytes(raw[:at] + bytes([raw[at] ^ 1 << draw.randrange(8)]) + raw[at + 1 :])
        assert torch.equal(extract_codes(model, batch, cache), codes)


def _pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda path: path.write_bytes(b"damaged"),
        lambda path: path.write_bytes(path.read_bytes()[:-30]),
        lambda path: path.write_bytes(b""),
        lambda path: np.savez(path, codes=np.zeros((12, 2, 2), np.uint8)),
        lambda path: np.savez(path, **dict(np.load(path)) | {"codes": np.zeros((12, 2, 2), np.uint8)}),
        lambda path: store_codes(
            path, np.arange(48, dtype=np.uint8).reshape(12, 2, 2) % 8, str(np.load(path)["source"])
        ),
        lambda path: store_codes(path, np.zeros((12, 4, 1), np.uint8), str(np.load(path)["source"])),
        lambda path: store_codes(path, np.full((12, 2, 2), -1), str(np.load(path)["source"])),
        lambda path: store_codes(path, np.zeros((12, 2, 2)), str(np.load(path)["source"])),
        _pipe,
    ],
)
def test_a_damaged_or_hostile_cache_is_made_again(tmp_path, spoil):
    model, batch, cache = make().eval(), images(12), tmp_path / "codes.npz"
    codes = extract_codes(model, batch, cache)
    whole = dict(np.load(cache))
    spoil(cache)
    assert torch.equal(extract_codes(model, batch, cache), codes)
    assert dict(np.load(cache)).keys() == whole.keys()
    assert np.array_equal(np.load(cache)["codes"], codes)


def test_continuous_latents_have_no_codes_to_extract(tmp_path):
    with pytest.raises(ValueError, match="latent is continuous"):
        extract_codes(make(nets="mlp", bottleneck="gaussian", prior="normal"), images(2), tmp_path / "codes.npz")


def test_two_stages_then_samples_and_completions(there, capsys):
    assert run_train("--epochs", "1", "--name", "first") == 0
    second = (
        *SMALL_PIXELCNN,
        *CONSTANT,
        "--checkpoint",
        "logs/first/checkpoint.pt",
        "--batch-size",
        "20",
        "--conditional",
    )
    for name in ("second", "straight"):
        assert run_train(*second, "--epochs", "2" if name == "second" else "3", "--name", name, small=False) == 0
    last = json.loads(Path("logs/second/metrics.jsonl").read_text().splitlines()[-1])
    assert 0 < last["held_out_bits_per_code"] < 6
    first, trained = load("logs/first/checkpoint.pt"), load("logs/second/checkpoint.pt")
    batch = images(3, (1, 16, 16))
    assert torch.equal(first.encode(batch), trained.encode(batch))
    assert torch.equal(first.reconstruct(batch), trained.reconstruct(batch))
    assert train("--resume logs/second --epochs 3") == 0
    resumed, straight = (load(f"logs/{name}").state_dict() for name in ("second", "straight"))
    assert all(torch.equal(value, straight[key]) for key, value in resumed.items())
    assert train("--evaluate --checkpoint logs/second --iw-samples 1") == 0
    assert json.loads(Path("logs/second/evaluation.json").read_text())["prior"] == "pixelcnn"
    line = "--checkpoint logs/second --samples 9 --temperature 0.8 --top-k 3 --class 3"
    assert cli.run(visualize.main, line.split()) == 0
    drawn = {p.name for p in Path("plots/second").iterdir()}
    assert {"samples.png", "class_rows.png", "completions.png", "training_animation.gif"} <= drawn
    capsys.readouterr()
    assert cli.run(visualize.main, ["--checkpoint", "logs/second", "--class", "10"]) == 2
    assert "--class 10" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("prior", "bottleneck"),
    [
        ("masked", "residual quantizers=2"),
        ("masked", "hierarchy hidden=8"),
        ("masked", "multiscale"),
        ("transformer", "multiscale"),
    ],
)
def test_priors_learn_codes_of_several_levels(there, prior, bottleneck):
    assert run_train("--epochs", "1", "--name", "first", "--bottleneck", *bottleneck.split()) == 0
    line = f"--prior {prior} layers=1 width=8 heads=2 --checkpoint logs/first --batch-size 20 --lr 3e-2 --name second"
    assert train(f"{line} --epochs 8") == 0
    last = json.loads(Path("logs/second/metrics.jsonl").read_text().splitlines()[-1])
    assert last["held_out_bits_per_code"] < 3.9  # of 4 without knowledge
    options = "--samples 4 --top-p 0.9" + (" --steps 3 --choice-temperature 2" if prior == "masked" else "")
    assert (
        cli.run(visualize.main, f"--checkpoint logs/second {options} --only samples.png completions.png".split()) == 0
    )
    assert {"samples.png", "completions.png"} <= {p.name for p in Path("plots/second").iterdir()}


def test_a_masked_prior_resumes_exactly_repeats_its_evaluation_and_takes_guidance(there, capsys):
    assert run_train("--epochs", "1", "--name", "first") == 0
    line = "--prior masked layers=1 width=8 heads=2 --checkpoint logs/first --batch-size 20 --conditional --lr 3e-4"
    for name, epochs in (("second", 2), ("straight", 3)):
        assert train(f"{line} --epochs {epochs} --name {name}") == 0
    assert train("--resume logs/second --epochs 3") == 0
    resumed, straight = (load(f"logs/{name}").state_dict() for name in ("second", "straight"))
    assert all(torch.equal(value, straight[key]) for key, value in resumed.items())
    rows = [json.loads(Path(f"logs/{n}/metrics.jsonl").read_text().splitlines()[-1]) for n in ("second", "straight")]
    assert rows[0]["held_out_prior_nats"] == rows[1]["held_out_prior_nats"]
    assert cli.run(visualize.main, "--checkpoint logs/second --only class_rows.png --guidance 2.5".split()) == 0
    assert train(f"{line.replace('heads=2', 'heads=2 label_drop=0')} --epochs 1 --name without") == 0
    assert cli.run(visualize.main, "--checkpoint logs/without --guidance 2.5".split()) == 2
    assert "--guidance 2.5: needs a prior of classes that was trained with label_drop" in capsys.readouterr().err


def test_a_masked_prior_and_a_stochastic_posterior_have_no_importance_weighted_bound():
    model = make(bottleneck="gumbel", prior="masked").eval()
    batch = images(4)
    assert math.isfinite(evaluate(model, batch, LABELS[:4])["neg_elbo"])
    with pytest.raises(OptionError, match="iw_samples=2: the prior only bounds log p"):
        evaluate(model, batch, LABELS[:4], iw_samples=2)
    exact = evaluate(make(prior="masked").eval(), batch, LABELS[:4], iw_samples=2)
    assert exact["iw_bound"] == pytest.approx(exact["neg_elbo"])


def test_a_model_without_an_importance_weighted_bound_is_evaluated_without_one(there, capsys):
    line = "--bottleneck gumbel --prior masked layers=1 width=8 heads=2 --max-steps 1 --name run"
    assert run_train(*line.split()) == 0
    for draws in ("", "--iw-samples 0"):
        assert train(f"--evaluate --checkpoint logs/run {draws}") == 0
        content = json.loads(Path("logs/run/evaluation.json").read_text())
        assert content["iw_samples"] == 0
        assert "iw_bound" not in content
    assert train("--evaluate --checkpoint logs/run --iw-samples 3") == 2
    assert "--iw-samples 3: the prior only bounds log p(z)" in capsys.readouterr().err


def test_a_prior_can_train_jointly_with_the_autoencoder(there):
    prior = ("--prior", "transformer", "layers=1", "width=8", "heads=2", "--lr", "3e-3")
    assert run_train(*prior, "--epochs", "20", "--name", "joint") == 0
    rows = [json.loads(line) for line in Path("logs/joint/metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["held_out_rate"] < 0.95 * 16 * math.log(16)  # the cost without knowledge is 16 log 16


@pytest.fixture(scope="module")
def two_runs(tmp_path_factory) -> Path:
    """The folder of an autoencoder `first`, a prior `second` on its codes, and a VAE `vae`."""
    folder = tmp_path_factory.mktemp("two")
    where = ("--log-dir", str(folder / "logs"), "--plot-dir", str(folder / "plots"))
    assert run_train("--epochs", "1", "--name", "first", *where) == 0
    prior = ("--prior", "unigram", "--checkpoint", str(folder / "logs/first"), "--epochs", "1", "--batch-size", "20")
    assert run_train(*prior, "--name", "second", *where, small=False) == 0
    vae = "--preset vae-cifar10 --dataset digits --limit 40 --batch-size 20 --hidden 4 --image-size 16 --epochs 1"
    assert run_train(*vae.split(), "--name", "vae", *where, small=False) == 0
    return folder


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--prior pixelcnn --checkpoint logs/second", "--checkpoint logs/second: is a prior's"),
        ("--prior normal --checkpoint logs/first --batch-size 20", "--prior normal: needs latent_dim"),
        ("--prior uniform --checkpoint logs/first --batch-size 20", "--prior uniform: has no parameters to train"),
        ("--prior unigram --checkpoint logs/first --codes 3", "--codes 3: the model and data come from --checkpoint"),
        ("--prior unigram --checkpoint logs/first --dataset mnist", "--dataset mnist: the model and data come from"),
        ("--prior unigram --checkpoint logs/first --objective elbo", "--objective elbo: the model and data come from"),
        ("--prior unigram --checkpoint logs/first --augment crop-flip", "--augment crop-flip: a prior trains on codes"),
        ("--prior normal --checkpoint logs/vae --batch-size 20", "latent is continuous"),
        ("--checkpoint logs/first", "name the prior to train"),
    ],
)
def test_stages_that_do_not_fit_are_refused(two_runs, monkeypatch, capsys, line, message):
    monkeypatch.chdir(two_runs)
    runs = sorted(path.name for path in Path("logs").iterdir())
    assert train(line) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
    assert sorted(path.name for path in Path("logs").iterdir()) == runs
