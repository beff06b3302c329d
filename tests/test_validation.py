"""The validation split: its images, its decisions, and that the test split decides nothing."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.helpers import run_train
from vqvae import assessment, checkpoint, cli, experiment
from vqvae.commands import train
from vqvae.compare import read_run
from vqvae.config import Config, validation_share
from vqvae.data import Dataset, Images, load
from vqvae.errors import OptionError
from vqvae.progress import WIDTH


def numbered(n: int, *, shuffled: bool = False) -> Dataset:
    """Images whose pixels and labels are the images' numbers."""
    numbers = torch.arange(n)
    split = Images(numbers.to(torch.uint8).view(n, 1, 1, 1).expand(n, 1, 2, 2).contiguous(), numbers)
    return Dataset("numbers", split, split, shuffled=shuffled)


@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize(("share", "count"), [(0.1, 10), (0.254, 25), (1e-9, 1)])
def test_each_training_image_is_in_one_of_the_two_splits(share, count, shuffled):
    data = numbered(100, shuffled=shuffled).with_validation(share)
    assert data.validation is not None
    assert [len(data.train.images), len(data.validation.images), len(data.test.images)] == [100 - count, count, 100]
    assert sorted([*data.train.labels.tolist(), *data.validation.labels.tolist()]) == list(range(100))
    for split in (data.train, data.validation):
        assert torch.equal(split.images[:, 0, 0, 0].long(), split.labels)
    again = numbered(100, shuffled=shuffled).with_validation(share)
    assert torch.equal(data.validation.labels, again.validation.labels)


def test_images_in_any_order_are_sampled_and_those_of_a_cache_are_not_copied():
    data = numbered(200)
    chosen = data.with_validation(0.2).validation.labels
    assert not torch.equal(chosen, torch.arange(160, 200))
    assert 8 <= int((chosen < 100).sum()) <= 32  # from all over
    mapped = numbered(200, shuffled=True)
    held = mapped.with_validation(0.2)
    whole = mapped.train.images.untyped_storage().data_ptr()
    assert held.train.images.untyped_storage().data_ptr() == whole
    assert held.validation.images.untyped_storage().data_ptr() == whole


def test_a_share_that_leaves_no_training_images_is_refused():
    for count, share in ((1, 0.1), (3, 0.9)):
        with pytest.raises(OptionError, match="leaves no training image of [13]; use .*test"):
            numbered(count).with_validation(share)


@pytest.mark.parametrize(("name", "options"), [("digits", {}), ("gauss2d", {"train_points": 90}), ("photos", {})])
def test_every_data_set_can_be_split(name, options):
    whole = load(name, limit=90, **options)
    data = load(name, limit=90, validation=0.2, **options)
    assert (whole.validation, len(data.train.images), len(data.validation.images)) == (None, 72, 18)
    parts = torch.cat([data.train.images, data.validation.images]).flatten(1).tolist()
    assert sorted(parts) == sorted(whole.train.images.flatten(1).tolist())
    assert torch.equal(data.test.images, whole.test.images)
    assert torch.equal(data.held_out.images, data.validation.images)
    assert torch.equal(whole.held_out.images, whole.test.images)


@pytest.mark.parametrize("layout", ["mixed", "train and test"])
def test_folders_are_split_by_the_hashes_of_their_names(tmp_path, layout):
    for i in range(40):
        split = "" if layout == "mixed" else "test/" if i < 10 else "train/"
        path = tmp_path / f"images/{split}{'ab'[i % 2]}/{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4), (i, i, i)).save(path)
    options = {"data_dir": tmp_path / "images", "image_size": 4}
    whole, data = load("folder", **options), load("folder", validation=0.25, **options)
    parts = [split.images[:, 0, 0, 0].tolist() for split in (data.train, data.validation)]
    assert sorted([*parts[0], *parts[1]]) == sorted(whole.train.images[:, 0, 0, 0].tolist())
    assert len(parts[1]) == round(0.25 * len(whole.train.images))
    assert torch.equal(data.test.images, whole.test.images)
    assert set(data.validation.labels.tolist()) == {0, 1}


def test_shares_are_numbers_or_the_word_test():
    assert [validation_share(text) for text in ("0.1", "1e-3", "test")] == [0.1, 0.001, None]


def test_a_run_of_an_earlier_version_chose_on_the_test_split():
    settings = Config().to_dict()
    assert Config.from_dict(settings).validation == "0.1"
    del settings["validation"]
    assert Config.from_dict(settings).validation == "test"


# runs


@pytest.fixture
def there(tmp_path, monkeypatch):
    """An empty folder to run in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


SPLIT = ("--validation", "0.2", "--limit", "50", "--batch-size", "20", "--name")  # 40 train, 10 validation, 50 test


def rows(run: str, kind: str) -> list[dict[str, Any]]:
    lines = Path(f"logs/{run}/metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["kind"] == kind]


def test_the_validation_split_is_watched_and_the_test_split_evaluated_once_at_the_end(there, capsys, monkeypatch):
    seen = []

    def counting(model, images, labels, **options):
        seen.append(len(images))
        return evaluate(model, images, labels, **options) | {"neg_elbo": float(len(seen))}  # the first is the best

    evaluate = experiment.evaluate
    for module in (experiment, assessment):
        monkeypatch.setattr(module, "evaluate", counting)
    assert run_train(*SPLIT, "run", "--epochs", "3") == 0
    assert seen == [10, 10, 10, 50, 50]  # best.pt and checkpoint.pt
    out = capsys.readouterr().out
    assert "digits: 40 train, 10 validation, 50 test, 1x16x16" in out
    assert "validation MSE" in out
    assert "best.pt is epoch 1, of the lowest validation -ELBO" in out
    assert out.index("test   best: MSE") < out.index("test   last: MSE")
    assert all(len(line) <= WIDTH for line in out.splitlines() if line.startswith("test"))
    assert [row["split"] for row in rows("run", "epoch")] == ["validation"] * 3
    assert [(row["split"], row["step"]) for row in rows("run", "test")] == [("test", 2), ("test", 6)]
    assert checkpoint.read("logs/run")["best"] == 1.0
    found = json.loads(Path("logs/run/evaluation.json").read_text())
    assert (found["split"], found["images"], found["step"]) == ("test", 50, 6)
    assert found["chosen_on"] == "nothing: the last step"
    assert found["mse"] == rows("run", "test")[-1]["held_out_mse"] != rows("run", "epoch")[-1]["held_out_mse"]
    events = EventAccumulator("logs/run").Reload()
    assert {"mse/train", "mse/validation", "mse/test"} <= set(events.Tags()["scalars"])
    about = checkpoint.read("logs/run")["data"]
    assert about["examples"] == {"train": 40, "validation": 10, "test": 50}
    assert len(checkpoint.read("logs/run")["examples"]["images"]) == 10


def test_a_resumed_run_keeps_its_split_and_is_bitwise_a_longer_one(there, capsys):
    assert run_train(*SPLIT, "straight", "--epochs", "3") == 0
    assert run_train(*SPLIT, "run", "--epochs", "2") == 0
    assert run_train("--resume", "logs/run", "--epochs", "3", small=False) == 0
    one, other = (checkpoint.read(f"logs/{name}") for name in ("straight", "run"))
    assert all(torch.equal(value, other["model"][key]) for key, value in one["model"].items())
    assert (one["best"], one["best_step"], one["data"]) == (other["best"], other["best_step"], other["data"])
    assert run_train("--resume", "logs/run", "--epochs", "4", "--validation", "0.3", small=False) == 2
    assert "--validation 0.3: a resumed run keeps its settings" in capsys.readouterr().err


def test_a_checkpoint_of_an_earlier_version_resumes_with_its_split(there, recwarn):
    assert run_train("--epochs", "1", "--name", "run") == 0
    saved = checkpoint.read("logs/run")
    del saved["config"]["validation"]
    checkpoint.write(Path("logs/run/checkpoint.pt"), saved)
    assert run_train("--resume", "logs/run", "--epochs", "2", small=False) == 0
    assert [row["split"] for row in rows("run", "epoch")] == ["test", "test"]
    assert not [w for w in recwarn if "data changed" in str(w.message)]
    assert checkpoint.read("logs/run")["config"]["validation"] == "test"


def test_choosing_on_the_test_split_is_named(there, capsys):
    assert run_train("--epochs", "1", "--name", "run", "--patience", "1") == 0
    assert "60 train, 60 test (by which best.pt is chosen)" in capsys.readouterr().out
    assert [row["split"] for row in rows("run", "epoch")] == ["test"]
    assert json.loads(Path("logs/run/evaluation.json").read_text())["chosen_on"] == "test"


def test_a_prior_has_the_split_of_its_autoencoder_unless_it_names_another(there):
    assert run_train(*SPLIT, "first", "--epochs", "1") == 0
    line = ["--prior", "unigram", "--checkpoint", "logs/first", "--batch-size", "20", "--epochs", "1", "--lr", "1e-2"]
    for name, flags, examples in (
        ("same", [], {"train": 40, "validation": 10, "test": 50}),
        ("other", ["--validation", "0.4"], {"train": 30, "validation": 20, "test": 50}),
        ("whole", ["--validation", "test"], {"train": 50, "test": 50}),
    ):
        assert cli.run(train.main, [*line, *flags, "--name", name]) == 0
        assert checkpoint.read(f"logs/{name}")["data"]["examples"] == examples
        assert rows(name, "epoch")[0]["split"] == ("validation" if "validation" in examples else "test")
    assert rows("same", "epoch")[0]["held_out_prior_nats"] != rows("same", "test")[0]["held_out_prior_nats"]


def test_a_start_from_a_model_that_may_have_seen_the_validation_split_is_named(there):
    for name, share in (("held", "0.2"), ("whole", "test")):
        assert run_train("--validation", share, "--name", name, "--epochs", "1") == 0
    for name, size, warned in (
        ("held", "16", False),
        ("held", "8", False),
        ("whole", "16", True),
        ("whole", "8", True),
    ):
        line = ["--validation", "0.2", "--limit", "60", "--image-size", size, "--init-from", f"logs/{name}"]
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            assert cli.run(train.main, [*line, "--batch-size", "20", "--epochs", "1", "--name", f"{name}-{size}"]) == 0
        assert any("trained on images of the validation split" in str(w.message) for w in found) == warned


def test_runs_are_compared_on_the_test_split_if_it_was_evaluated(there):
    assert run_train(*SPLIT, "run", "--epochs", "1") == 0
    whole = read_run("logs/run")
    assert (whole.source, whole.held_out["count"]) == ("evaluation.json", 50)
    Path("logs/run/evaluation.json").unlink()
    watched = read_run("logs/run")
    assert (watched.source, watched.held_out["count"]) == ("metrics.jsonl", 10)
    assert watched.values["mse"] != whole.values["mse"]
