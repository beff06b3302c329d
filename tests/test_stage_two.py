"""A prior on frozen codes: what trains, what is cached, what it costs; and the two stages by the scripts."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

import train
import visualize_codes
from tests.test_autoencoder import make, pictures
from tests.test_scripts import run_train, there  # noqa: F401 (a fixture)
from vqvae import load
from vqvae.stage_two import PriorTraining, extract_codes, weights_checksum

LABELS = torch.zeros(12, dtype=torch.int64)


def test_only_the_prior_trains():
    model = make(prior="pixelcnn")
    stage = PriorTraining(model, conditional=False).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimiser = torch.optim.Adam([p for p in stage.parameters() if p.requires_grad], 0.01)
    stage(torch.randint(7, (12, 2, 2)), LABELS, 0).loss.backward()
    optimiser.step()
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved
    assert all(name.startswith("prior.") for name in moved)
    assert not model.bottleneck.training  # else its EMA would go on


def test_a_uniform_prior_costs_log_k_a_code():
    stage = PriorTraining(make(prior="unigram"), conditional=False)  # its untrained logits are equal
    results = stage.evaluate(torch.randint(7, (12, 2, 2)), LABELS, batch_size=5)
    assert results["bits_per_code"] == pytest.approx(math.log2(7), rel=1e-6)
    assert results["uniform_bits_per_code"] == pytest.approx(math.log2(7))
    assert results["nats"] == pytest.approx(4 * math.log(7), rel=1e-6)
    assert results["bits_per_dim"] == pytest.approx(4 * math.log2(7) / 192, rel=1e-6)


def test_codes_are_cached_with_the_weights_they_come_from(tmp_path):
    model, images, cache = make().eval(), pictures(12), tmp_path / "codes.npz"
    codes = extract_codes(model, images, cache, batch_size=5)
    assert torch.equal(codes.long(), model.encode(images))
    assert np.load(cache)["codes"].dtype == np.uint8
    stamp = cache.stat().st_mtime_ns
    assert torch.equal(extract_codes(model, images, cache), codes)
    assert cache.stat().st_mtime_ns == stamp
    before = weights_checksum(model)
    with torch.no_grad():
        model.bottleneck.codebook.vectors.copy_(model.bottleneck.codebook.vectors.flip(0))
    assert weights_checksum(model) != before
    assert torch.equal(extract_codes(model, images, cache).long(), 6 - codes.long())  # made anew
    cache.write_bytes(b"damaged")
    assert torch.equal(extract_codes(model, images, cache).long(), 6 - codes.long())


def test_two_stages_by_hand_then_samples_and_completions(there):  # noqa: F811
    assert run_train("--epochs", "1", "--name", "first") == 0
    line = ["--prior", "pixelcnn", "channels=8", "blocks=1", "head=8", "--checkpoint", "logs/first/checkpoint.pt"]
    assert train.main([*line, "--epochs", "2", "--batch-size", "20", "--conditional", "--name", "second"]) == 0
    last = json.loads(Path("logs/second/metrics.jsonl").read_text().splitlines()[-1])
    assert 0 < last["held_out_bits_per_code"] < 6
    first, second = load("logs/first/checkpoint.pt"), load("logs/second/checkpoint.pt")
    images = torch.randint(256, (3, 1, 16, 16), dtype=torch.uint8)
    assert torch.equal(first.encode(images), second.encode(images))
    assert torch.equal(first.reconstruct(images), second.reconstruct(images))
    assert train.main(["--resume", "logs/second", "--epochs", "3"]) == 0
    assert train.main(["--evaluate", "--checkpoint", "logs/second", "--iw-samples", "1"]) == 0
    assert json.loads(Path("logs/second/evaluation.json").read_text())["prior"] == "pixelcnn"
    line = ["--checkpoint", "logs/second", "--samples", "9", "--temperature", "0.8", "--top-k", "3", "--class", "3"]
    assert visualize_codes.main(line) == 0
    drawn = {p.name for p in Path("plots/second").iterdir()}
    assert {"samples.png", "class_rows.png", "completions.png", "training_animation.gif"} <= drawn
    assert visualize_codes.main(["--checkpoint", "logs/second", "--class", "10"]) == 2


def test_a_prior_can_train_jointly_with_the_autoencoder(there):  # noqa: F811
    prior = ["--prior", "transformer", "layers=1", "width=8", "heads=2", "--lr", "3e-2"]
    assert run_train(*prior, "--epochs", "6", "--name", "joint") == 0
    rows = [json.loads(line) for line in Path("logs/joint/metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["held_out_rate"] < 0.95 * 16 * math.log(16)  # cheaper than codes of which nothing is known


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--prior pixelcnn --checkpoint logs/second", "is a prior's"),
        ("--prior normal --checkpoint logs/first", "--prior normal needs latent_dim"),
        ("--prior uniform --checkpoint logs/first", "has nothing to learn"),
        ("--prior unigram --checkpoint logs/first --codes 3", "come from --checkpoint"),
        ("--checkpoint logs/first", "name the prior"),
    ],
)
def test_stages_that_do_not_fit_are_refused(there, capsys, line, message):  # noqa: F811
    assert run_train("--epochs", "1", "--name", "first") == 0
    second = "--prior unigram --checkpoint logs/first --epochs 1 --batch-size 20 --name second"
    assert train.main(second.split()) == 0
    capsys.readouterr()
    assert train.main(line.split()) == 2
    assert message in capsys.readouterr().err


def test_a_preset_of_two_stages_runs_both(there):  # noqa: F811
    line = "--preset vqvae-pixelcnn --dataset digits --limit 40 --batch-size 20 --image-size 8 --hidden 256"
    own = "--prior pixelcnn channels=8 blocks=1 head=8 --max-steps 2 --name two"
    stage = train.PRESETS["vqvae-pixelcnn"].prior
    stage["batch_size"], kept = 20, stage.get("batch_size")
    try:
        assert train.main([*line.split(), *own.split()]) == 0
    finally:
        stage.pop("batch_size") if kept is None else stage.update(batch_size=kept)
    config = json.loads(Path("logs/two-prior/config.json").read_text())
    assert config["prior"]["options"]["blocks"] == 1
    assert config["bottleneck"]["options"]["code_dim"] == 256
