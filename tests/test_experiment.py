"""`train.py` end to end: runs, resumed runs, evaluation, and errors of one line."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from tests.helpers import CONSTANT, ROOT, SMALL, images, run_train
from vqvae import checkpoint, cli, data, experiment, load, run_data
from vqvae.commands import export, train, visualize
from vqvae.config import Config
from vqvae.data import Dataset, Images
from vqvae.errors import OptionError
from vqvae.runs import Lock
from vqvae.stage_one import AutoencoderTraining


@pytest.fixture(autouse=True)
def there(tmp_path, monkeypatch):
    """An empty folder to run in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def resume(line: str) -> int:
    return run_train("--resume", *line.split(), small=False)


def evaluate(line: str) -> dict[str, Any]:
    assert run_train("--evaluate", "--checkpoint", *line.split(), small=False) == 0
    return json.loads(Path(line.split()[0], "evaluation.json").read_text())


def last_row(run: str) -> dict[str, Any]:
    lines = Path(f"logs/{run}/metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["kind"] == "epoch"][-1]


def weights(run: str) -> dict[str, Tensor]:
    return torch.load(f"logs/{run}/checkpoint.pt", weights_only=True)["model"]


def assert_same_weights(one: str, other: str) -> None:
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    for key, value in first.items():
        assert torch.equal(value, second[key]), key


def test_a_run_logs_stores_and_draws(there, capsys):
    assert run_train("--epochs", "2", "--name", "run", "--log-every", "2") == 0
    out = capsys.readouterr().out
    assert "run    logs/run" in out
    assert "visualize_codes.py --checkpoint logs/run/checkpoint.pt" in out
    logs, plots = there / "logs" / "run", there / "plots" / "run"
    assert {"config.json", "metrics.jsonl", "checkpoint.pt", "best.pt"} <= {p.name for p in logs.iterdir()}
    drawn = sorted(path.name for path in (plots / "generated_samples").iterdir())
    assert drawn == ["epoch_001.png", "epoch_002.png", "original.png"]
    config = json.loads((logs / "config.json").read_text())
    assert config["bottleneck"]["options"]["num_codes"] == 16
    assert config["bottleneck"]["options"]["decay"] == 0.99  # defaults are written out
    last = last_row("run")
    for name in ("mse", "nmse", "psnr", "commitment", "perplexity", "active_codes", "neg_elbo", "neg_elbo_se"):
        assert f"held_out_{name}" in last
    for name in ("mse", "nmse", "commitment", "perplexity", "active_codes"):
        assert f"train_{name}" in last
    assert last["images_per_s"] > 0


def test_a_run_stores_and_prints_the_precision_chosen_and_keeps_it(there, capsys, monkeypatch):
    monkeypatch.setattr(experiment, "choose_precision", lambda name, device: "bf16" if name == "auto" else name)
    assert run_train("--epochs", "1", "--name", "run") == 0
    assert ", cpu, bf16\n" in capsys.readouterr().out
    monkeypatch.undo()
    os.chdir(there)
    assert json.loads(Path("logs/run/config.json").read_text())["precision"] == "bf16"
    assert resume("logs/run --epochs 2") == 0
    assert ", cpu, bf16\n" in capsys.readouterr().out
    assert run_train("--epochs", "1", "--name", "other") == 0
    assert ", cpu, fp32\n" in capsys.readouterr().out


def test_tensorboards_own_reader_finds_the_tags():
    assert run_train("--epochs", "1", "--name", "run", "--log-every", "1") == 0
    events = EventAccumulator("logs/run", size_guidance={"scalars": 0, "images": 0})
    events.Reload()
    tags = events.Tags()
    assert {"loss/train", "mse/train", "mse/test", "perplexity/test", "schedule/lr"} <= set(tags["scalars"])
    assert not [tag for tag in tags["scalars"] if "_se" in tag or "codebook_size" in tag]
    assert set(tags["images"]) == {"reconstructions", "code_usage", "code_maps"}  # the former next to their originals
    assert "config/text_summary" in tags["tensors"]
    assert [event.step for event in events.Scalars("loss/train")] == [1, 2, 3]
    assert any("hparams" in tag for tag in events.summary_metadata)


def test_two_epochs_and_a_resume_to_four_are_bitwise_four(there, tmp_path_factory, monkeypatch):
    assert run_train("--epochs", "4", "--name", "straight") == 0
    assert run_train("--epochs", "2", "--name", "run") == 0
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    monkeypatch.chdir(elsewhere)
    assert resume(f"{there}/logs/run --epochs 4 --plot-dir {there}/plots") == 0
    assert not list(elsewhere.iterdir())
    monkeypatch.chdir(there)
    assert_same_weights("straight", "run")
    assert (there / "plots/run/generated_samples/epoch_004.png").exists()


def test_augmentation_resumes_bitwise_and_does_not_change_evaluation():
    line = ("--augment", "crop-flip", "--bottleneck", "gumbel", "--epochs")  # both draw in every step
    assert run_train(*line, "2", "--name", "straight") == 0
    assert run_train(*line, "1", "--name", "run") == 0
    assert resume("logs/run --epochs 2") == 0
    assert_same_weights("straight", "run")
    found = evaluate("logs/run --iw-samples 1")
    assert found["mse"] == pytest.approx(last_row("run")["held_out_mse"], rel=1e-4)


def test_an_evaluation_on_other_test_images_warns_and_names_them(there, recwarn):
    for name, value in (("first", 0), ("second", 255)):
        np.savez(there / f"{name}.npz", images=np.full((20, 16, 16), value, np.uint8))
    line = "--dataset npz --data-dir first.npz --name run --max-steps 1 --batch-size 4"
    assert run_train(*line.split()) == 0
    recwarn.clear()
    first = evaluate("logs/run --iw-samples 0")
    assert first["fingerprint"] == checkpoint.read(there / "logs/run")["data"]["fingerprint"]["test"]
    assert not recwarn.list
    with pytest.warns(UserWarning, match="the test images are not those of the run"):
        second = evaluate("logs/run --data-dir second.npz --iw-samples 0")
    assert second["images"] == first["images"]
    assert second["fingerprint"] != first["fingerprint"]


def test_a_resumed_run_keeps_its_settings(capsys):
    assert run_train("--epochs", "1", "--name", "run") == 0
    capsys.readouterr()
    for line, message in (
        ("--lr 1", "--lr 1: a resumed run keeps its settings"),
        ("--codes 8", "--codes 8: a resumed run keeps its settings"),
        ("--epochs 1", "--resume logs/run: has taken all of its 3 steps; raise epochs or max_steps"),
    ):
        assert resume(f"logs/run {line}") == 2
        assert message in capsys.readouterr().err
    assert resume("logs/run --epochs 2 --lr 3e-4") == 0  # the same value is no change


def test_a_longer_run_says_that_its_learning_rate_rises():
    assert run_train("--epochs", "1", "--name", "run", "--lr", "cosine:1e-3:1e-5") == 0
    with pytest.warns(UserWarning, match=r"the learning rate rises from 1e-05 to 0\.000505: its schedule ends with"):
        assert resume("logs/run --epochs 2") == 0


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--kl-weight 0.5", "error: --kl-weight 0.5: has no effect, because with one code and the prior uniform"),
        ("--objective elbo free_bits=2", "--objective elbo free_bits=2.0: has no effect"),
        (
            "--bottleneck deterministic --prior unigram --objective probabilistic entropy_scale=2",
            "entropy_scale=2.0: has no effect, because the posterior is one code",
        ),
    ],
)
def test_a_weight_of_a_constant_is_refused(there, capsys, line, message):
    assert run_train(*line.split()) == 2
    assert message in capsys.readouterr().err
    assert not list(there.iterdir())


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--bottleneck vq projection=no --code-dim 7", "error: --code-dim 7: must equal the nets' "),
        ("--init-from logs/first --codes 32", "error: --codes 32: the model of --init-from has num_codes=16"),
        ("--init-from logs/first --hidden 32", "error: --hidden 32: the model of --init-from has hidden=8"),
    ],
)
def test_an_error_about_an_option_names_the_shorthand_that_was_typed(capsys, line, message):
    if "first" in line:
        assert run_train("--name", "first", "--max-steps", "1") == 0
    assert run_train(*line.split()) == 2
    assert message in capsys.readouterr().err


TYPED = [line.strip().split("  ")[0] for line in train.EXAMPLES.splitlines() if line.startswith("  python train.py")]


@pytest.mark.parametrize("line", [line for line in TYPED if not re.search("--(resume|checkpoint|evaluate|list)", line)])
def test_the_examples_of_help_train(there, line):
    words = re.sub(r"--(dataset|data-dir|image-size|epochs) \S+", "", line.removeprefix("python train.py")).split()
    more = "--dataset digits --limit 40 --batch-size 20 --max-steps 1 --device cpu"
    assert run_train(*words, *more.split(), small=False) == 0


def test_a_weight_of_0_is_no_weight(there):
    assert run_train("--kl-weight", "0.0", "--objective", "elbo", "free_bits=0", "--epochs", "1") == 0


def test_a_longer_run_says_which_other_schedules_jump(recwarn):
    line = ("--bottleneck", "gumbel", "temperature=linear:1:0.1", "--kl-weight", "linear:0:1:1")
    assert run_train(*line, "--epochs", "1", "--name", "run") == 0
    assert resume("logs/run --epochs 2") == 0
    jumps = [str(w.message).split(": its schedule")[0] for w in recwarn if "a run of this length" in str(w.message)]
    assert jumps == ["the temperature rises from 0.1 to 0.55"]  # the rate and the KL weight have their own lengths


def test_the_default_start_loses_no_codes(tmp_path):
    line = "--batch-size 32 --limit 640 --max-steps 40 --log-every 1 --device cpu --hidden 32 --name run"
    assert run_train(*line.split(), small=False) == 0
    rows = [json.loads(line) for line in Path("logs/run/metrics.jsonl").read_text().splitlines()]
    perplexity = [row["batch_perplexity"] for row in rows if row["kind"] == "train"]
    assert len(perplexity) == 40
    assert min(perplexity) > 125  # 175; with warmup=no 86
    assert last_row("run")["held_out_perplexity"] > 330  # 434; with warmup=no 234


TOKENIZER = "--nets vqgan features=4 ch_mult=1,2 --dataset photos crops=20 test_crops=6"


def test_a_run_starts_from_a_folder_of_diffusers(capsys):
    assert run_train(*TOKENIZER.split(), "--epochs", "1", "--name", "run") == 0
    assert cli.run(export.main, "--checkpoint logs/run --output there --format diffusers".split()) == 0
    line = "--dataset photos crops=20 test_crops=6 --image-size 16 --batch-size 20 --epochs 1 --device cpu --lr 1e-30"
    line += " --validation test"
    learn = "--bottleneck vq codebook=gradient revive=0"
    assert run_train("--init-from", "there", *line.split(), *learn.split(), "--name", "more", small=False) == 0
    assert "start  the weights of there" in capsys.readouterr().out
    before, after = load("there").state_dict(), load("logs/more").state_dict()
    for name, value in after.items():  # neither redrawn nor fitted to the data again
        assert name.endswith(("counts", "debias")) or torch.allclose(value, before[name]), name
    assert last_row("more")["held_out_mse"] == pytest.approx(last_row("run")["held_out_mse"], rel=1e-3)
    shutil.rmtree("there")  # a resumed run needs it no more
    assert resume("logs/more --epochs 2") == 0


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--dataset digits", "--init-from logs/run: its images have 3 channels, and those of the data 1"),
        ("--bottleneck vq projection=no", "--bottleneck vq code_dim=4: must equal the nets' 8 feature channels"),
        ("--init-from nowhere", "--init-from"),
    ],
)
def test_a_model_to_start_from_that_does_not_fit_is_one_line(there, line, message, capsys):
    assert run_train("--dataset", "photos", "crops=20", "test_crops=6", "--epochs", "1", "--name", "run") == 0
    capsys.readouterr()
    files = sorted(there.rglob("*"))
    words = line if line.startswith("--init-from") else f"--init-from logs/run {line}"
    data = [] if "--dataset" in line else ["--dataset", "photos", "crops=20", "test_crops=6"]
    assert run_train(*words.split(), *data, "--image-size", "16", "--batch-size", "10", small=False) == 2
    assert message in capsys.readouterr().err
    assert sorted(there.rglob("*")) == files


@pytest.mark.parametrize("preset", ["dvq-vqvae", "dvq-gumbel", "dvq-dalle"])
def test_presets_of_deep_vector_quantization_train(preset):
    line = f"--preset {preset} --dataset digits --image-size 32 --limit 48 --batch-size 16 --max-steps 3 --hidden 16"
    assert run_train(*line.split(), "--codes", "32", "--name", "run", "--device", "cpu", small=False) == 0
    config = json.loads(Path("logs/run/config.json").read_text())
    assert (config["augment"], config["weight_decay"]) == ("crop-flip", 1e-4)
    last = last_row("run")
    assert last["step"] == 3
    assert 0 < last["held_out_mse"] < 1


def spawn(*words: str) -> subprocess.Popen:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "train.py"), *SMALL, *CONSTANT, *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def wait_for(path: Path, process: subprocess.Popen) -> None:
    for _ in range(6000):
        if path.exists():
            return
        if process.poll() is not None:
            pytest.fail(process.communicate()[1])
        time.sleep(0.05)
    process.kill()
    pytest.fail(f"{path} never appeared")


def test_a_killed_run_and_a_terminated_one_resume_bitwise(there):
    long = ("--epochs", "100", "--checkpoint-every", "1")
    processes = {name: spawn(*long, "--name", name) for name in ("killed", "stopped")}
    for name, number in (("killed", signal.SIGKILL), ("stopped", signal.SIGTERM)):
        wait_for(there / "logs" / name / "checkpoint.pt", processes[name])
        processes[name].send_signal(number)
    out, _ = processes["stopped"].communicate(timeout=60)
    processes["killed"].communicate(timeout=60)
    assert processes["stopped"].returncode == 143
    assert "Resume with: python train.py --resume logs/stopped" in out
    reached = max(torch.load(f"logs/{name}/checkpoint.pt", weights_only=True)["step"] for name in processes)
    assert reached < 300
    epochs = reached // 3 + 2
    assert run_train("--epochs", str(epochs), "--name", "straight", "--checkpoint-every", "1") == 0
    for name in processes:
        assert resume(f"logs/{name} --epochs {epochs}") == 0
        assert_same_weights("straight", name)
        assert points(name) == points("straight")


def test_an_interrupted_run_ends_with_exit_code_130(capsys, monkeypatch):
    monkeypatch.setattr(experiment, "fit", lambda *args, **keywords: Path("logs/run/checkpoint.pt").touch())
    assert run_train("--name", "run") == 130
    assert "interrupted; saved logs/run/checkpoint.pt. Resume with: python train.py --resume logs/run" in (
        capsys.readouterr().out
    )


def test_an_interrupted_first_stage_starts_no_second(monkeypatch):
    monkeypatch.setattr(experiment, "fit", lambda *args, **keywords: None)
    line = "--preset vqvae-pixelcnn --dataset digits --limit 40 --batch-size 20 --image-size 8 --hidden 256 --name two"
    assert run_train(*line.split(), small=False) == 130
    assert list(Path("logs").iterdir()) == []  # of a run that never began, nothing stays


def test_a_second_interrupt_is_one_line(capsys):
    def insist(argv):
        raise KeyboardInterrupt

    assert cli.run(insist, []) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_a_trained_model_loads_in_python():
    assert run_train("--epochs", "1", "--name", "run") == 0
    model = load("logs/run/checkpoint.pt")
    codes = model.encode(images(3, (1, 16, 16)))
    assert codes.shape == (3, 4, 4)
    assert model.decode(codes).shape == (3, 1, 16, 16)


def test_evaluation_prints_and_stores(capsys):
    assert run_train("--epochs", "1", "--name", "run") == 0
    found, last = evaluate("logs/run --iw-samples 2"), last_row("run")
    for name in ("neg_elbo", "mse", "perplexity"):
        assert found[name] == pytest.approx(last[f"held_out_{name}"], rel=1e-4)
    assert (found["run"], found["images"], found["step"], found["iw_samples"]) == ("run", 60, 3, 2)
    out = capsys.readouterr().out
    assert "neg_elbo_se" in out
    assert "stored in logs/run/evaluation.json" in out


def test_an_evaluation_names_its_protocol_and_weights_and_probes_the_codes():
    assert run_train("--epochs", "1", "--name", "run") == 0
    found = evaluate("logs/run --iw-samples 1 --probe")
    assert found.items() >= checkpoint.identity_of(checkpoint.read("logs/run")).items()
    assert found["protocol"].startswith(
        "60 images of the test split of digits, 1x16x16, scaled (bilinear, antialiased)"
    )
    assert "probe: logistic regression" in found["protocol"]
    for name in ("probe_accuracy", "probe_control", "label_bits", "label_bits_control"):
        assert 0 <= found[name] <= 4


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--evaluate --metrics fid", "--metrics fid: needs the "),  # weights, or a package
        ("--evaluate --metrics psnr", "--metrics psnr: must be one of lpips, fid, kid, is, lite0"),
        ("--evaluate --metrics lpips --weights config.json", "config.json: cannot be read as weights"),
        ("--evaluate --weights checkpoint.pt", "--weights checkpoint.pt: has no effect without --metrics"),
        (
            "--evaluate --metrics lpips --samples 3",
            "--samples 3: has no effect without --metrics fid, kid, is or lite0",
        ),
        ("--probe", "--probe: has no effect without --evaluate"),
        ("--metrics fid kid", "--metrics fid kid: has no effect without --evaluate"),
    ],
)
def test_what_evaluation_cannot_use_is_refused(line, message, capsys):
    Path("config.json").write_text("{}")
    assert run_train("--max-steps", "1", "--name", "run") == 0
    words = [*line.split(), *(("--checkpoint", "logs/run") if "--evaluate" in line else ())]
    before = Path("logs/run/evaluation.json").read_bytes()
    capsys.readouterr()
    assert run_train(*words, small=False) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
    assert Path("logs/run/evaluation.json").read_bytes() == before


def test_a_default_name_is_numbered_and_a_given_one_protected(capsys):
    assert run_train("--epochs", "1") == 0
    assert run_train("--epochs", "1") == 0
    assert sorted(path.name for path in Path("logs").iterdir()) == ["vqvae-digits", "vqvae-digits-2"]
    before = Path("logs/vqvae-digits/checkpoint.pt").read_bytes()
    assert run_train("--name", "vqvae-digits") == 2
    assert "--name vqvae-digits: logs/vqvae-digits already contains a run" in capsys.readouterr().err
    assert Path("logs/vqvae-digits/checkpoint.pt").read_bytes() == before


@pytest.mark.parametrize("what", [*experiment.LISTINGS, "presets"])
def test_lists_show_members_options_and_sources(what, capsys):
    assert run_train("--list", what, small=False) == 0
    shown = {
        "bottlenecks": "--bottleneck vq\n",
        "objectives": "--objective probabilistic\n",
        "presets": "--preset sonnet-cifar10",
    }
    assert shown.get(what, f"--{experiment.LISTINGS.get(what)} ") in capsys.readouterr().out


def test_points_of_the_plane_train_and_are_evaluated(capsys):
    assert run_train("--preset", "vae-2d-2", "--epochs", "2", "--limit", "640", "--name", "points", small=False) == 0
    found = evaluate("logs/points --iw-samples 2")
    assert found["gap"] == pytest.approx(found["neg_elbo"] - found["data_entropy"])
    assert found["data_entropy"] == pytest.approx(4.4473, abs=1e-4)
    assert not Path("plots/points/generated_samples").exists()  # points are no images
    assert run_train("--evaluate", "--checkpoint", "logs/points", "--probe", small=False) == 2
    assert capsys.readouterr().err == "error: --probe: the data set gauss2d-2 has no labels; leave it out\n"


@pytest.mark.parametrize("prior", ["normal", "made-flow"])
def test_a_vae_trains(prior):
    line = f"--preset vae-cifar10 --dataset digits --prior {prior} --limit 60 --batch-size 20 --hidden 4"
    line += " --bottleneck gaussian latents=2 --image-size 16 --epochs 2 --kl-weight linear:0:1:3 --name vae"
    assert run_train(*line.split(), small=False) == 0
    last = last_row("vae")
    for name in ("neg_elbo", "reconstruction_nats", "rate"):
        assert {f"train_{name}", f"held_out_{name}"} <= set(last)
    assert last["held_out_bits_per_dim"] > 0
    assert 0 <= last["held_out_active_units"] <= 2


def test_only_the_first_batches_of_a_limited_set_are_used(capsys):
    assert run_train("--epochs", "1", "--name", "run") == 0
    assert "60 train, 60 test (by which best.pt is chosen), 1x16x16" in capsys.readouterr().out


def contents(folder: Path) -> dict[str, Any]:
    """Every file and folder below a folder; files with their content and time of modification."""
    found = sorted(folder.rglob("*"))
    return {str(p): (p.read_bytes(), p.stat().st_mtime_ns) if p.is_file() else None for p in found}


def points(run: str) -> dict[str, list[tuple[int, float]]]:
    """The points that TensorBoard reads, except of the speed."""
    events = EventAccumulator(f"logs/{run}", size_guidance={"scalars": 0}, purge_orphaned_data=True)
    events.Reload()
    tags = [tag for tag in events.Tags()["scalars"] if not tag.endswith("images_per_s")]
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in tags}


def killed(monkeypatch, *words: str, at: str = "initialize", number: int | None = None) -> int:
    """Train, and interrupt the run where AutoencoderTraining does something for the first time."""
    original, signals = getattr(AutoencoderTraining, at), [number] if number else []

    def interrupted(*args: Any, **keywords: Any) -> Any:
        if signals:
            os.kill(os.getpid(), signals.pop())
        return original(*args, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(AutoencoderTraining, at, interrupted)
        return run_train(*words)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_run_stopped_before_its_first_checkpoint_is_started_again(monkeypatch, capsys, number, code):
    assert killed(monkeypatch, "--epochs", "1", "--name", "run", number=number) == code
    assert capsys.readouterr().err == "interrupted; nothing was saved yet; start it again as before\n"
    before = contents(Path("logs"))
    assert resume("logs/run") == 2
    assert capsys.readouterr().err == (
        "error: --resume logs/run: was stopped before its first checkpoint; start it again, with the flags it had and "
        "--name run\n"
    )
    assert contents(Path("logs")) == before
    assert run_train("--epochs", "1", "--name", "run") == 0
    assert run_train("--epochs", "1", "--name", "straight") == 0
    assert_same_weights("straight", "run")
    assert points("run") == points("straight")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_exit_code_says_which_signal_stopped_a_run(monkeypatch, capsys, number, code):
    words = ("--epochs", "2", "--log-dir", "my logs", "--name", "run")
    assert killed(monkeypatch, *words, at="summary", number=number) == code
    assert "--resume 'my logs/run'\n" in capsys.readouterr().out
    assert resume_quoted("my logs/run") == 0
    assert "--checkpoint 'my logs/run/checkpoint.pt'\n" in capsys.readouterr().out


def test_a_run_whose_terminal_is_closed_saves(there):
    pty = pytest.importorskip("pty")
    ours, terminal = pty.openpty()
    words = "--epochs 1000 --checkpoint-every 1 --name run"
    command = [sys.executable, str(ROOT / "train.py"), *SMALL, *words.split()]
    child = subprocess.Popen(command, stdin=terminal, stdout=terminal, stderr=terminal, start_new_session=True)
    os.close(terminal)
    while not Path("logs/run/checkpoint.pt").exists():
        os.read(ours, 1000)
    os.close(ours)
    child.send_signal(signal.SIGHUP)
    assert child.wait(timeout=60) == 129
    assert not list(there.rglob("*.partial"))
    assert resume("logs/run --max-minutes 0.001") == 0


def test_a_run_that_was_killed_before_its_last_evaluation_is_evaluated_when_it_is_resumed(monkeypatch, capsys):
    assert run_train("--epochs", "1", "--name", "straight") == 0

    def killed_there(*args: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(experiment, "assess_end", killed_there)
        assert run_train("--epochs", "1", "--name", "run") == 130
    assert not Path("logs/run/evaluation.json").exists()
    assert resume("logs/run") == 0
    evaluations = [json.loads(Path(f"logs/{name}/evaluation.json").read_text()) for name in ("straight", "run")]
    assert [evaluation.pop("run") for evaluation in evaluations] == ["straight", "run"]
    assert evaluations[0] == evaluations[1]
    assert points("run") == points("straight")
    capsys.readouterr()
    assert resume("logs/run") == 2
    assert "has taken all of its 3 steps" in capsys.readouterr().err


def resume_quoted(folder: str) -> int:
    return run_train("--resume", folder, small=False)


def test_a_signal_in_the_last_step_of_a_first_stage_starts_no_second(monkeypatch, capsys):
    line = "--preset vqvae-pixelcnn --dataset digits --limit 40 --batch-size 20 --image-size 8 --hidden 256 --name two"
    words = [*line.split(), "--epochs", "1", "--device", "cpu"]

    def interrupted(*args: Any, **keywords: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return {}

    monkeypatch.setattr(AutoencoderTraining, "summary", interrupted)
    assert run_train(*words, small=False) == 143
    assert [path.name for path in Path("logs").iterdir()] == ["two"]


@pytest.mark.parametrize("moment", ["run_data.load", "build_autoencoder", "plots.image_grid", "evaluate"])
def test_an_interrupt_at_any_moment_is_one_line_and_leaves_no_part_of_a_file(there, monkeypatch, capsys, moment):
    module, _, name = moment.rpartition(".")
    target = getattr(experiment, module) if module else experiment
    original = getattr(target, name)

    def interrupted(*args: Any, **keywords: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return original(*args, **keywords)

    monkeypatch.setattr(target, name, interrupted)
    assert run_train("--epochs", "2", "--name", "run") == 143
    out, err = capsys.readouterr()
    assert (out + err).count("interrupted") == 1
    assert not list(there.rglob("*.partial"))
    assert Path("logs/run/checkpoint.pt").exists() == (moment == "evaluate")
    assert Path("logs/run").exists() == (moment in ("evaluate", "plots.image_grid"))


def test_a_resumed_run_removes_what_a_killed_process_left(there):
    assert run_train("--epochs", "1", "--name", "run") == 0
    for folder in ("logs/run/best.pt", "plots/run/generated_samples/epoch_002.png"):
        Path(f"{folder}.1234.partial").touch()
    assert resume("logs/run --epochs 2") == 0
    assert not list(there.rglob("*.partial"))


def test_a_refused_resume_changes_nothing_on_disk(there, capsys):
    assert run_train("--epochs", "1", "--name", "run", "--dataset", "photos", "crops=60", "test_crops=60") == 0
    shutil.copytree("logs/run", "copied")
    Path("copied/.lock").unlink()
    before = contents(there)
    for line in (
        "logs/run --epochs 1",
        "logs/run --lr 1",
        "logs/run --epochs 2 --plot-dir logs/run/config.json",
        "logs/run/config.json --epochs 2",
        "copied --epochs 1",
        "copied --codes 8",
    ):
        assert resume(line) == 2, line
        assert capsys.readouterr().err.count("\n") == 1
        assert contents(there) == before, line


def test_a_second_process_may_not_resume_a_run_that_is_being_written(there, capsys):
    assert run_train("--epochs", "1", "--name", "run") == 0
    capsys.readouterr()
    with Lock() as lock:
        lock.take(Path("logs/run"))
        lock.keep()
        before = contents(there)
        assert resume("logs/run --epochs 2") == 2
        assert re.fullmatch(
            r"error: --resume logs/run: another process \(.*\) writes this run; wait until it ends, or stop it\n",
            capsys.readouterr().err,
        )
        assert contents(there) == before
    assert resume("logs/run --epochs 2") == 0


@pytest.mark.parametrize("named", ["moved/other", "moved/other/checkpoint.pt", "."])
def test_a_run_that_was_moved_resumes_and_writes_only_there(there, monkeypatch, named):
    assert run_train("--epochs", "2", "--name", "straight") == 0
    assert run_train("--epochs", "1", "--name", "run", "--plot-dir", f"{there}/elsewhere/plots") == 0
    Path("moved").mkdir()
    Path("logs/run").rename("moved/other")
    stored = checkpoint.read("moved/other")
    stored |= {"run": "../../evil", "plots": str(there / "evil")}
    stored["config"] |= {"name": "evil", "log_dir": str(there / "evil"), "plot_dir": str(there / "evil")}
    checkpoint.write(Path("moved/other/checkpoint.pt"), stored)
    shutil.rmtree("elsewhere")
    straight = contents(there / "logs")
    if named == ".":
        monkeypatch.chdir("moved/other")
    assert resume(f"{named} --epochs 2") == 0
    drawn = Path("plots/other/generated_samples/epoch_002.png").resolve()
    assert drawn.exists()
    monkeypatch.chdir(there)
    assert {p.name for p in there.iterdir()} <= {"logs", "plots", "moved"}
    assert contents(there / "logs") == straight
    shutil.copytree("moved/other", "logs/other")
    assert_same_weights("straight", "other")
    found = checkpoint.read("moved/other")
    assert (found["run"], found["config"]["name"]) == ("other", "other")
    assert Path(found["plots"]) == drawn.parent.parent
    assert resume("moved/other --epochs 3 --plot-dir drawn") == 0
    assert Path("drawn/other/generated_samples/epoch_003.png").exists()


def test_a_moved_prior_resumes_without_its_autoencoders_folder(there):
    assert run_train("--epochs", "1", "--name", "run") == 0
    line = "--prior pixelcnn channels=8 blocks=1 --checkpoint logs/run --batch-size 20 --device cpu --name prior"
    assert run_train(*line.split(), "--epochs", "1", small=False) == 0
    Path("moved").mkdir()
    Path("logs/prior").rename("moved/prior")
    stored = checkpoint.read("moved/prior")
    stored["config"] |= {"checkpoint": str(there / "evil" / "checkpoint.pt")}
    checkpoint.write(Path("moved/prior/checkpoint.pt"), stored)
    shutil.rmtree("logs")
    assert resume("moved/prior --epochs 2") == 0
    assert {path.name for path in there.iterdir()} == {"moved", "plots"}


def test_a_resumed_run_says_that_its_data_changed(there, capsys, monkeypatch):
    assert run_train("--epochs", "1", "--name", "run") == 0
    capsys.readouterr()
    assert resume("logs/run --epochs 2") == 0
    assert capsys.readouterr().err == ""

    def changed(change: Callable[[Dataset], Dataset], epochs: int) -> str:
        with monkeypatch.context() as patch:
            load = run_data.load
            patch.setattr(run_data, "load", lambda *args, **more: change(load(*args, **more)))
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                assert resume(f"logs/run --epochs {epochs}") == 0
        return "".join(str(warning.message) for warning in caught if warning.category is UserWarning)

    def other_pixels(data: Dataset) -> Dataset:
        return data._replace(train=data.train._replace(images=255 - data.train.images))

    def fewer(data: Dataset) -> Dataset:
        return data._replace(train=Images(data.train.images[:50], data.train.labels[:50]))

    since = "the data changed since this run was saved"
    more = "it does not take the steps that it would have taken"
    assert changed(other_pixels, 3) == f"{since} (other train images); {more}"
    assert changed(other_pixels, 4) == ""
    assert changed(fewer, 9) == f"{since} (60 train images then, 50 now); {more}"


def test_data_that_an_earlier_version_described_without_hashes_are_compared_without_them(recwarn):
    dataset = data.load("digits", limit=5)
    now = run_data.identity(dataset) | {"shape": [1, 8, 8], "classes": ["one", "two"]}
    before = {"shape": (1, 8, 8), "classes": ["one"]}
    run_data.compare(before, now, Config())
    run_data.compare_test(before, dataset)
    assert not recwarn.list
    with pytest.raises(OptionError, match="the classes are one, two, and those of this run were one"):
        run_data.compare(before, now, Config(conditional=True))  # only its labels would mean other classes


def test_a_resumed_run_refuses_images_of_another_shape(capsys, monkeypatch):
    assert run_train("--epochs", "1", "--name", "run") == 0
    before, load = contents(Path("logs")), run_data.load
    smaller = lambda split: Images(split.images[..., :8, :8].contiguous(), split.labels)  # noqa: E731
    monkeypatch.setattr(
        run_data,
        "load",
        lambda *args, **more: (data := load(*args, **more))._replace(
            train=smaller(data.train), test=smaller(data.test)
        ),
    )
    capsys.readouterr()
    assert resume("logs/run --epochs 2") == 2
    assert "--data-dir data: the images are 1x8x8, and those of this run were 1x16x16" in capsys.readouterr().err
    assert contents(Path("logs")) == before


def write_images(*names: str) -> None:
    for number, name in enumerate(names):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (number, 9, 9)).save(name, "PNG")


def test_a_run_on_own_images_prints_the_classes_and_lists_unreadable_files(there, capsys, monkeypatch):
    monkeypatch.setattr("vqvae.decoding.optional_formats", list)  # no package is installed
    write_images(*(f"my images/{name}/{i}.png" for name in ("10", "9") for i in range(30)))
    Path("my images/9/bad\nname.png").write_bytes(b"x")
    Path("my images/9/phone.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(12))
    words = ["--dataset", "folder", "--data-dir", "my images", "--epochs", "1", "--name", "own"]
    with pytest.warns(
        UserWarning, match="unreadable files left out of the data: 2; logs.own.unreadable.txt names them"
    ):
        assert run_train(*words) == 0
    out = capsys.readouterr().out
    assert "(unreadable files left out: 2)" in out
    assert "       2 classes: 9, 10\n" in out
    assert Path("logs/own/unreadable.txt").read_text().splitlines() == [
        "9/bad\\nname.png: no image in PNG, JPEG, WEBP, BMP, GIF, TIFF",
        "9/phone.heic: HEIC, which needs a package: pip install pillow-heif",
    ]
    for bad in Path("my images/9").glob("[bp]*"):
        bad.unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert resume("logs/own --epochs 2") == 0
    assert not Path("logs/own/unreadable.txt").exists()


def test_a_conditional_prior_refuses_classes_in_another_order(there, capsys):
    write_images(*(f"images/{name}/{i}.png" for name in ("cats", "dogs") for i in range(30)))
    assert run_train(*"--dataset folder --data-dir images --epochs 1 --name one".split()) == 0
    prior = "--checkpoint logs/one --prior unigram --conditional --epochs 1 --name two --batch-size 20 --device cpu"
    assert run_train(*prior.split(), small=False) == 0
    Path("images/cats").rename("images/zebras")
    capsys.readouterr()
    for words in ("--resume logs/two --epochs 2", "--evaluate --checkpoint logs/two"):
        assert run_train(*words.split(), small=False) == 2
        expected = "error: --data-dir images: the classes are dogs, zebras, and those of this run were cats, dogs; "
        assert capsys.readouterr().err.startswith(expected)


def test_a_run_whose_folder_has_any_name_is_resumed_and_drawn_from_within(there, monkeypatch):
    assert run_train("--epochs", "1", "--name", "run") == 0
    odd = os.path.join(b"logs", b"a \xff\n'$x$")
    try:
        os.rename("logs/run", odd)
    except OSError:
        pytest.skip("this file system allows UTF-8 names only")
    monkeypatch.chdir(os.fsdecode(odd))
    assert resume(". --epochs 2") == 0
    assert cli.run(visualize.main, ["--checkpoint", ".", "--only", "usage.png"]) == 0
    assert [path.name for path in Path("plots").iterdir()] == [r"a \udcff\n'$x$"]
