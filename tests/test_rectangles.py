"""Images whose height and width differ, from training to decoded codes."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.helpers import make
from vqvae.__main__ import main
from vqvae.data import load
from vqvae.decoding import read_image
from vqvae.errors import OptionError
from vqvae.nets import NETS
from vqvae.registry import Size


@pytest.fixture(autouse=True)
def own_place(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


def write_images(count: int = 24) -> None:
    """Images of two classes: half of them wide, half of them tall."""
    rng = np.random.default_rng(0)
    for i in range(count):
        path = Path("in", "ab"[i % 2], f"{i}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        size = (20, 40, 3) if i % 4 < 2 else (40, 20, 3)
        Image.fromarray(rng.integers(256, size=size, dtype=np.uint8)).save(path)


def run(line: str) -> None:
    assert main(line.split()) == 0, line


def test_a_run_on_images_of_16x24_goes_all_the_way():
    write_images()
    small = "--batch-size 8 --epochs 1 --device cpu"
    data = "--dataset folder --data-dir in --image-size 16x24 --resize pad --augment crop-flip"
    run(f"train {data} --hidden 8 --codes 8 --name run {small}")
    run("train --evaluate --checkpoint logs/run --device cpu")
    run(f"train --prior pixelcnn channels=8 blocks=1 --conditional --checkpoint logs/run --name prior {small}")
    plots = ["code_visualization.png", "codebook.png", "completions.png", "class_rows.png"]
    run(f"visualize --checkpoint logs/prior --samples 4 --device cpu --only {' '.join(plots)}")
    assert all(Path("plots/prior", name).exists() for name in plots)
    run("encode --checkpoint logs/run --input in --output codes.npz --device cpu")
    run("encode --checkpoint logs/run --dataset folder --data-dir in --output train.npz --device cpu")
    with np.load("codes.npz") as file, np.load("train.npz") as train:
        assert file["codes"].shape == (24, 4, 6)
        by_name = {codes.tobytes() for codes in file["codes"]}
        assert all(codes.tobytes() in by_name for codes in train["codes"])  # padded, as the model was trained
    run("decode codes.npz --checkpoint logs/run --output out --device cpu")
    assert Image.open("out/a/0.png").size == (24, 16)
    run("train --resume logs/run --epochs 2 --image-size 16x24")


@pytest.mark.parametrize("name", sorted(set(NETS) - {"mlp"}))
def test_nets_keep_the_height_and_the_width(name):
    model = make((3, 16, 24), nets=name)
    images = torch.rand(2, 3, 16, 24)
    assert model.reconstruct(images).shape == images.shape
    assert model.encode(images).shape == (2, *model.bottleneck.grid)


@pytest.mark.parametrize("bottleneck", ["residual", "hierarchy", "grouped", "fsq", "categorical"])
@pytest.mark.parametrize("prior", ["unigram", "pixelcnn", "gated-pixelcnn", "transformer"])
def test_priors_sample_codes_of_a_rectangle(bottleneck, prior):
    model = make((3, 16, 24), bottleneck=bottleneck, prior=prior)
    assert model.sample(2).shape == (2, 3, 16, 24)


def write_halves(path: str) -> None:
    """40x20 pixels (width, height): red, then blue."""
    image = Image.new("RGB", (40, 20), "red")
    image.paste((0, 0, 255), (20, 0, 40, 20))
    image.save(path)


def test_crop_keeps_the_center_pad_keeps_all_and_stretch_changes_the_aspect():
    write_halves("a.png")
    cropped, padded, stretched = (read_image(Path("a.png"), 8, 3, how) for how in ("crop", "pad", "stretch"))
    assert cropped.shape == padded.shape == stretched.shape == (3, 8, 8)
    assert (cropped[0, :, 0] == 255).all()
    assert (cropped[2, :, 7] == 255).all()
    assert not padded[:, :2].any()
    assert not padded[:, 6:].any()
    assert (padded[0, 2:6, 0] == 255).all()
    assert (stretched[0, :, 0] == 255).all()
    tall = read_image(Path("a.png"), (16, 8), 3, "pad")
    assert (tall != 0).any(axis=(0, 2)).nonzero()[0].tolist() == [6, 7, 8, 9]


def test_an_image_of_the_right_aspect_is_the_same_however_it_is_resized():
    write_halves("a.png")
    crop, pad, stretch = (read_image(Path("a.png"), (10, 20), 3, how) for how in ("crop", "pad", "stretch"))
    assert (crop == pad).all()
    assert (crop == stretch).all()


@pytest.mark.parametrize("how", ["crop", "pad", "stretch"])
@pytest.mark.parametrize("size", [(1, 300), (300, 1)])
def test_extreme_shapes_are_read(how, size):
    Image.new("L", size, 200).save("a.png")
    assert read_image(Path("a.png"), (8, 12), 1, how).max() == 200


def test_every_way_and_size_has_a_cache_of_its_own():
    write_images(8)
    seen = [load("folder", data_dir="in", image_size=8, resize=how).train.images for how in ("crop", "pad", "stretch")]
    assert len({images.numpy().tobytes() for images in seen}) == 3
    assert load("folder", data_dir="in", image_size=(8, 12)).train.images.shape[1:] == (3, 8, 12)
    assert load("folder", data_dir="in", image_size=(12, 8)).train.images.shape[1:] == (3, 12, 8)


def test_built_in_images_take_a_height_and_a_width():
    assert load("digits", image_size="16x24", limit=3).train.images.shape == (3, 1, 16, 24)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ("16x23", "image_size=16x23: does not divide by 4; try 16x20 or 16x24"),
        ("30x23", "image_size=30x23: does not divide by 4; try 28x20 or 32x24"),
        ("2x16", "image_size=2x16: does not divide by 4; try 4x16 or 8x20"),
    ],
)
def test_sizes_that_do_not_divide_name_rectangles_that_do(size, message):
    with pytest.raises(OptionError, match=message):
        make((3, *Size(size)))


@pytest.mark.parametrize("words", ["--image-size 16x", "--image-size 16x24x3", "--image-size ax4", "--image-size 0x8"])
def test_text_that_is_not_a_size_is_refused(words, capsys):
    assert main(["train", *words.split()]) == 2
    assert capsys.readouterr().err.startswith(f"error: {words}: must be ")


def test_resizing_is_refused_for_data_that_has_one_shape(capsys):
    assert main("train --dataset digits --resize pad".split()) == 2
    assert "error: --resize pad: --dataset digits has no resize" in capsys.readouterr().err


def test_a_size_is_read_and_written_in_every_form():
    assert Size(64) == Size("64") == Size("64x64") == Size((64, 64)) == (64, 64)
    assert [Size(text).plain() for text in ("64", "96x128", "96×128", "1e2")] == [64, "96x128", "96x128", 100]
