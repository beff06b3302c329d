"""The command `visualize`: a checkpoint becomes plots, and bad input becomes one line."""

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.helpers import ROOT, images, make, run_train
from vqvae import checkpoint, cli, plots, report
from vqvae.autoencoder import Autoencoder
from vqvae.commands import visualize as command


def visualize(line: str) -> int:
    """Call the command as a person would; returns its exit code."""
    return cli.run(command.main, line.split())


def drawn_for(run: str, line: str = "") -> set[str]:
    assert visualize(f"--checkpoint logs/{run} --device cpu {line}") == 0
    return files_in(f"plots/{run}")


def files_in(folder: str | Path) -> set[str]:
    return {path.name for path in Path(folder).iterdir() if path.is_file()}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder to work in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with two runs: a VQ-VAE, and a conditional prior on its codes."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert run_train("--epochs", "2", "--name", "vqvae", "--log-every", "2") == 0
        line = "--prior pixelcnn channels=8 blocks=1 head=8 --checkpoint logs/vqvae --conditional --name prior"
        line += " --epochs 2 --batch-size 20 --device cpu"
        assert run_train(*line.split(), small=False) == 0
    return folder


@pytest.fixture
def there(runs, monkeypatch):
    """That folder, to work in."""
    monkeypatch.chdir(runs)
    return runs


OF_IMAGES = {"original.png", "reconstructions.png", "samples.png", "curves.png", "training_animation.gif"}


def test_a_vqvae_is_drawn_with_its_codes_as_often_as_asked(there, capsys):
    for _ in range(2):
        assert drawn_for("vqvae") == OF_IMAGES | {"code_visualization.png", "codebook.png", "usage.png"}
        out = capsys.readouterr().out
        assert "plots/vqvae/codebook.png\n" in out
        assert "8 plots of vqvae (step 6)" in out


def test_a_prior_on_codes_is_drawn_with_samples_of_each_class_and_completions(there):
    of_codes = {"code_visualization.png", "codebook.png", "class_rows.png", "completions.png"}
    assert drawn_for("prior", "--samples 9 --temperature 0.8 --top-k 3 --class 3") == OF_IMAGES | of_codes


@pytest.mark.parametrize(
    ("line", "message"),
    [("logs/prior --class 10", "must be from 0 to 9"), ("logs/vqvae --class 0", "is not conditioned on classes")],
)
def test_a_class_that_the_prior_does_not_know_is_refused(there, capsys, line, message):
    assert visualize(f"--checkpoint {line} --plot-dir elsewhere --device cpu") == 2
    err = capsys.readouterr().err
    assert err.startswith("error: --class ")
    assert message in err
    assert not Path("elsewhere").exists()


@pytest.fixture
def drawn(there, monkeypatch):
    """A function that draws one plot of the prior and returns the images on it, `[rows, N, 1, H, W]`."""

    def draw(line: str) -> torch.Tensor:
        seen: list[torch.Tensor] = []
        monkeypatch.setattr(plots, "image_rows", lambda rows, *args, **options: seen.extend(x for _, x in rows))
        assert visualize(f"--checkpoint logs/prior --device cpu --only {line}") == 0
        return torch.stack([x.float() for x in seen])

    return draw


def test_samples_depend_on_the_seed_only(drawn):
    first, again, other = (drawn(f"samples.png --samples 9 --seed {seed}") for seed in (3, 3, 4))
    assert first.shape == (1, 9, 1, 16, 16)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_completions_show_what_is_given_and_differ_from_each_other(drawn):
    originals, _, given, *completions = drawn("completions.png")
    assert torch.equal(given[:, :, :8], originals[:, :, :8])
    assert given[:, :, 8:].unique().tolist() == [127]  # gray, where codes are sampled
    assert len(completions) == 4
    assert not torch.equal(completions[0], completions[1])


def test_samples_are_of_the_class_chosen_or_of_all_classes_in_turn(drawn, monkeypatch):
    seen, sample = [], Autoencoder.sample

    def spy(model, n, **options):
        seen.append(options["labels"].tolist())
        return sample(model, n, **options)

    monkeypatch.setattr(Autoencoder, "sample", spy)
    drawn("samples.png --samples 12")
    drawn("samples.png --samples 3 --class 4")
    assert seen == [[*range(10), 0, 1], [4, 4, 4]]


def test_plots_go_where_training_drew_or_into_the_folder_chosen(there, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (there / "plots/vqvae/usage.png").unlink(missing_ok=True)
    assert visualize(f"--checkpoint {there}/logs/vqvae --device cpu --only usage.png") == 0
    assert (there / "plots/vqvae/usage.png").exists()
    chosen = "--only original.png training_animation.gif --plot-dir mine"
    assert visualize(f"--checkpoint {there}/logs/vqvae --device cpu {chosen}") == 0
    assert files_in("mine/vqvae") == {"original.png", "training_animation.gif"}


def test_a_run_whose_plots_are_gone_is_drawn_into_plots(there, folder):
    content = checkpoint.read(there / "logs/vqvae")
    del content["format"]
    checkpoint.write(Path("moved.pt"), content | {"plots": str(folder / "gone")})
    assert visualize("--checkpoint moved.pt --device cpu --only original.png") == 0
    assert files_in("plots/vqvae") == {"original.png"}


def test_a_plot_that_was_asked_for_and_does_not_apply_says_why(there, capsys):
    assert visualize("--checkpoint logs/vqvae --device cpu --only interpolations.png usage.png") == 0
    out, err = capsys.readouterr()
    assert err == "interpolations.png: not drawn: the latent consists of codes, and is not continuous\n"
    assert "1 plot of vqvae" in out


def test_curves_skip_a_line_that_a_killed_run_left_incomplete(there, folder):
    for name in ("checkpoint.pt", "metrics.jsonl"):
        (folder / name).write_bytes((there / "logs/vqvae" / name).read_bytes())
    with open("metrics.jsonl", "a", encoding="utf-8") as log:
        log.write('{"kind": "train", "step": 7, "los')
    assert visualize("--checkpoint checkpoint.pt --device cpu --only curves.png --plot-dir .") == 0
    assert files_in("vqvae") == {"curves.png"}


def test_bottlenecks_with_levels_are_drawn_level_by_level(folder):
    assert run_train("--epochs", "1", "--name", "levels", "--bottleneck", "hierarchy") == 0
    assert drawn_for("levels") == OF_IMAGES | {"levels.png", "code_visualization.png", "usage.png"}


@pytest.mark.parametrize("prior", ["normal", "made-flow"])
def test_a_vae_is_drawn_with_its_latent(folder, prior):
    line = f"--preset vae-cifar10 --dataset digits --prior {prior} --limit 60 --batch-size 20 --hidden 4"
    line += " --bottleneck gaussian latents=2 --image-size 16 --epochs 2 --name vae --device cpu"
    assert run_train(*line.split(), small=False) == 0
    assert drawn_for("vae") == OF_IMAGES | {"interpolations.png", "traversals.png", "posterior_map.png"}


def test_interpolations_start_and_end_at_held_out_images(tmp_path, monkeypatch):
    held_out, seen = images(20), list[torch.Tensor]()
    monkeypatch.setattr(plots, "image_rows", lambda rows, *args, **options: seen.extend(x for _, x in rows))
    model = make(bottleneck="gaussian", prior="normal", nets="conv-vae").eval()
    content = {"run": "vae", "examples": {"images": held_out}}
    options = argparse.Namespace()
    report.interpolations(report.Report(model, content, tmp_path, tmp_path, options, print), tmp_path / "x.png")
    assert len(seen) == 10
    for i, row in enumerate(seen):
        assert len(row) == 10
        assert torch.equal(row[[0, -1]], held_out[[i, i + 10]].float() / 255)


def test_points_are_drawn_as_scatter_plots(folder):
    line = "--preset vae-2d-2 --epochs 2 --limit 640 --name points --device cpu"
    assert run_train(*line.split(), small=False) == 0
    assert drawn_for("points") == {"curves.png", "scatter_2d.png", "posterior_map.png"}


def test_points_with_codes_are_drawn_too(folder):
    line = "--dataset gauss2d --nets mlp --bottleneck vq num_codes=8 --likelihood gaussian --limit 100"
    line += " --batch-size 20 --epochs 2 --name points --device cpu"
    assert run_train(*line.split(), small=False) == 0
    assert drawn_for("points") == {"curves.png", "scatter_2d.png", "usage.png"}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--checkpoint none.pt", "none.pt: no such file"),
        ("--checkpoint broken.pt", "broken.pt: truncated"),
        ("--checkpoint broken.pt --only codebok.png", "--only codebok.png: no such plot (did you mean 'codebook.png'"),
        ("--checkpoint broken.pt --samples 0", "--samples 0: must be at least 1"),
        ("--checkpoint broken.pt --samples many", "--samples many: must be a whole number"),
        ("--checkpoint broken.pt --temperature 0", "--temperature 0"),
        ("--checkpoint broken.pt --top-k -1", "--top-k -1: must be at least 0"),
        ("--checkpoint broken.pt --seed -1", "--seed -1"),
        ("--checkpoint broken.pt --device tpu", "--device"),
        ("--checkpoint", "--checkpoint: expected one argument"),
        ("", "--checkpoint"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(folder, capsys, line, message):
    Path("broken.pt").write_bytes(b"PK\x03\x04 and no more")
    assert visualize(line) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1
    assert [path.name for path in folder.iterdir()] == ["broken.pt"]


def test_a_plot_folder_that_cannot_be_written_is_named(there, capsys):
    Path("file").write_text("not a folder")
    assert visualize("--checkpoint logs/vqvae --device cpu --plot-dir file") == 2
    assert capsys.readouterr().err.startswith("error: --plot-dir file/vqvae: cannot write there")


def test_help_lists_every_plot():
    listed = re.findall(r"^    (\w+\.(?:png|gif)) ", command.EXAMPLES, re.M)
    assert sorted(listed) == sorted(report.PLOTS)


def test_help_shows_examples_and_imports_no_heavy_library():
    code = (
        "import sys, runpy\n"
        "sys.argv = ['visualize_codes.py', '--help']\n"
        "try: runpy.run_path('visualize_codes.py', run_name='__main__')\n"
        "except SystemExit: pass\n"
        "import json; print(json.dumps(sorted(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    *text, modules = done.stdout.splitlines()
    assert "examples" in text
    heavy = {"torch", "numpy", "scipy", "sklearn", "matplotlib", "PIL", "imageio", "tensorboard", "tqdm"}
    assert not heavy & set(json.loads(modules))
