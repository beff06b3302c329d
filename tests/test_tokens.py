"""Pictures to codes.npz and back, as a person runs it; files from strangers are refused before anything is written."""

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from tests.test_autoencoder import choose, make, pictures
from tests.test_checkpoint import Payload, content
from vqvae import checkpoint, data, load, tokens
from vqvae.__main__ import main
from vqvae.autoencoder import Autoencoder
from vqvae.config import Config
from vqvae.pictures import read_picture

ROOT = Path(__file__).parent.parent


def stored(folder: Path, shape=(3, 8, 8), **names) -> Autoencoder:
    """A model whose codes are in use, saved as folder/checkpoint.pt."""
    names = {"nets": "sonnet", "bottleneck": "vq", "prior": "uniform", "likelihood": "mse"} | names
    choices = {slot: choose(slot, name) if isinstance(name, str) else name for slot, name in names.items()}
    model = make(shape, **names)
    model.initialise(lambda n: pictures(n, shape))
    config = Config(dataset=choose("nets", "mlp"), **choices)
    about = {"name": "none", "shape": list(shape), "variance": 0.06, "classes": [], "note": ""}
    folder.mkdir(exist_ok=True)
    checkpoint.write(folder / "checkpoint.pt", content(config=config.to_dict(), data=about, model=model.state_dict()))
    return load(folder / "checkpoint.pt")


@pytest.fixture
def there(tmp_path, monkeypatch):
    """An empty folder to run in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(line: str) -> int:
    return main(line.split())


def paint(*names: str, size=(13, 8)) -> None:
    """Noise of any shape under each name."""
    for i, name in enumerate(names):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(i).integers(256, size=(*size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(name)


def decoded(path: Path | str) -> torch.Tensor:
    """A PNG file as `[C, H, W]` in levels from 0 to 255."""
    with Image.open(path) as picture:
        values = torch.from_numpy(np.array(picture)).float()
    return values[None] if values.ndim == 2 else values.permute(2, 0, 1)


def encoded(there: Path) -> dict[str, np.ndarray]:
    """What codes.npz of three pictures holds, made by model `run`."""
    stored(there / "run")
    paint("in/a.png", "in/b.png", "in/c.png")
    assert run("encode --checkpoint run --input in --output codes.npz --device cpu") == 0
    with np.load("codes.npz") as held:
        return dict(held)


def test_a_folder_becomes_codes_and_comes_back(there, capsys):
    model = stored(there / "run")
    paint("in/z.png", "in/deep/er/a.jpg", "in/deep/er/a.png", "in/m.webp", "in/b.bmp")
    Path("in/broken.jpg").write_bytes(b"no picture")
    Path("in/notes.txt").write_text("not read at all")
    assert run("encode --checkpoint run --input in --output out/codes.npz --batch-size 2 --device cpu") == 0
    said, complaints = capsys.readouterr()
    assert "5 pictures as 2x2 codes of 7; 1 left out" in said
    assert complaints.count("\n") == 1
    assert "broken.jpg" in complaints

    with np.load("out/codes.npz", allow_pickle=False) as held:
        held = dict(held)
    assert set(held) == {"codes", "num_codes", "grid", "image_shape", "files", "model"}
    assert held["codes"].dtype == np.uint16
    assert (held["num_codes"], held["grid"].tolist(), held["image_shape"].tolist()) == (7, [2, 2], [3, 8, 8])
    names = held["files"].tolist()
    assert names == ["b.bmp", "deep/er/a.jpg", "deep/er/a.png", "m.webp", "z.png"]
    images = torch.from_numpy(np.stack([read_picture(Path("in", name), 8, 3) for name in names]))
    assert torch.equal(torch.from_numpy(held["codes"].astype(np.int64)), model.encode(images))
    assert len(np.unique(held["codes"])) > 2  # else pictures in another order would pass
    assert [p.name for p in Path("out").iterdir()] == ["codes.npz"]

    assert run("decode out/codes.npz --checkpoint run --output back --batch-size 2 --device cpu") == 0
    written = sorted(p.relative_to("back").as_posix() for p in Path("back").rglob("*") if p.is_file())
    assert written == ["b.png", "deep/er/a.jpg.png", "deep/er/a.png.png", "m.png", "z.png"]
    for name, expected in zip(written, model.reconstruct(images), strict=True):
        assert (decoded(f"back/{name}") - expected * 255).abs().max() <= 0.501, name


def test_a_data_set_has_labels_and_numbered_pictures(there):
    model = stored(there / "run", (1, 16, 16))
    for flags, split, count in (("--split test --limit 5", "test", 5), ("--limit 3", "train", 3)):
        line = f"encode --checkpoint run --dataset digits {flags} --output codes.npz --batch-size 2 --device cpu"
        assert run(line) == 0
        with np.load("codes.npz") as held:
            held = dict(held)
        expected = getattr(data.load("digits", image_size=16, limit=count), split)
        assert np.array_equal(held["labels"], expected.labels.numpy())
        assert np.array_equal(held["codes"], model.encode(expected.images).numpy())
        assert held["files"].shape == (0,)
    assert run("decode codes.npz --checkpoint run --output back --device cpu") == 0
    assert sorted(p.name for p in Path("back").iterdir()) == ["000000.png", "000001.png", "000002.png"]
    assert decoded("back/000000.png").shape == (1, 16, 16)  # grey


def test_a_grey_model_gets_grey_pictures_of_its_size(there):
    model = stored(there / "run", (1, 16, 16))
    paint("in/colour.png")
    assert run("encode --checkpoint run --input in --output codes.npz --device cpu") == 0
    images = torch.tensor(read_picture(Path("in/colour.png"), 16, 1))[None]
    with np.load("codes.npz") as held:
        assert np.array_equal(held["codes"], model.encode(images).numpy())


def test_pictures_are_read_a_batch_ahead_and_no_further(there, monkeypatch):
    model = stored(there / "run")
    paint(*(f"in/{i}.png" for i in range(10)))
    read = []
    monkeypatch.setattr("vqvae.pictures.read_picture", lambda path, *_: read.append(path) or np.zeros((3, 8, 8)))
    source = tokens.PictureFolder(Path("in"), model, batch_size=2)
    for done, batch in enumerate(source, start=1):
        assert len(batch) == 2
        assert len(read) <= 2 * (done + 1)
    assert len(source.names) == 10


@pytest.mark.parametrize(("num_codes", "kind"), [(1 << 16, np.uint16), ((1 << 16) + 1, np.int32)])
def test_the_largest_code_fits(num_codes, kind):
    model = SimpleNamespace(
        bottleneck=SimpleNamespace(num_codes=num_codes, grid=(2, 3, 4)),  # a grid of any rank
        encode=lambda images: torch.full((len(images), 2, 3, 4), num_codes - 1),
    )
    codes = tokens.encode(model, pictures(5).split(2), at_most=6)
    assert codes.dtype == kind
    assert codes.shape == (5, 2, 3, 4)
    assert (codes == num_codes - 1).all()


def test_no_two_pictures_share_a_name():
    files = ["a.jpg", "a.png", "a.jpg.png", "b.png/c.gif", "b.jpg", "d", "d.x"]
    names = tokens._picture_names(Path("codes.npz"), np.array(files), len(files))
    # a.jpg.png is the third's own name, b.png a folder, d.png what both last ones would like
    assert names == ["a.jpg-2.png", "a.png.png", "a.jpg.png", "b.png/c.png", "b.jpg.png", "d-2.png", "d.x.png"]


SPOILT = {
    "another model": ({"model": "0123456789abcdef"}, "codes are those of model '0123456789abcdef'"),
    "no grid": ({"grid": None}, "grid is not a file in the archive"),
    "a pickle": ({"files": np.array([Payload()] * 3)}, "allow_pickle=False"),
    "a pickled model": ({"model": np.array(Payload(), dtype=object)}, "allow_pickle=False"),
    "too many codes": ({"num_codes": 8}, "its num_codes is 8, and the model's 7"),
    "a code too large": ({"codes": np.full((3, 2, 2), 7)}, "codes should be from 0 to 6, and are 7 to 7"),
    "a negative code": ({"codes": np.full((3, 2, 2), -1)}, "codes should be from 0 to 6, and are -1 to -1"),
    "codes of another grid": ({"codes": np.zeros((3, 4, 1), int)}, "integers [N, 2, 2], and are int64 [3, 4, 1]"),
    "codes without rows": ({"codes": np.zeros((0, 2, 2), int)}, "are int64 [0, 2, 2]"),
    "real codes": ({"codes": np.zeros((3, 2, 2))}, "are float64"),
    "another grid": ({"grid": np.array([4, 1])}, "its grid is [4, 1], and the model's [2, 2]"),
    "another size": ({"image_shape": np.array([3, 8, 9])}, "its image_shape is [3, 8, 9]"),
    "a name upwards": ({"files": np.array(["../x.jpg", "b", "c"])}, "'../x.jpg' leads out of --output"),
    "a name up and down": ({"files": np.array(["a", "b/../../x", "c"])}, "'b/../../x' leads out of --output"),
    "an absolute name": ({"files": np.array(["a", "b", "/tmp/x.jpg"])}, "'/tmp/x.jpg' leads out of --output"),
    "no name": ({"files": np.array(["a", "b", ""])}, "'' leads out of --output"),
    "the folder's own name": ({"files": np.array(["a", "b", "."])}, "'.' leads out of --output"),
    "a name with a line break": ({"files": np.array(["a", "b", "..\n/../x"])}, "leads out of --output"),
    "one name twice": ({"files": np.array(["a", "a", "c"])}, "files should be 3 different names"),
    "too few names": ({"files": np.array(["a", "b"])}, "files should be 3 different names"),
    "numbers for names": ({"files": np.arange(3)}, "files should be 3 different names"),
}


@pytest.mark.parametrize("what", SPOILT)
def test_codes_from_a_stranger_are_refused_before_anything_is_written(there, capsys, what):
    changes, message = SPOILT[what]
    held = {name: value for name, value in (encoded(there) | changes).items() if value is not None}
    np.savez("codes.npz", **held)
    before = sorted(there.rglob("*"))
    capsys.readouterr()
    assert run("decode codes.npz --checkpoint run --output back --device cpu") == 2
    complaint = capsys.readouterr().err
    assert message in complaint
    assert complaint.startswith("error: codes.npz: ")
    assert complaint.count("\n") == 1
    assert sorted(there.rglob("*")) == before  # nor did the pickle run, which writes a file


def _truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def _garbled(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[60:90] = bytes(30)
    path.write_bytes(raw)


@pytest.mark.parametrize(
    "spoil",
    [
        _truncated,
        _garbled,
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"PK\x03\x04 and no more"),
        lambda path: path.write_text("codes"),
        lambda path: np.save(path.open("wb"), np.zeros(3)),
        lambda path: np.savez(path, x=1),
        lambda path: torch.save({"codes": 1}, path),
        lambda path: path.unlink(),
    ],
    ids=["truncated", "garbled", "empty", "a start", "text", "npy", "another npz", "a checkpoint", "absent"],
)
def test_files_that_are_no_codes_are_refused(there, capsys, spoil):
    encoded(there)
    spoil(there / "codes.npz")
    capsys.readouterr()
    assert run("decode codes.npz --checkpoint run --output back --device cpu") == 2
    complaint = capsys.readouterr().err
    assert re.match("error: codes.npz: (truncated, or not a file of codes|no such file)", complaint)
    assert complaint.count("\n") == 1
    assert not Path("back").exists()


def test_codes_of_one_model_are_refused_by_another(there, capsys):
    encoded(there)
    torch.manual_seed(1)
    stored(there / "other")
    assert run("decode codes.npz --checkpoint other --output back --device cpu") == 2
    assert "give the checkpoint that encoded them" in capsys.readouterr().err


def test_nothing_is_overwritten(there, capsys):
    encoded(there)
    Path("back").mkdir()
    Path("back/a.png").write_text("mine")
    assert run("decode codes.npz --checkpoint run --output back --device cpu") == 2
    assert "--output back: is not empty" in capsys.readouterr().err
    assert [p.read_text() for p in Path("back").iterdir()] == ["mine"]
    Path("empty").mkdir()
    assert run("decode codes.npz --checkpoint run --output empty --device cpu") == 0
    assert len(list(Path("empty").iterdir())) == 3


def test_a_failed_encoding_leaves_the_old_codes(there, capsys):
    encoded(there)
    before = Path("codes.npz").read_bytes()
    for path in Path("in").iterdir():
        path.write_bytes(b"no picture")
    assert run("encode --checkpoint run --input in --output codes.npz --device cpu") == 2
    complaints = capsys.readouterr().err
    assert complaints.count("\n") == 4  # one for each file, and the error
    assert "--input in: none of its 3 pictures can be read" in complaints
    assert Path("codes.npz").read_bytes() == before
    assert not list(there.glob("*.partial"))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("encode --checkpoint none.pt --input in --output c.npz", "none.pt: no such file"),
        ("encode --checkpoint run --input none --output c.npz", "--input none: no such folder"),
        ("encode --checkpoint run --input empty --output c.npz", "--input empty: holds no pictures"),
        ("encode --checkpoint run --output c.npz", "--dataset --input is required"),
        ("encode --checkpoint run --input in --dataset digits --output c.npz", "not allowed with"),
        ("encode --checkpoint run --input in --split test --output c.npz", "--split test: goes with --dataset"),
        ("encode --checkpoint run --input in --data-dir in --output c.npz", "--data-dir in: goes with --dataset"),
        ("encode --checkpoint run --input in --output codes", "--output codes: must end in .npz, such as codes.npz"),
        ("encode --checkpoint run --input in --output a.npz", "--output a.npz: is a folder"),
        ("encode --checkpoint run --input in --output in/a.png/c.npz", "--output in/a.png/c.npz: cannot be written"),
        ("encode --checkpoint run --input in --output c.npz --batch-size 0", "--batch-size 0: must be at least 1"),
        ("encode --checkpoint run --input in --output c.npz --limit 0", "--limit 0: must be at least 1"),
        ("encode --checkpoint run --dataset mnits --output c.npz", "did you mean 'mnist'"),
        ("encode --checkpoint run --dataset photos limit=3 --output c.npz", "unknown option 'limit'"),
        ("encode --checkpoint run --dataset digits --output c.npz", "are 1x8x8, and the model's are 3x8x8"),
        ("encode --checkpoint run --dataset gauss2d --output c.npz", "are 2x1x1, and the model's are 3x8x8"),
        ("encode --checkpoint vae --input in --output c.npz", "--checkpoint vae: its latent is continuous"),
        ("encode --checkpoint plane --input in --output c.npz", "--input in: the model's examples are 2x1x1"),
        ("decode c.npz --checkpoint plane --output back", "--checkpoint plane: the model's examples are 2x1x1"),
        ("decode c.npz --checkpoint vae --output back", "--checkpoint vae: its latent is continuous"),
        ("decode c.npz --checkpoint run --output back", "c.npz: no such file"),
        ("decode --checkpoint run --output back", "required: FILE"),
        ("export --checkpoint run --output in", "--output in: is not empty"),
        ("export --checkpoint run --output in/a.png", "--output in/a.png: cannot be written"),
        ("encod", "invalid choice: 'encod'"),
        ("", "required: COMMAND"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(there, capsys, line, message):
    stored(there / "run")
    stored(there / "vae", bottleneck="gaussian", prior="normal", nets="conv-vae")
    stored(there / "plane", (2, 1, 1), nets="mlp", likelihood="gaussian")
    paint("in/a.png")
    Path("empty").mkdir()
    Path("a.npz").mkdir()
    before = sorted(there.rglob("*"))
    assert run(line) == 2
    complaint = capsys.readouterr().err
    assert complaint.startswith("error: ")
    assert message in complaint
    assert complaint.count("\n") == 1
    assert sorted(there.rglob("*")) == before


def test_points_of_the_plane_have_codes_too(there):
    model = stored(there / "plane", (2, 1, 1), nets="mlp", likelihood="gaussian")
    assert run("encode --checkpoint plane --dataset gauss2d set=2 --limit 9 --output codes.npz --device cpu") == 0
    points = data.load("gauss2d", set=2, limit=9).train.images
    with np.load("codes.npz") as held:
        assert np.array_equal(held["codes"], model.encode(points).numpy())


def test_the_readers_example_runs(there):
    encoded(there)
    section = (ROOT / "README.md").read_text().split("## Tokens for other programs")[1]
    snippet = re.search(r"```python\n(.*?)```", section, re.S)[1]
    names = {}
    exec(snippet, names)
    assert names["sequences"].shape == (3, 5)
    assert (names["sequences"][:, 0] == 7).all()
    assert run("decode drawn.npz --checkpoint run --output drawn --device cpu") == 0
    assert len(list(Path("drawn").iterdir())) == 3


def test_the_command_itself(there):
    stored(there / "run")
    paint("in/a.png")
    Path("in/b.jpg").write_bytes(b"no picture")
    line = ["-m", "vqvae", "encode", "--checkpoint", "run", "--input", "in", "--output", "codes.npz", "--device", "cpu"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *line], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout == "codes.npz: 1 pictures as 2x2 codes of 7; 1 left out, unreadable\n"
    assert done.stderr.startswith("'b.jpg': left out, cannot be read")
    bad = subprocess.run([sys.executable, *line[:-3]], capture_output=True, text=True, check=False, env=environment)
    assert bad.returncode == 2


@pytest.mark.parametrize("command", ["", "encode", "decode", "export"])
def test_help_teaches_and_imports_no_heavy_library(command):
    code = (
        f"import sys, runpy; sys.argv = ['vqvae', *'{command} --help'.split()]\n"
        "try: runpy.run_module('vqvae', run_name='__main__')\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch', 'PIL', 'safetensors', 'numpy', 'tqdm'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert re.search(r"^examples?$", done.stdout, re.M)
    assert f"python -m vqvae {command}" in done.stdout
    assert done.stdout.strip().endswith("[]")
