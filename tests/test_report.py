"""The command `visualize`: a checkpoint becomes plots, and bad input becomes one line."""

import argparse
import json
import re
import shutil
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


def test_plots_go_into_plots_or_into_the_folder_chosen(there, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert visualize(f"--checkpoint {there}/logs/vqvae --device cpu --only usage.png") == 0
    assert files_in("plots/vqvae") == {"usage.png"}
    chosen = "--only original.png training_animation.gif --plot-dir mine"
    assert visualize(f"--checkpoint {there}/logs/vqvae --device cpu {chosen}") == 0
    assert files_in("mine/vqvae") == {"original.png", "training_animation.gif"}


def test_a_run_that_was_moved_is_drawn_under_the_name_of_its_folder(there, folder, capsys):
    shutil.copytree(there / "logs/vqvae", "moved")
    line = "--checkpoint moved --device cpu --only original.png curves.png usage.png"
    assert visualize(line) == 0
    assert files_in("plots/moved") == {"original.png", "curves.png", "usage.png"}
    assert "3 plots of moved" in capsys.readouterr().out


def test_what_a_checkpoint_says_of_places_chooses_none(there, folder):
    content = checkpoint.read(there / "logs/vqvae")
    del content["format"]
    Path("victim/original").mkdir(parents=True)
    stranger = content | {"plots": str(folder / "victim"), "run": "../victim"}
    Path("run").mkdir()
    checkpoint.write(Path("run/checkpoint.pt"), stranger)
    for line in ("", "--plot-dir mine"):
        assert visualize(f"--checkpoint run --device cpu --only original.png {line}") == 0
    assert files_in("plots/run") == files_in("mine/run") == {"original.png"}
    assert files_in("victim") == set()


def test_a_plot_that_was_asked_for_and_does_not_apply_says_why(there, capsys):
    assert visualize("--checkpoint logs/vqvae --device cpu --only interpolations.png usage.png") == 0
    out, err = capsys.readouterr()
    assert err == "interpolations.png: not drawn: the latent consists of codes, and is not continuous\n"
    assert "1 plot of vqvae" in out


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_few_held_out_images_suffice_for_every_plot_that_shows_them(folder, recwarn, count):
    line = f"--dataset photos crops=20 test_crops={count} --image-size 8 --batch-size 10 --hidden 4 --epochs 2"
    vae = "--nets conv-vae --bottleneck gaussian latents=2 --prior normal"
    for name, bottleneck in (("vqvae", "--bottleneck vq num_codes=4"), ("vae", vae)):
        words = f"{line} {bottleneck} --name {name} --device cpu"
        assert run_train(*words.split(), small=False) == 0
    assert drawn_for("vqvae") == OF_IMAGES | {"code_visualization.png", "codebook.png", "usage.png"}
    of_latents = {"posterior_map.png"} | ({"interpolations.png", "traversals.png"} if count > 1 else set())
    assert drawn_for("vae") == OF_IMAGES | of_latents
    logged = "".join(Path(f"logs/{name}/metrics.jsonl").read_text() for name in ("vqvae", "vae"))
    assert "NaN" not in logged
    assert not [w for w in recwarn if "vqvae" not in w.filename]


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
    report.interpolations(report.Report(model, content, tmp_path, argparse.Namespace(), print), tmp_path / "x.png")
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


def test_samples_at_temperature_0_can_be_drawn(there):
    assert drawn_for("prior", "--temperature 0 --class 3 --samples 4 --only samples.png") >= {"samples.png"}
