"""Both scripts, end to end, as a person runs them."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train
import visualize_codes
from vqvae import load

ROOT = Path(__file__).parent.parent
SMALL = [
    "--limit",
    "60",
    "--batch-size",
    "20",
    "--hidden",
    "8",
    "--codes",
    "16",
    "--code-dim",
    "4",
    "--image-size",
    "16",
    "--device",
    "cpu",
]


@pytest.fixture
def there(tmp_path, monkeypatch):
    """An empty folder to run in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_train(*line: str) -> int:
    return train.main([*SMALL, *line])


def weights(path: str) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)["model"]


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_a_run_stores_and_prints_the_precision_chosen_and_keeps_it(there, capsys, monkeypatch):
    monkeypatch.setattr("vqvae.devices.choose_precision", lambda name, device: "bf16" if name == "auto" else name)
    assert run_train("--epochs", "1", "--name", "run") == 0
    assert "on     cpu, bf16, batch 20" in capsys.readouterr().out
    monkeypatch.undo()
    os.chdir(there)
    assert json.loads(Path("logs/run/config.json").read_text())["precision"] == "bf16"
    assert train.main(["--resume", "logs/run", "--epochs", "2"]) == 0
    assert "on     cpu, bf16, batch 20" in capsys.readouterr().out
    assert run_train("--epochs", "1", "--name", "other") == 0
    assert "on     cpu, fp32, batch 20" in capsys.readouterr().out


def test_train_then_visualise(there, capsys):
    assert run_train("--epochs", "2", "--name", "run", "--log-every", "2") == 0
    out = capsys.readouterr().out
    assert "visualize_codes.py --checkpoint logs/run/checkpoint.pt" in out
    logs, plots = there / "logs" / "run", there / "plots" / "run"
    assert {"config.json", "metrics.jsonl", "checkpoint.pt", "best.pt"} <= {p.name for p in logs.iterdir()}
    assert [p.name for p in sorted((plots / "generated_samples").iterdir())] == [
        "epoch_001.png",
        "epoch_002.png",
        "original.png",
    ]
    config = json.loads((logs / "config.json").read_text())
    assert config["bottleneck"]["options"]["num_codes"] == 16
    assert config["bottleneck"]["options"]["decay"] == 0.99  # defaults are spelt out
    last = json.loads((logs / "metrics.jsonl").read_text().splitlines()[-1])
    for name in ("mse", "nmse", "psnr", "commitment", "perplexity", "active_codes", "neg_elbo", "neg_elbo_se"):
        assert f"held_out_{name}" in last
    for name in ("mse", "nmse", "commitment", "perplexity", "active_codes"):
        assert f"train_{name}" in last
    assert last["images_per_s"] > 0

    for _ in range(2):  # twice in a row
        assert visualize_codes.main(["--checkpoint", "logs/run/checkpoint.pt"]) == 0
    drawn = {p.name for p in plots.iterdir() if p.is_file()}
    assert drawn == {
        "original.png",
        "reconstructions.png",
        "code_visualization.png",
        "codebook.png",
        "usage.png",
        "curves.png",
        "training_animation.gif",
        "samples.png",
    }


def test_tensorboards_own_reader_finds_the_tags(there):
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


def test_two_epochs_and_a_resume_to_four_are_bitwise_four(there):
    assert run_train("--epochs", "4", "--name", "straight") == 0
    assert run_train("--epochs", "2", "--name", "run") == 0
    assert train.main(["--resume", "logs/run", "--epochs", "4"]) == 0
    assert same(weights("logs/straight/checkpoint.pt"), weights("logs/run/checkpoint.pt"))


def test_augmentation_goes_on_bitwise_and_leaves_evaluation_alone(there):
    line = ["--augment", "crop-flip", "--bottleneck", "gumbel", "--epochs"]  # noise of both kinds in every step
    assert run_train(*line, "2", "--name", "straight") == 0
    assert run_train(*line, "1", "--name", "run") == 0
    assert train.main(["--resume", "logs/run", "--epochs", "2"]) == 0
    assert same(weights("logs/straight/checkpoint.pt"), weights("logs/run/checkpoint.pt"))
    held = [json.loads(row) for row in Path("logs/run/metrics.jsonl").read_text().splitlines()][-1]
    assert train.main(["--evaluate", "--checkpoint", "logs/run", "--iw-samples", "1"]) == 0
    assert json.loads(Path("logs/run/evaluation.json").read_text())["mse"] == pytest.approx(held["held_out_mse"])


@pytest.mark.parametrize("preset", ["dvq-vqvae", "dvq-gumbel", "dvq-dalle"])
def test_presets_of_deep_vector_quantization_train(there, preset):
    line = f"--preset {preset} --dataset digits --image-size 32 --limit 48 --batch-size 16 --max-steps 3 --hidden 16"
    assert train.main([*line.split(), "--codes", "32", "--name", "run", "--device", "cpu"]) == 0
    config = json.loads(Path("logs/run/config.json").read_text())
    assert (config["augment"], config["weight_decay"]) == ("crop-flip", 1e-4)
    last = json.loads(Path("logs/run/metrics.jsonl").read_text().splitlines()[-1])
    assert last["step"] == 3
    assert 0 < last["held_out_mse"] < 1


def spawn(*line: str) -> subprocess.Popen:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "train.py"), *SMALL, *line]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def wait_for(path: Path, process: subprocess.Popen) -> None:
    for _ in range(600):
        if path.exists():
            return
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    process.kill()
    pytest.fail(f"{path} never appeared")


def test_a_run_killed_in_mid_epoch_and_one_terminated_go_on_bitwise(there):
    torch.set_num_threads(1)  # as in the processes below: sums in another order differ in the last bit
    long = ["--epochs", "40", "--checkpoint-every", "1"]
    processes = {name: spawn(*long, "--name", name) for name in ("killed", "stopped")}
    for name, number in (("killed", signal.SIGKILL), ("stopped", signal.SIGTERM)):
        wait_for(there / "logs" / name / "checkpoint.pt", processes[name])
        processes[name].send_signal(number)
    out, _ = processes["stopped"].communicate(timeout=60)
    processes["killed"].communicate(timeout=60)
    assert processes["stopped"].returncode == 0
    assert "python train.py --resume logs/stopped" in out
    reached = max(torch.load(f"logs/{name}/checkpoint.pt", weights_only=True)["step"] for name in processes)
    assert reached < 120
    epochs = str(reached // 3 + 2)
    assert run_train("--epochs", epochs, "--name", "straight", "--checkpoint-every", "1") == 0
    for name in processes:
        assert train.main(["--resume", f"logs/{name}", "--epochs", epochs]) == 0
        assert same(weights("logs/straight/checkpoint.pt"), weights(f"logs/{name}/checkpoint.pt")), name


def test_figures_from_another_folder_and_only_some(there, tmp_path_factory, monkeypatch, capsys):
    assert run_train("--epochs", "1", "--name", "run") == 0
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    assert visualize_codes.main(["--checkpoint", str(there / "logs" / "run"), "--only", "usage.png"]) == 0
    assert (there / "plots" / "run" / "usage.png").exists()  # where the run drew
    line = ["--checkpoint", str(there / "logs" / "run"), "--only", "codebook.png", "--plot-dir", "mine"]
    assert visualize_codes.main(line) == 0
    assert Path("mine/run/codebook.png").exists()


def test_the_python_interface(there):
    assert run_train("--epochs", "1", "--name", "run") == 0
    model = load("logs/run/checkpoint.pt")
    images = torch.randint(256, (3, 1, 16, 16), dtype=torch.uint8)
    codes = model.encode(images)
    assert codes.shape == (3, 4, 4)
    pictures = model.decode(codes)
    assert pictures.shape == (3, 1, 16, 16)


def test_evaluate_prints_and_stores(there, capsys):
    assert run_train("--epochs", "1", "--name", "run") == 0
    assert train.main(["--evaluate", "--checkpoint", "logs/run/checkpoint.pt", "--iw-samples", "2"]) == 0
    held = json.loads(Path("logs/run/evaluation.json").read_text())
    last = json.loads(Path("logs/run/metrics.jsonl").read_text().splitlines()[-1])
    assert held["neg_elbo"] == pytest.approx(last["held_out_neg_elbo"], rel=1e-6)
    assert held["images"] == 60
    assert "neg_elbo_se" in capsys.readouterr().out


def test_a_default_name_is_numbered_and_a_given_one_protected(there, capsys):
    assert run_train("--epochs", "1") == 0
    assert run_train("--epochs", "1") == 0
    assert sorted(p.name for p in Path("logs").iterdir()) == ["vqvae-digits", "vqvae-digits-2"]
    before = Path("logs/vqvae-digits/checkpoint.pt").read_bytes()
    assert run_train("--name", "vqvae-digits") == 2
    assert "already holds a run" in capsys.readouterr().err
    assert Path("logs/vqvae-digits/checkpoint.pt").read_bytes() == before


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--dataset mnits", "--dataset mnits: no such name (did you mean 'mnist'"),
        ("--bottleneck qv", "--bottleneck qv"),
        ("--bottleneck vq decai=0.9", "unknown option 'decai' (did you mean 'decay'?)"),
        ("--nets sonet", "did you mean 'sonnet'"),
        ("--image-size 30", "do not divide by its stride 4; try --image-size 28 or 32"),
        ("--codes 0", "--codes 0"),
        ("--batch-size 100", "--batch-size 100: larger than the 60"),
        ("--lr fast", "--lr fast"),
        ("--resume logs/none", "logs/none/checkpoint.pt: no such file"),
        ("--log-dir train.log", "--log-dir train.log: cannot write"),
        ("--list bottleneks", "did you mean 'bottlenecks'"),
        ("--evaluate", "--checkpoint"),
        ("--conditional --dataset photos crops=60 test_crops=60", "--dataset photos has no labels"),
        ("--conditional --prior uniform", "--prior uniform cannot use labels"),
        ("--augment crop", "--augment"),
        ("--bottleneck gaussian", "unknown option 'num_codes'"),
        ("--likelihood bernoulli", "pixels must be black or white"),
        ("--prior uniform --checkpoint none.pt", "none.pt: no such file"),
        ("--dataset folder --data-dir nowhere", "--data-dir nowhere: no such folder"),
        ("--epochs", "--epochs: expected one argument"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(there, capsys, line, message):
    Path("train.log").write_text("a file, not a folder")
    before = sorted(p.name for p in there.rglob("*"))
    assert run_train(*line.split()) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1
    assert sorted(p.name for p in there.rglob("*") if p.is_file()) == [n for n in before if "." in n]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--checkpoint none.pt", "none.pt: no such file"),
        ("--checkpoint broken.pt", "broken.pt: truncated"),
        ("--checkpoint broken.pt --only codebok.png", "did you mean 'codebook.png'"),
        ("--checkpoint broken.pt --samples 0", "--samples 0"),
        ("--checkpoint broken.pt --temperature 0", "--temperature 0"),
        ("--checkpoint broken.pt --device tpu", "--device"),
        ("", "--checkpoint"),
    ],
)
def test_bad_input_to_the_figures_is_one_line_too(there, capsys, line, message):
    Path("broken.pt").write_bytes(b"PK\x03\x04 and no more")
    assert visualize_codes.main(line.split()) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
    assert [p.name for p in there.iterdir()] == ["broken.pt"]


@pytest.mark.parametrize("what", ["data", "nets", "bottlenecks", "priors", "likelihoods", "presets"])
def test_lists_show_members_options_and_sources(what, capsys):
    assert train.main(["--list", what]) == 0
    out = capsys.readouterr().out
    assert {"bottlenecks": "--bottleneck vq num_codes=512", "presets": "--preset sonnet-cifar10"}.get(what, "--") in out


def test_help_teaches_and_imports_no_heavy_library():
    for script in ("train.py", "visualize_codes.py"):
        code = (
            f"import sys, runpy; sys.argv = ['{script}', '--help']\n"
            f"try: runpy.run_path('{script}', run_name='__main__')\n"
            "except SystemExit: pass\n"
            "print(sorted({'torch', 'matplotlib', 'sklearn', 'tensorboard', 'scipy', 'numpy'} & set(sys.modules)))"
        )
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
        assert re.search(r"^examples$", done.stdout, re.M)
        assert done.stdout.strip().endswith("[]")


def drawn_for(name: str) -> set[str]:
    assert visualize_codes.main(["--checkpoint", f"logs/{name}"]) == 0
    return {p.name for p in Path(f"plots/{name}").iterdir() if p.is_file()}


def test_points_of_the_plane_train_evaluate_and_draw(there):
    line = "--preset vae-2d-2 --epochs 2 --limit 640 --name points"
    assert train.main(line.split()) == 0
    assert train.main(["--evaluate", "--checkpoint", "logs/points", "--iw-samples", "2"]) == 0
    held = json.loads(Path("logs/points/evaluation.json").read_text())
    assert held["gap"] == pytest.approx(held["neg_elbo"] - held["data_entropy"])
    assert held["data_entropy"] == pytest.approx(4.4473, abs=1e-4)
    assert drawn_for("points") == {"curves.png", "scatter_2d.png", "posterior_map.png"}


@pytest.mark.parametrize("prior", ["normal", "made-flow"])
def test_a_vae_trains_and_draws(there, prior):
    line = f"--preset vae-cifar10 --dataset digits --prior {prior} --limit 60 --batch-size 20 --hidden 4"
    line += " --bottleneck gaussian latents=2 --image-size 16 --epochs 2 --kl-weight linear:0:1:3 --name vae"
    assert train.main(line.split()) == 0
    last = json.loads(Path("logs/vae/metrics.jsonl").read_text().splitlines()[-1])
    for name in ("neg_elbo", "reconstruction_nats", "rate"):
        assert {f"train_{name}", f"held_out_{name}"} <= set(last)
    assert last["held_out_bits_per_dim"] > 0
    assert 0 <= last["held_out_active_units"] <= 2
    expected = {"samples.png", "interpolations.png", "traversals.png", "reconstructions.png", "posterior_map.png"}
    assert expected <= drawn_for("vae")
    assert "codebook.png" not in drawn_for("vae")
