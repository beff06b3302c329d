"""`train.py` end to end: runs, resumed runs, evaluation, and errors of one line."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from tests.helpers import ROOT, SMALL, images, run_train
from vqvae import cli, experiment, load
from vqvae.commands import train


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
    return json.loads(Path(f"logs/{run}/metrics.jsonl").read_text().splitlines()[-1])


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
    assert "on     cpu, bf16, batch 20" in capsys.readouterr().out
    monkeypatch.undo()
    os.chdir(there)
    assert json.loads(Path("logs/run/config.json").read_text())["precision"] == "bf16"
    assert resume("logs/run --epochs 2") == 0
    assert "on     cpu, bf16, batch 20" in capsys.readouterr().out
    assert run_train("--epochs", "1", "--name", "other") == 0
    assert "on     cpu, fp32, batch 20" in capsys.readouterr().out


def test_tensorboards_own_reader_finds_the_tags():
    assert run_train("--epochs", "1", "--name", "run", "--log-every", "1") == 0
    events = EventAccumulator("logs/run", size_guidance={"scalars": 0, "images": 0, "histograms": 0})
    events.Reload()
    tags = events.Tags()
    assert {"train/loss", "train/mse", "epoch/held_out_nmse", "epoch/held_out_perplexity"} <= set(tags["scalars"])
    assert {"originals", "reconstructions"} <= set(tags["images"])
    assert tags["histograms"] == ["held_out_usage"]
    assert "config/text_summary" in tags["tensors"]
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3]
    assert any("hparams" in tag for tag in events.summary_metadata)


def test_two_epochs_and_a_resume_to_four_are_bitwise_four(there, tmp_path_factory, monkeypatch):
    assert run_train("--epochs", "4", "--name", "straight") == 0
    assert run_train("--epochs", "2", "--name", "run") == 0
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    assert resume(f"{there}/logs/run --epochs 4") == 0
    assert not list(Path.cwd().iterdir())  # it logs and draws where it did before
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
    command = [sys.executable, str(ROOT / "train.py"), *SMALL, *words]
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
    assert processes["stopped"].returncode == 130
    assert "Resume with: python train.py --resume logs/stopped" in out
    reached = max(torch.load(f"logs/{name}/checkpoint.pt", weights_only=True)["step"] for name in processes)
    assert reached < 300
    epochs = reached // 3 + 2
    assert run_train("--epochs", str(epochs), "--name", "straight", "--checkpoint-every", "1") == 0
    for name in processes:
        assert resume(f"logs/{name} --epochs {epochs}") == 0
        assert_same_weights("straight", name)


def test_an_interrupted_run_ends_with_exit_code_130(capsys, monkeypatch):
    monkeypatch.setattr(experiment, "fit", lambda *args, **keywords: None)
    assert run_train("--name", "run") == 130
    assert "interrupted; saved logs/run/checkpoint.pt. Resume with: python train.py --resume logs/run" in (
        capsys.readouterr().out
    )


def test_an_interrupted_first_stage_starts_no_second(monkeypatch):
    monkeypatch.setattr(experiment, "fit", lambda *args, **keywords: None)
    line = "--preset vqvae-pixelcnn --dataset digits --limit 40 --batch-size 20 --image-size 8 --hidden 256 --name two"
    assert run_train(*line.split(), small=False) == 130
    assert [path.name for path in Path("logs").iterdir()] == ["two"]


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


def test_a_default_name_is_numbered_and_a_given_one_protected(capsys):
    assert run_train("--epochs", "1") == 0
    assert run_train("--epochs", "1") == 0
    assert sorted(path.name for path in Path("logs").iterdir()) == ["vqvae-digits", "vqvae-digits-2"]
    before = Path("logs/vqvae-digits/checkpoint.pt").read_bytes()
    assert run_train("--name", "vqvae-digits") == 2
    assert "--name vqvae-digits: logs/vqvae-digits already contains a run" in capsys.readouterr().err
    assert Path("logs/vqvae-digits/checkpoint.pt").read_bytes() == before


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--dataset mnits", "--dataset mnits: no such name (did you mean 'mnist'"),
        ("--bottleneck qv", "--bottleneck qv: no such name"),
        ("--bottleneck vq decai=0.9", "--bottleneck vq decai=0.9: unknown option (did you mean 'decay'?)"),
        ("--bottleneck vq decay=2", "--bottleneck vq decay=2: must be from 0 to below 1"),
        ("--objective elbo free_bits=-1", "--objective elbo free_bits=-1: must be at least 0"),
        ("--objective probabilistic iaf_startup_steps=3", "--objective probabilistic iaf_startup_steps=3: "),
        ("--nets sonet", "--nets sonet: no such name (did you mean 'sonnet'"),
        ("--image-size 30", "--image-size 30: does not divide by 4; try 28 or 32"),
        ("--codes 0", "--codes 0: must be from 1"),
        ("--batch-size 100", "--batch-size 100: larger than the 60 training examples"),
        ("--lr fast", "--lr fast: "),
        ("--resume logs/none", "logs/none: no such file"),
        ("--log-dir train.log", "--log-dir train.log: cannot write there"),
        ("--plot-dir train.log", "train.log/vqvae-digits: cannot write there"),
        ("--list bottleneks", "--list bottleneks: no such list (did you mean 'bottlenecks'"),
        ("--evaluate", "--evaluate: name the model with --checkpoint"),
        ("--iw-samples 3", "--iw-samples 3: goes with --evaluate"),
        ("--evaluate --checkpoint none.pt --iw-samples 0", "--iw-samples 0: must be at least 1"),
        ("--conditional --dataset photos crops=60 test_crops=60", "--conditional: the data set photos has no labels"),
        ("--conditional --prior uniform", "--conditional: the prior uniform cannot use labels"),
        ("--augment crop", "--augment: invalid choice: 'crop'"),
        ("--bottleneck gaussian", "--codes 16: --bottleneck gaussian has no num_codes"),
        ("--likelihood bernoulli", "--likelihood bernoulli"),
        ("--prior uniform --checkpoint none.pt", "none.pt: no such file"),
        ("--dataset folder --data-dir nowhere", "--data-dir nowhere: "),
        ("--epochs", "--epochs: expected one argument"),
        ("--epoch 3", "unrecognized arguments: --epoch 3"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(there, capsys, line, message):
    Path("train.log").write_text("a file, not a folder")
    assert run_train(*line.split()) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1
    assert [path.name for path in there.rglob("*") if path.is_file()] == ["train.log"]


@pytest.mark.parametrize("what", [*experiment.LISTINGS, "presets"])
def test_lists_show_members_options_and_sources(what, capsys):
    assert run_train("--list", what, small=False) == 0
    shown = {
        "bottlenecks": "--bottleneck vq\n",
        "objectives": "--objective probabilistic\n",
        "presets": "--preset sonnet-cifar10",
    }
    assert shown.get(what, f"--{experiment.LISTINGS.get(what)} ") in capsys.readouterr().out


def test_help_teaches_and_imports_no_heavy_library():
    heavy = {"torch", "matplotlib", "sklearn", "tensorboard", "scipy", "numpy"}
    code = (
        "import sys, runpy; sys.argv = ['train.py', '--help']\n"
        "try: runpy.run_path('train.py', run_name='__main__')\n"
        "except SystemExit: pass\n"
        f"print(sorted({heavy} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert re.search(r"^examples$", done.stdout, re.MULTILINE)
    assert train.__doc__ in done.stdout
    assert done.stdout.strip().endswith("[]")


def test_points_of_the_plane_train_and_are_evaluated():
    assert run_train("--preset", "vae-2d-2", "--epochs", "2", "--limit", "640", "--name", "points", small=False) == 0
    found = evaluate("logs/points --iw-samples 2")
    assert found["gap"] == pytest.approx(found["neg_elbo"] - found["data_entropy"])
    assert found["data_entropy"] == pytest.approx(4.4473, abs=1e-4)
    assert not Path("plots/points/generated_samples").exists()  # points are no images


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
    assert "60 train, 60 held out, 1x16x16" in capsys.readouterr().out
