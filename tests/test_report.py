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

from tests.checkpoints import content
from tests.helpers import ROOT, choose, fitting, images, make, run_train
from vqvae import checkpoint, cli, plots, report
from vqvae.autoencoder import Autoencoder
from vqvae.commands import visualize as command
from vqvae.errors import OptionError
from vqvae.sampling import OPTIONS

NEUTRAL = {name: option.default for name, option in OPTIONS.items()}


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
    """The folder `runs`, to work in."""
    monkeypatch.chdir(runs)
    return runs


OF_IMAGES = {"index.html", "original.png", "reconstructions.png", "curves.png", "training_animation.gif"}


def test_a_vqvae_is_drawn_with_its_codes_as_often_as_asked(there, capsys):
    for _ in range(2):
        assert drawn_for("vqvae") == OF_IMAGES | {"code_visualization.png", "codebook.png", "usage.png"}
        out = capsys.readouterr().out
        assert "plots/vqvae/codebook.png\n" in out
        assert "7 plots of vqvae (step 6)" in out


def test_a_prior_on_codes_is_drawn_with_samples_of_each_class_and_completions(there):
    of_codes = {"code_visualization.png", "codebook.png", "samples.png", "class_rows.png", "completions.png"}
    assert drawn_for("prior", "--samples 9 --temperature 0.8 --top-k 3 --class 3") == OF_IMAGES | of_codes


def test_samples_of_the_uniform_prior_are_drawn_when_asked_for(there):
    drawn_for("vqvae", "--plot-dir asked --only samples.png")
    assert files_in("asked/vqvae") == {"samples.png"}


def test_nothing_is_printed_while_a_progress_bar_is_open(there, monkeypatch):
    opened, printed = [], []

    class Bar:
        total = n = 0

        def __init__(self, **options):
            opened.append(self)
            self.open = True
            assert options["delay"] > 0, "a bar that is not needed does not appear"

        def __enter__(self):
            return self

        def __exit__(self, *error):
            self.open = False

        def update(self, n):
            self.n += n

    def show(*words, **options):
        assert not any(bar.open for bar in opened)
        printed.append(words)

    monkeypatch.setattr(report, "tqdm", Bar)
    monkeypatch.setattr(report, "print", show, raising=False)
    drawn_for("prior", "--samples 4 --only samples.png class_rows.png completions.png")
    assert len(printed) == 4
    assert [(bar.n, bar.total) for bar in opened] == [(16, 16)] * 6


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


def test_folders_named_in_a_checkpoint_do_not_decide_where_plots_go(there, folder):
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


def frames_of(epochs: list[int], epoch: int, tmp_path, monkeypatch) -> list[str]:
    """Names of the images in the animation of a run of `epoch` epochs, if the folder has files of `epochs`."""
    source, seen = tmp_path / "plots/generated_samples", list[str]()
    source.mkdir(parents=True)
    for number in epochs:
        (source / f"epoch_{number:03d}.png").touch()
    (source / "epoch_of_mine.png").touch()
    monkeypatch.setattr(plots, "read_frames", lambda paths: [seen.append(path.name) or path for path in paths])
    monkeypatch.setattr(plots, "training_animation", lambda frames, path: None)
    found = content(epoch=epoch, plots=str(tmp_path / "plots"))
    report.training_animation(reporting(make().eval(), tmp_path, **found), tmp_path / "x.gif")
    return seen


def test_an_animation_shows_the_epochs_of_its_run_in_order(tmp_path, monkeypatch):
    names = frames_of([2, 10, 999, 1000, 1001, 2000], 1000, tmp_path, monkeypatch)
    assert names == ["epoch_002.png", "epoch_010.png", "epoch_999.png", "epoch_1000.png"]


def test_an_animation_of_many_epochs_has_the_first_and_the_last(tmp_path, monkeypatch):
    names = frames_of(list(range(1, 301)), 250, tmp_path, monkeypatch)
    assert len(names) == plots.MOST_FRAMES
    assert (names[0], names[-1]) == ("epoch_001.png", "epoch_250.png")


def test_a_plot_that_was_asked_for_and_does_not_apply_says_why(there, capsys):
    assert visualize("--checkpoint logs/vqvae --device cpu --only interpolations.png usage.png") == 0
    out, err = capsys.readouterr()
    assert err == "interpolations.png: not drawn: the latent consists of codes, and is not continuous\n"
    assert "1 plot of vqvae" in out
    assert visualize("--checkpoint logs/vqvae --device cpu --only interpolations.png") == 2
    problem = "cannot be drawn: the latent consists of codes, and is not continuous; leave it out"
    assert capsys.readouterr().err == f"error: --only interpolations.png: {problem}\n"


def test_a_class_is_a_name_or_a_number():
    names = ["cat é", "dog", "1"]
    assert [report._label_of(typed, names) for typed in (None, "dog", "cat é", "0", "1")] == [None, 1, 0, 0, 2]
    for typed in ("3", "-1", "dig", "²"):
        with pytest.raises(OptionError, match=f"class={typed}: must be from 0 to 2, or the name of a class"):
            report._label_of(typed, names)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_few_held_out_images_suffice_for_every_plot_that_shows_them(folder, recwarn, count):
    line = f"--dataset photos crops=20 test_crops={count} --image-size 8 --batch-size 10 --hidden 4 --epochs 2 "
    line += "--validation test"
    vae = "--nets conv-vae --bottleneck gaussian latents=2 --prior normal"
    for name, bottleneck in (("vqvae", "--bottleneck vq num_codes=4"), ("vae", vae)):
        words = f"{line} {bottleneck} --name {name} --device cpu"
        assert run_train(*words.split(), small=False) == 0
    assert drawn_for("vqvae") == OF_IMAGES | {"code_visualization.png", "codebook.png", "usage.png"}
    of_several = {"interpolations.png", "traversals.png"} if count > 1 else set()
    assert drawn_for("vae") == OF_IMAGES | {"samples.png", "posterior_map.png", "latent_grid.png"} | of_several
    logged = "".join(Path(f"logs/{name}/metrics.jsonl").read_text() for name in ("vqvae", "vae"))
    assert "NaN" not in logged
    assert not [w for w in recwarn if "vqvae" not in w.filename]


def test_bottlenecks_with_levels_are_drawn_level_by_level(folder):
    assert run_train("--epochs", "1", "--name", "levels", "--bottleneck", "hierarchy") == 0
    assert drawn_for("levels") == OF_IMAGES | {"levels.png", "code_visualization.png", "usage.png"}


@pytest.mark.parametrize("prior", ["normal", "made-flow"])
def test_a_vae_is_drawn_with_its_latent(folder, monkeypatch, prior):
    line = f"--preset vae-cifar10 --dataset digits --prior {prior} --limit 60 --batch-size 20 --hidden 4"
    line += " --bottleneck gaussian latents=2 --image-size 16 --epochs 2 --name vae --device cpu"
    assert run_train(*line.split(), small=False) == 0
    shown, draw = [], plots.posterior_map
    monkeypatch.setattr(
        plots, "posterior_map", lambda *args, **options: [shown.append((args, options)), draw(*args, **options)]
    )
    of_samples = {"samples.png", "interpolations.png", "traversals.png"}
    assert drawn_for("vae") == OF_IMAGES | of_samples | {"posterior_map.png", "latent_grid.png"}
    (means, labels, *_), options = shown[0]
    assert len(means) == len(labels) == checkpoint.read("logs/vae")["data"]["examples"]["test"]
    assert "all 60 held-out examples" in options["title"]
    assert options["rings"] == (prior == "normal")


def reporting(model: Autoencoder, logs: Path, /, **content) -> report.Report:
    options = argparse.Namespace(only=None, seed=0, samples=4, label=None, **NEUTRAL)
    return report.Report(model, content, logs, options)


def test_an_old_checkpoint_says_how_many_examples_its_latent_plane_shows(tmp_path, monkeypatch):
    model = make(**fitting("gaussian") | {"bottleneck": choose("bottleneck", "gaussian", latents=2)}).eval()
    shown = {}
    monkeypatch.setattr(plots, "posterior_map", lambda *args, title, rings: shown.update(means=args[0], title=title))
    found = content(model, {"prior": choose("prior", "normal")})
    found["data"]["examples"] = {"train": 10, "test": 1234}
    report.posterior_map(reporting(model, tmp_path, **found), tmp_path / "x.png")
    assert torch.equal(shown["means"], model.posterior_mean(found["examples"]["images"]).flatten(1))
    assert "2 of 1,234 held-out examples" in shown["title"]


def test_the_latent_plane_is_decoded_at_quantiles_of_the_prior(tmp_path, monkeypatch):
    model = make(**fitting("gaussian") | {"bottleneck": choose("bottleneck", "gaussian", latents=2)}).eval()
    seen: list[torch.Tensor] = []
    monkeypatch.setattr(Autoencoder, "decode_latents", lambda self, z: [seen.append(z), images(len(z))][1])
    found = content(model, {"prior": choose("prior", "normal")})
    report.latent_grid(reporting(model, tmp_path, **found), tmp_path / "x.png")
    z = torch.cat(seen).flatten(1).view(20, 20, 2)
    assert torch.equal(z[..., 0], z[:1, :, 0].expand(20, 20)), "z1 is the same within a column"
    assert torch.equal(z[..., 1], z[:, :1, 1].expand(20, 20))
    assert z[0, 0].tolist() == pytest.approx([-1.96, 1.96], abs=0.01), "z2 grows upwards"
    shares = torch.special.ndtr(z[0, :, 0].double())
    assert torch.allclose(shares.diff(), torch.tensor(0.05, dtype=torch.float64), atol=1e-5)


def test_interpolations_start_and_end_at_the_reconstructions_of_two_images(tmp_path, monkeypatch):
    held_out, seen = images(20), list[list[torch.Tensor]]()
    monkeypatch.setattr(plots, "image_rows", lambda rows, *args, **options: seen.extend(x for _, x in rows))
    model = make(bottleneck="gaussian", prior="normal", nets="conv-vae").eval()
    with torch.no_grad():
        model.bottleneck.head.weight.mul_(1000)
    found = {"examples": {"images": held_out}}
    report.interpolations(reporting(model, tmp_path, **found), tmp_path / "x.png")
    assert len(seen) == 10
    for i, (start, between, end) in enumerate(seen):
        assert torch.equal(start[0], held_out[i])
        assert torch.equal(end[0], held_out[i + 10])
        ends = model.reconstruct(held_out[[i, i + 10]])
        assert torch.allclose(between[[0, -1]], ends, atol=1e-5)
        assert not torch.equal(between[3], between[0])


FAMILIES = ["vq", "cosine", "simvq", "fsq", "lfq", "residual", "grouped", "hierarchy", "multiscale", "gumbel"]


@pytest.mark.parametrize("name", FAMILIES)
def test_equal_codes_have_equal_colors_in_every_level(name):
    torch.manual_seed(0)
    model = make((3, 16, 16), bottleneck=name).eval()
    assert model.discrete is not None
    codes = torch.randint(model.discrete.num_codes, (5, *model.discrete.grid))
    maps = model.discrete.maps(codes)
    colors = report.code_colors(model, model.discrete, maps, images(5, (3, 16, 16)))
    assert list(colors) == list(maps)
    for level, found in zip(maps.values(), colors.values(), strict=True):
        assert found.shape == (*level.shape, 3)
        by_code = {}
        for code, color in zip(level.flatten().tolist(), found.reshape(-1, 3).tolist(), strict=True):
            assert by_code.setdefault(code, color) == color
        assert len({tuple(color) for color in by_code.values()}) > 1


def test_the_vector_of_a_code_decides_its_color():
    model = make((1, 16, 16), bottleneck=choose("bottleneck", "vq", num_codes=4, init="normal")).eval()
    with torch.no_grad():
        model.bottleneck.code_vectors().copy_(torch.tensor([[0.0], [0.01], [3.0], [3.01]]).expand(4, 4))
    codes = torch.arange(16).view(1, 4, 4) % 4
    gray = torch.full((1, 1, 16, 16), 128, dtype=torch.uint8)
    colors = report.code_colors(model, model.discrete, {"codes": codes}, gray)["codes"][0, 0].astype(int)
    distance = abs(colors[:, None] - colors).sum(axis=2)
    assert distance[0, 1] < 10 > distance[2, 3]
    assert distance[0, 2] > 100


def test_titles_say_tokens_temperature_and_class(tmp_path):
    words = {
        name: reporting(make((3, 16, 16), bottleneck=name), tmp_path).tokens()
        for name in ("vq", "residual", "hierarchy", "multiscale")
    }
    assert words == {
        "vq": "4x4 codes, K = 7",
        "residual": "4 levels of 4x4 codes, K = 7",
        "hierarchy": "2x2 top + 4x4 bottom codes, K = 7",
        "multiscale": "1x1 + 2x2 + 4x4 codes, K = 7",
    }
    sequence = make((1, 28, 28), nets="mnist-conv", bottleneck="vq")
    assert reporting(sequence, tmp_path).tokens() == "10 codes, K = 7"
    assert reporting(make(nets="mlp"), tmp_path).tokens() == "1 code, K = 7"
    vae = reporting(make(**fitting("gaussian")), tmp_path / "a\nb")
    assert vae.tokens() == "latent of 16 dimensions"
    assert vae.title("x", "", "y") == "a\\nb: x\ny"
    conditional = content()
    conditional["config"]["conditional"], conditional["data"]["classes"] = True, ["cat", "dog"]
    found = reporting(make(), tmp_path, **conditional)
    assert (found.sampling(), found.sampled_class()) == ("temperature 1", "classes in turn")
    found.options.temperature, found.options.top_k, found.options.label = 0.5, 3, 1
    assert (found.sampling(), found.sampled_class()) == ("temperature 0.5, the 3 likeliest codes", "class dog")
    found.options.top_k, found.options.top_p, found.options.guidance, found.options.steps = 0, 0.9, 2.0, 4
    assert found.sampling() == "temperature 0.5, top p 0.9, guidance 2, 4 steps"
    assert reporting(make(), tmp_path, **content()).sampled_class() == ""


def test_the_levels_of_a_hierarchy_have_one_set_of_names(folder, monkeypatch):
    seen = {}
    monkeypatch.setattr(plots, "code_visualization", lambda x, maps, *args, **options: seen.update(maps=list(maps)))
    monkeypatch.setattr(plots, "usage_chart", lambda *args, names, **options: seen.update(usage=names))
    monkeypatch.setattr(
        plots, "image_rows", lambda rows, *args, **options: seen.update(rows=[name for name, _ in rows])
    )
    model = make((3, 16, 16), bottleneck="hierarchy").eval()
    found = content(model, usage=torch.ones(2, 7))
    found["examples"]["images"] = images(2, (3, 16, 16))
    for draw in (report.code_visualization, report.usage, report.levels):
        draw(reporting(model, folder, **found), folder / "x.png")
    assert seen == {
        "maps": ["top", "bottom"],
        "usage": ["top", "bottom"],
        "rows": ["originals", "top only", "all levels"],
    }


def test_of_many_levels_some_are_shown(tmp_path, monkeypatch):
    seen = {}
    monkeypatch.setattr(
        plots, "code_visualization", lambda x, maps, *args, title: seen.update(maps=list(maps), title=title)
    )
    monkeypatch.setattr(
        plots, "usage_chart", lambda counts, *args, names, **options: seen.update(usage=names, n=counts)
    )
    monkeypatch.setattr(
        plots, "image_rows", lambda rows, *args, **options: seen.update(rows=[name for name, _ in rows])
    )
    chosen = choose("bottleneck", "residual", quantizers=30)
    model = make((3, 16, 16), bottleneck=chosen).eval()
    found = content(model, {"bottleneck": chosen}, usage=torch.arange(30).unsqueeze(1).expand(30, 7))
    found["examples"]["images"] = images(2, (3, 16, 16))
    for draw in (report.code_visualization, report.usage, report.levels):
        draw(reporting(model, tmp_path, **found), tmp_path / "x.png")
    assert seen["maps"] == seen["usage"] == [f"level {k}" for k in (1, 5, 9, 13, 17, 21, 25, 30)]
    assert seen["n"][:, 0].tolist() == [0, 4, 8, 12, 16, 20, 24, 29]
    assert [seen["rows"][i] for i in (0, 1, 2, 7, 8)] == [
        "originals", "level 1 only", "up to level 5", "up to level 25", "all levels",
    ]  # fmt: skip
    assert "8 of 30 levels" in seen["title"]


def test_many_classes_have_a_row_for_some_of_them(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(plots, "image_rows", lambda rows, *args, title, **options: seen.extend([title, *rows]))
    model = make(prior="pixelcnn", num_classes=300).eval()
    found = content(model, {"prior": choose("prior", "pixelcnn")})
    found["config"]["conditional"], found["data"]["classes"] = True, [f"class {k}" for k in range(300)]
    report.class_rows(reporting(model, tmp_path, **found), tmp_path / "x.png")
    title, *rows = seen
    assert "40 of 300 classes" in title
    assert [rows[0][0], rows[-1][0], len(rows)] == ["class 0", "class 299", 40]


def test_points_are_drawn_as_scatter_plots(folder):
    line = "--preset vae-2d-2 --epochs 2 --limit 640 --name points --device cpu"
    assert run_train(*line.split(), small=False) == 0
    assert drawn_for("points") == {"index.html", "curves.png", "scatter_2d.png", "posterior_map.png"}


def test_points_with_codes_are_drawn_too(folder, monkeypatch):
    line = "--dataset gauss2d --nets mlp --bottleneck vq num_codes=8 --likelihood gaussian --limit 100"
    line += " --batch-size 20 --epochs 2 --name points --device cpu"
    assert run_train(*line.split(), small=False) == 0
    shown, draw = [], plots.scatter_2d
    monkeypatch.setattr(
        plots, "scatter_2d", lambda panels, *a, **k: [shown.append([n for n, _ in panels]), draw(panels, *a, **k)]
    )
    assert drawn_for("points") == {"index.html", "curves.png", "scatter_2d.png", "usage.png"}
    drawn_for("points", "--only scatter_2d.png")
    assert shown[0] == ["held-out data", "reconstructions"], "the uniform prior knows nothing"
    assert len(shown[1]) == 4


def test_the_page_of_a_run_shows_its_plots_metrics_and_settings(there):
    if not Path("plots/vqvae/index.html").exists():  # another test draws it too
        drawn_for("vqvae")
    text = Path("plots/vqvae/index.html").read_text()
    shown = re.findall(r'<img src="([\w.]+)" alt="[^"]+ of vqvae"', text)
    assert shown == [name for name in report.PLOTS if name in files_in("plots/vqvae")]
    assert len(shown) == 7
    for words in ("4x4 codes, K = 16, 64 bits an image", "digits: 60 train, 60 test, 1x16x16"):
        assert words in text
    assert "vq num_codes=16 code_dim=4" in text
    assert "Metrics after epoch 2" in text
    assert "peak signal-to-noise ratio" in text
    assert "interpolations.png: the latent consists of codes" in text
    assert "samples.png: the uniform prior knows nothing of the data" in text
    drawn_for("vqvae", "--only usage.png")
    assert Path("plots/vqvae/index.html").read_text() == text


def test_metrics_have_as_many_decimals_as_their_errors():
    row = {"held_out_psnr": 20.8512, "held_out_psnr_se": 0.034, "train_mse": 0.0123456, "held_out_mse": 1.5, "step": 3}
    row |= {"held_out_rate": 12345.6, "held_out_rate_se": 0.0, "held_out_mse_se": -1.0, "images_per_s": 1.0}
    table = {name: cells for name, _, cells in report._metric_rows(row)}
    assert table == {"mse": ("0.01235", "1.5"), "psnr": ("", "20.85 ± 0.03"), "rate": ("", "1.235e+04")}


def test_every_plot_has_one_sentence_on_how_to_read_it():
    for name, plot in report.PLOTS.items():
        assert plot.reading.endswith("."), name
        assert not re.search(r"[.!?] ", plot.reading), name
        assert len({other.heading for other in report.PLOTS.values()}) == len(report.PLOTS)


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


@pytest.mark.parametrize(
    ("nets", "size"),
    [("sonnet", 64), ("henrhoi", 64), ("sqvae", 64), ("deepmind", 64), ("dalle", 128), ("sonnet", 28)],
)
def test_a_codes_patch_of_a_large_grid_is_that_of_the_whole_grid(nets, size):
    model = make((3, size, size), nets=nets, bottleneck=choose("bottleneck", "vq", num_codes=3)).eval()
    h, w = model.bottleneck.grid
    whole = model.decode(torch.arange(3).view(-1, 1, 1).expand(-1, h, w).contiguous())
    side = size // h
    center = whole[..., h // 2 * side : (h // 2 + 1) * side, w // 2 * side : (w // 2 + 1) * side]
    assert whole.std() > 0
    assert torch.allclose(report.code_patches(model, model.bottleneck), center, atol=1e-5)


def test_a_grid_of_width_1_is_no_sequence(tmp_path):
    model = make((3, 24, 4), bottleneck=choose("bottleneck", "vq", num_codes=4, init="normal")).eval()
    assert model.bottleneck.grid == (6, 1)
    assert reporting(model, tmp_path).tokens() == "6x1 codes, K = 4"
    assert report.code_patches(model, model.bottleneck).shape == (4, 3, 4, 4)


def test_codes_of_a_sequence_have_no_position(tmp_path):
    nets = choose("nets", "mnist-conv", latents=6)
    model = make((1, 28, 28), nets=nets, bottleneck=choose("bottleneck", "vq", num_codes=4, init="normal")).eval()
    assert reporting(model, tmp_path).tokens() == "6 codes, K = 4"
    assert report.code_patches(model, model.bottleneck).shape == (4, 1, 28, 28)
