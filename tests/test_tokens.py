"""Images to codes.npz and back, from the command line. Files from strangers are refused before anything is written."""

import io
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from tests.checkpoints import Payload, stored
from tests.helpers import ROOT, images
from vqvae import __version__, archives, checkpoint, data, tokens
from vqvae.__main__ import COMMANDS, main
from vqvae.data.image_folder import read_image
from vqvae.errors import UserError
from vqvae.registry import Choice


@pytest.fixture
def workdir(tmp_path, monkeypatch):
    """An empty folder, made the current one."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(line: str) -> int:
    return main(line.split())


def write_images(*names: str, size=(13, 8)) -> None:
    """An image of noise under each name."""
    for i, name in enumerate(names):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(i).integers(256, size=(*size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(name)


def png(path: Path | str) -> torch.Tensor:
    """A PNG file as `[C, H, W]` in levels from 0 to 255."""
    with Image.open(path) as image:
        values = torch.from_numpy(np.array(image)).float()
    return values[None] if values.ndim == 2 else values.permute(2, 0, 1)


def npz(path: Path | str) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as archive:
        return dict(archive)


def encoded(workdir: Path) -> dict[str, np.ndarray]:
    """The content of codes.npz after encoding three images with the model in `run`."""
    stored(workdir / "run")
    write_images("in/a.png", "in/b.png", "in/c.png")
    assert run("encode --checkpoint run --input in --output codes.npz --device cpu") == 0
    return npz("codes.npz")


def test_a_folder_is_encoded_and_decoded(workdir, capsys):
    model = stored(workdir / "run")
    write_images("in/z.png", "in/deep/er/a.jpg", "in/deep/er/a.png", "in/m.webp", "in/b.bmp")
    Path("in/broken.jpg").write_bytes(b"no image")
    Path("in/notes.txt").write_text("not read at all")
    assert run("encode --checkpoint run --input in --output out/codes.npz --batch-size 2 --device cpu") == 0
    out, err = capsys.readouterr()
    assert "5 images, 2x2 codes each, codebook of 7; 1 unreadable, skipped" in out
    assert err.count("\n") == 1
    assert "broken.jpg" in err

    content = npz("out/codes.npz")
    assert set(content) == {"codes", "num_codes", "grid", "image_shape", "files", "model", "source"}
    assert content["codes"].dtype == np.uint16
    assert (content["num_codes"], content["grid"].tolist(), content["image_shape"].tolist()) == (7, [2, 2], [3, 8, 8])
    names = content["files"].tolist()
    assert names == ["b.bmp", "deep/er/a.jpg", "deep/er/a.png", "m.webp", "z.png"]
    originals = torch.from_numpy(np.stack([read_image(Path("in", name), 8, 3) for name in names]))
    batches = originals.split([1, 2, 2])  # as encoded: the broken file was in the first batch
    codes = torch.from_numpy(content["codes"].astype(np.int64))
    assert torch.equal(codes, torch.cat([model.encode(batch) for batch in batches]))
    assert len(codes.unique()) > 2  # otherwise images in another order would pass
    assert [p.name for p in Path("out").iterdir()] == ["codes.npz"]

    assert run("decode out/codes.npz --checkpoint run --output back --batch-size 2 --device cpu") == 0
    written = sorted(p.relative_to("back").as_posix() for p in Path("back").rglob("*") if p.is_file())
    assert written == ["b.png", "deep/er/a.jpg.png", "deep/er/a.png.png", "m.png", "z.png"]
    for name, expected in zip(written, model.decode(codes), strict=True):
        assert (png(f"back/{name}") - expected * 255).abs().max() <= 0.51, name


def test_a_data_set_gives_labels_and_numbered_images(workdir):
    model = stored(workdir / "run", (1, 16, 16))
    for flags, split, count in (("--split test --limit 5", "test", 5), ("--limit 3", "train", 3)):
        line = f"encode --checkpoint run --dataset digits {flags} --output codes.npz --batch-size 2 --device cpu"
        assert run(line) == 0
        content = npz("codes.npz")
        expected = getattr(data.load("digits", image_size=16, limit=count), split)
        codes = torch.cat([model.encode(batch) for batch in expected.images.split(2)])
        assert np.array_equal(content["labels"], expected.labels.numpy())
        assert np.array_equal(content["codes"], codes.numpy())
        assert content["files"].shape == (0,)
    assert run("decode codes.npz --checkpoint run --output back --device cpu") == 0
    assert sorted(p.name for p in Path("back").iterdir()) == ["000000.png", "000001.png", "000002.png"]
    assert png("back/000000.png").shape == (1, 16, 16)  # gray


def test_a_limit_takes_the_first_images_of_a_folder(workdir):
    stored(workdir / "run")
    write_images("in/a.png", "in/b.png", "in/c.png")
    assert run("encode --checkpoint run --input in --limit 2 --output codes.npz --device cpu") == 0
    assert npz("codes.npz")["files"].tolist() == ["a.png", "b.png"]


def test_a_gray_model_gets_gray_images_of_its_size(workdir):
    model = stored(workdir / "run", (1, 16, 16))
    write_images("in/color.png")
    assert run("encode --checkpoint run --input in --output codes.npz --device cpu") == 0
    gray = torch.tensor(read_image(Path("in/color.png"), 16, 1))[None]
    assert np.array_equal(npz("codes.npz")["codes"], model.encode(gray).numpy())


def test_at_most_one_batch_is_read_ahead(workdir, monkeypatch):
    model = stored(workdir / "run")
    write_images(*(f"in/{i}.png" for i in range(10)))
    read = []
    reader = "vqvae.data.image_folder.read_image"
    monkeypatch.setattr(reader, lambda path, *_: read.append(path) or np.zeros((3, 8, 8)))
    source = tokens.ImageFolder(Path("in"), model, batch_size=2)
    for done, batch in enumerate(source, start=1):
        assert len(batch) == 2
        assert len(read) <= 2 * (done + 1)
    assert len(source.names) == 10


@pytest.mark.parametrize(("num_codes", "kind"), [(1 << 16, np.uint16), ((1 << 16) + 1, np.int32)])
def test_the_largest_code_fits(num_codes, kind):
    model = SimpleNamespace(
        discrete=SimpleNamespace(num_codes=num_codes, grid=(2, 3, 4)),  # a grid of any rank
        encode=lambda images: torch.full((len(images), 2, 3, 4), num_codes - 1),
    )
    codes = tokens.encode(model, images(5).split(2), at_most=6)
    assert codes.dtype == kind
    assert codes.shape == (5, 2, 3, 4)
    assert (codes == num_codes - 1).all()


def test_no_two_images_share_a_name():
    files = ["a.jpg", "a.png", "a.jpg.png", "b.png/c.gif", "b.jpg", "d", "d.x"]
    names = tokens.image_names(Path("codes.npz"), np.array(files), len(files))
    # a.jpg.png is already the third's name, b.png is a folder, and d.png is the short name of the last two
    assert names == ["a.jpg-2.png", "a.png.png", "a.jpg.png", "b.png/c.png", "b.jpg.png", "d-2.png", "d.x.png"]
    files = ["a.jpg", "a.gif", "a.jpg.png/a.jpg"]  # a.jpg.png is a folder
    assert tokens.image_names(Path("codes.npz"), np.array(files), 3) == ["a.jpg-2.png", "a.gif.png", "a.jpg.png/a.png"]


@pytest.mark.parametrize(
    ("name", "more", "problem"),
    [
        ("/".join(["x" * 127] * 7 + ["x" * 128]), "x", "is too long"),  # 1,024 characters
        ("x/" * 49 + "x", "x/", "is too long"),  # 50 parts
        ("é" * 125 + "x", "x", "no file can have the name"),  # with .png, 255 bytes
        ("x" * 255 + "/y", "x", "no file can have the name"),
    ],
)
def test_a_name_at_its_limit_is_taken(name, more, problem):
    assert tokens.image_names(Path("codes.npz"), np.array([name]), 1) == [f"{name}.png"]
    with pytest.raises(UserError, match=problem):
        tokens.image_names(Path("codes.npz"), np.array([more + name]), 1)


SPOILT = {
    "another model": ({"model": "0123456789abcdef"}, "encoded by model '0123456789abcdef'"),
    "no grid": ({"grid": None}, "it has no array grid"),
    "a pickle": ({"files": np.array([Payload()] * 3)}, "files has objects, not numbers or text"),
    "a pickled model": ({"model": np.array(Payload(), dtype=object)}, "model has objects, not numbers or text"),
    "records": ({"grid": np.zeros(2, [("h", "i4"), ("w", "i4")])}, "grid has objects, not numbers or text"),
    "a long grid": ({"grid": np.zeros(2**20, int)}, "its grid has 1,048,576 values"),
    "a grid of text": ({"grid": np.array(["2", "2"])}, "its grid is ['2', '2'], and the model's is [2, 2]"),
    "many models": ({"model": np.array(["x"] * 100)}, "its model has 100 values"),
    "too many codes": ({"num_codes": 8}, "its num_codes is 8, and the model's is 7"),
    "a code too large": ({"codes": np.full((3, 2, 2), 7)}, "codes must be from 0 to 6, not 7 to 7"),
    "a negative code": ({"codes": np.full((3, 2, 2), -1)}, "codes must be from 0 to 6, not -1 to -1"),
    "codes of another grid": ({"codes": np.zeros((3, 4, 1), int)}, "integers [N, 2, 2], not int64 [3, 4, 1]"),
    "codes without rows": ({"codes": np.zeros((0, 2, 2), int)}, "not int64 [0, 2, 2]"),
    "real codes": ({"codes": np.zeros((3, 2, 2))}, "not float64"),
    "another grid": ({"grid": np.array([4, 1])}, "its grid is [4, 1], and the model's is [2, 2]"),
    "another size": ({"image_shape": np.array([3, 8, 9])}, "its image_shape is [3, 8, 9]"),
    "a name upwards": ({"files": np.array(["../x.jpg", "b", "c"])}, "'../x.jpg' leads out of the output folder"),
    "a name up and down": ({"files": np.array(["a", "b/../../x", "c"])}, "'b/../../x' leads out of the output folder"),
    "an absolute name": ({"files": np.array(["a", "b", "/tmp/x.jpg"])}, "'/tmp/x.jpg' leads out of the output folder"),
    "no name": ({"files": np.array(["a", "b", ""])}, "'' leads out of the output folder"),
    "the folder's own name": ({"files": np.array(["a", "b", "."])}, "'.' leads out of the output folder"),
    "a name with a line break": ({"files": np.array(["a", "b", "..\n/../x"])}, "leads out of the output folder"),
    "one name twice": ({"files": np.array(["a", "a", "c"])}, "files must be 3 different names"),
    "too few names": ({"files": np.array(["a", "b"])}, "files must be 3 different names"),
    "half a character": ({"files": np.array(["a", "\ud800", "c"])}, "no file can have the name '\\ud800.png'"),
    "a name too long": ({"files": np.array(["a", "b" * 256, "c"])}, "no file can have the name 'bbb"),
    "a path too long": ({"files": np.array(["a", "b/" * 600 + "x", "c"])}, "is too long; change it in files"),
    "a path too deep": ({"files": np.array(["a", "b/" * 60 + "x", "c"])}, "is too long; change it in files"),
    "numbers for names": ({"files": np.arange(3)}, "files must be 3 different names"),
    "names in rows": ({"files": np.array([["a"], ["b"], ["c"]])}, "files must be 3 different names"),
    "labels that are no integers": ({"labels": np.zeros(3)}, "labels must be 3 integers, or empty"),
    "too few labels": ({"labels": np.zeros(2, int)}, "labels must be 3 integers, or empty"),
    "labels in rows": ({"labels": np.zeros((3, 1), int)}, "labels must be 3 integers, or empty"),
}


@pytest.mark.parametrize("what", SPOILT)
def test_codes_from_a_stranger_are_refused_before_anything_is_written(workdir, capsys, what):
    changes, message = SPOILT[what]
    content = {name: value for name, value in (encoded(workdir) | changes).items() if value is not None}
    np.savez("codes.npz", **content)
    before = sorted(workdir.rglob("*"))
    capsys.readouterr()
    assert run("decode codes.npz --checkpoint run --output back --device cpu") == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.startswith("error: codes.npz: ")
    assert err.count("\n") == 1
    assert sorted(workdir.rglob("*")) == before  # nor was the pickle executed, which would write a file


FOREIGN = {
    "two numbers of codes": {"num_codes": np.array([7, 7])},
    "no number of codes": {"num_codes": np.array([], int)},
    "a number of codes in words": {"num_codes": np.array("7")},
    "half a code": {"num_codes": np.array(7.5)},
    "a grid in words": {"grid": np.array(["2", "2"])},
    "a grid of grids": {"grid": np.array([[2, 2]])},
    "no grid": {"grid": np.array([], int), "codes": np.array(3)},
    "a shape in words": {"image_shape": np.array(["3", "8", "8"])},
    "two models": {"model": np.array(["a", "b"])},
    "a model that is a number": {"model": np.array(3)},
}


@pytest.mark.parametrize("what", FOREIGN)
def test_codes_that_no_model_wrote_are_refused_without_a_model(workdir, what):
    content = {"codes": np.zeros((3, 2, 2), np.uint16), "num_codes": 7, "grid": (2, 2), "image_shape": (3, 8, 8)}
    content |= {"model": "0" * 16, "files": np.array([], dtype=str)}
    np.savez("codes.npz", **content)
    assert tokens.load_codes("codes.npz").num_codes == 7
    np.savez("codes.npz", **content | FOREIGN[what])
    name = next(iter(FOREIGN[what]))
    with pytest.raises(UserError, match=f"codes.npz: its {name} is not as `vqvae encode` writes it; encode again"):
        tokens.load_codes("codes.npz")


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
def test_files_without_codes_are_refused(workdir, capsys, spoil):
    encoded(workdir)
    spoil(workdir / "codes.npz")
    capsys.readouterr()
    assert run("decode codes.npz --checkpoint run --output back --device cpu") == 2
    err = capsys.readouterr().err
    assert re.match("error: codes.npz: (truncated, or not a file that `vqvae encode` wrote|no such file)", err)
    assert err.count("\n") == 1
    assert not Path("back").exists()


def header(shape: str, kind: str = "|u1") -> bytes:
    """The start of an array in an npz file that claims a shape."""
    words = f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}}}".encode()
    return b"\x93NUMPY\1\0" + len(words).to_bytes(2, "little") + words


HOSTILE = {
    "no array": ("codes", b"no array", "the magic string is not correct"),
    "an empty member": ("files", b"", "EOF: reading magic string"),
    "a later version": ("codes", b"\x93NUMPY\x09\0", "codes has an unknown format"),
    "a huge shape": ("codes", header(f"({2**40}, 2, 2)"), "codes has 4,398,046,511,104 bytes, far more than the file"),
    "a shape that overflows": ("codes", header(f"({2**62}, {2**62})"), "far more than the file"),
    "a negative shape": ("codes", header("(-1, 2, 2)"), "far more than the file"),
    "less than claimed": ("codes", header("(9, 2, 2)") + bytes(35), "codes is not as long as its header says"),
    "more than claimed": ("codes", header("(9, 2, 2)") + bytes(37), "codes is not as long as its header says"),
    "an expanding array": ("codes", header(f"({2**25}, 2, 2)") + bytes(2**27), "far more than the file"),
    "many images": ("codes", header(f"({2**22}, 2, 2)") + bytes(2**24), "4,194,304 images are far more than a file"),
    "nothing, often": ("files", header(f"({2**40},)", "<U0"), "far more than the file"),
    "no characters": ("files", header("(3,)", "<U1") + b"\xff" * 12, "files has characters that do not exist"),
    "a call": ("codes", header("(print(3),)"), "malformed node"),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_member_is_refused_in_one_line(workdir, capsys, what):
    name, member, message = HOSTILE[what]
    content = encoded(workdir)
    del content[name]
    np.savez("codes.npz", **content)
    with zipfile.ZipFile("codes.npz", "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(f"{name}.npy", member)
    capsys.readouterr()
    assert run("decode codes.npz --checkpoint run --output back --device cpu") == 2
    out, err = capsys.readouterr()
    assert message in err
    assert err.startswith("error: codes.npz: ")
    assert err.count("\n") == 1
    assert not out
    assert not Path("back").exists()


def test_a_member_that_occurs_twice_is_refused(workdir, capsys):
    content = encoded(workdir)
    np.savez("codes.npz", **content, filez=content["files"])
    Path("codes.npz").write_bytes(Path("codes.npz").read_bytes().replace(b"filez.npy", b"files.npy"))
    assert run("decode codes.npz --checkpoint run --output back --device cpu") == 2
    assert "several members of one name" in capsys.readouterr().err


@pytest.mark.parametrize("method", [zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2])
def test_compression_without_a_bound_is_refused(workdir, capsys, method):
    encoded(workdir)
    with zipfile.ZipFile("codes.npz") as old:
        members = {name: old.read(name) for name in old.namelist()}
    with zipfile.ZipFile("codes.npz", "w", method) as archive:
        for name, member in members.items():
            archive.writestr(name, member)
    assert run("decode codes.npz --checkpoint run --output back --device cpu") == 2
    assert "codes is compressed in an unknown way" in capsys.readouterr().err


def test_a_pipe_is_not_opened(workdir, capsys):
    stored(workdir / "run")
    os.mkfifo("codes.npz")
    assert run("decode codes.npz --checkpoint run --output back --device cpu") == 2
    assert "(not a regular file)" in capsys.readouterr().err


def test_codes_of_one_model_are_refused_by_another(workdir, capsys):
    encoded(workdir)
    torch.manual_seed(1)
    stored(workdir / "other")
    assert run("decode codes.npz --checkpoint other --output back --device cpu") == 2
    assert "use the checkpoint that encoded it" in capsys.readouterr().err


def test_nothing_is_overwritten(workdir, capsys):
    encoded(workdir)
    Path("back").mkdir()
    Path("back/a.png").write_text("mine")
    assert run("decode codes.npz --checkpoint run --output back --device cpu") == 2
    assert "--output back: is not empty" in capsys.readouterr().err
    assert [p.read_text() for p in Path("back").iterdir()] == ["mine"]
    Path("empty").mkdir()
    assert run("decode codes.npz --checkpoint run --output empty --device cpu") == 0
    assert len(list(Path("empty").iterdir())) == 3


def test_a_failed_encoding_leaves_the_old_codes(workdir, capsys):
    encoded(workdir)
    before = Path("codes.npz").read_bytes()
    for path in Path("in").iterdir():
        path.write_bytes(b"no image")
    assert run("encode --checkpoint run --input in --output codes.npz --device cpu") == 2
    errs = capsys.readouterr().err
    assert errs.count("\n") == 4  # one for each file, and the error
    assert "--input in: none of its 3 images can be read" in errs
    assert Path("codes.npz").read_bytes() == before
    assert not list(workdir.glob("*.partial"))


def test_a_model_of_points_takes_and_gives_no_image_files(workdir, capsys):
    encoded(workdir)
    stored(workdir / "plane", (2, 1, 1), nets="mlp", likelihood="gaussian")
    for line, flag in (
        ("encode --input in --output plane.npz --checkpoint plane", "--input in"),
        ("decode codes.npz --output back --checkpoint plane", "--checkpoint plane"),
    ):
        capsys.readouterr()
        assert run(f"{line} --device cpu") == 2
        message = f"error: {flag}: the model's examples are 2x1x1, which image files cannot store; encode a data set"
        assert capsys.readouterr().err.startswith(message)


def test_points_of_the_plane_have_codes_too(workdir):
    model = stored(workdir / "plane", (2, 1, 1), nets="mlp", likelihood="gaussian")
    assert run("encode --checkpoint plane --dataset gauss2d set=2 --limit 9 --output codes.npz --device cpu") == 0
    points = data.load("gauss2d", set=2, limit=9).train.images
    assert np.array_equal(npz("codes.npz")["codes"], model.encode(points).numpy())


def test_the_example_in_the_readme_runs(workdir):
    encoded(workdir)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    (example,) = [block for block in blocks if 'np.load("codes.npz")' in block]
    names: dict = {}
    exec(example, names)
    assert names["samples"].shape == (3, 2, 2)
    (written,) = {p.name for p in workdir.glob("*.npz")} - {"codes.npz"}
    assert run(f"decode {written} --checkpoint run --output decoded --device cpu") == 0
    assert len(list(Path("decoded").iterdir())) == 3


def test_the_command_itself(workdir):
    stored(workdir / "run")
    write_images("in/a.png")
    Path("in/b.jpg").write_bytes(b"no image")
    line = ["-m", "vqvae", "encode", "--checkpoint", "run", "--input", "in", "--output", "codes.npz", "--device", "cpu"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *line], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout == "codes.npz: 1 image, 2x2 codes each, codebook of 7; 1 unreadable, skipped\n"
    assert done.stderr.startswith("'b.jpg': skipped, cannot be read")
    bad = subprocess.run([sys.executable, *line[:-3]], capture_output=True, text=True, check=False, env=environment)
    assert bad.returncode == 2


@pytest.mark.parametrize("command", ["", "encode", "decode", "export"])
def test_help_shows_examples_and_imports_no_heavy_library(command):
    code = (
        f"import sys, runpy; sys.argv = ['vqvae', *'{command} --help'.split()]\n"
        "try: runpy.run_module('vqvae', run_name='__main__')\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch', 'PIL', 'safetensors', 'numpy', 'tqdm'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert re.search(r"^examples?$", done.stdout, re.M)
    assert f"vqvae {command}" in done.stdout
    assert done.stdout.strip().endswith("[]")


@pytest.mark.parametrize("line", ["--help", "-h", "--version"])
def test_the_program_describes_itself(line, capsys):
    assert run(line) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in COMMANDS) or out == f"vqvae {__version__}\n"


def test_shards_are_read_as_one_file_and_finished_ones_are_kept(workdir, capsys):
    stored(workdir / "run")
    write_images(*(f"in/{name}.png" for name in "abcde"))
    encode = "encode --checkpoint run --input in --device cpu --output"
    assert run(f"{encode} whole.npz") == run(f"{encode} codes.npz --shards 3") == 0
    assert "codes-00000-of-00003.npz ... codes-00002-of-00003.npz: 5 images" in capsys.readouterr().out
    shards = [f"codes-0000{n}-of-00003.npz" for n in range(3)]
    assert [npz(shard)["files"].tolist() for shard in shards] == [["a.png", "b.png"], ["c.png", "d.png"], ["e.png"]]
    whole = tokens.load_codes("whole.npz")
    for files in ("codes-*.npz", "codes.npz", shards[::-1], [Path(shard) for shard in shards]):
        found = tokens.load_codes(files)
        assert np.array_equal(found.codes, whole.codes)
        assert (found.files, found.num_codes, found.image_shape) == (whole.files, 7, (3, 8, 8))
        assert found.labels is None
    assert run("decode codes.npz --checkpoint run --output back --device cpu") == 0
    assert run(f"decode {' '.join(shards)} --checkpoint run --output again --device cpu") == 0
    assert sorted(p.name for p in Path("back").iterdir()) == [f"{name}.png" for name in "abcde"]
    assert len(list(Path("again").iterdir())) == 5

    Path(shards[1]).unlink()
    before = Path(shards[0]).stat().st_mtime_ns
    capsys.readouterr()
    assert run(f"{encode} codes.npz --shards 3 --resume") == 0
    assert "5 images, 2x2 codes each, codebook of 7; 2 of 3 files were finished" in capsys.readouterr().out
    assert Path(shards[0]).stat().st_mtime_ns == before
    write_images("in/a.png", size=(9, 9))  # other images
    assert run(f"{encode} codes.npz --shards 3 --resume") == 0
    assert "2 of 3 files" in capsys.readouterr().out
    assert Path(shards[0]).stat().st_mtime_ns > before
    stored(workdir / "run")  # another model
    assert run(f"{encode} codes.npz --shards 3 --resume") == 0
    assert "finished" not in capsys.readouterr().out


def test_shards_that_do_not_belong_together_are_refused(workdir, capsys):
    stored(workdir / "run")
    write_images(*(f"in/{name}.png" for name in "ab"))
    encode = "encode --checkpoint run --input in --device cpu --output"
    assert run(f"{encode} codes.npz --shards 3") == 0  # the last one is empty
    assert npz("codes-00002-of-00003.npz")["files"].dtype.kind == "U"
    assert len(tokens.load_codes("codes.npz").codes) == 2
    Path("codes-00001-of-00003.npz").unlink()
    with pytest.raises(UserError, match="codes-00001-of-00003.npz: this shard is missing; encode again with resume"):
        tokens.load_codes("codes-*.npz")
    assert run(f"{encode} other.npz --shards 2") == 0
    for shard in list(workdir.glob("other-*")):
        shard.rename(shard.name.replace("other", "codes"))
    with pytest.raises(UserError, match="of-00002.npz: does not belong to .*of-00003.npz; name the shards"):
        tokens.load_codes("codes.npz")
    with pytest.raises(UserError, match="codes-00001-of-00002.npz: does not belong to b.npz; name the shards of one"):
        tokens.load_codes(["codes-00001-of-00002.npz", "b.npz"])
    capsys.readouterr()
    assert run("decode codes.npz --checkpoint run --output back --device cpu") == 2
    assert capsys.readouterr().err.count("\n") == 1
    with pytest.raises(UserError, match="nothing-\\*.npz: no such file"):
        tokens.load_codes("nothing-*.npz")
    with pytest.raises(UserError, match="the list of files of codes is empty"):
        tokens.load_codes([])


def test_shards_of_other_models_or_given_twice_are_refused(workdir):
    stored(workdir / "run")
    write_images("in/a.png", "in/b.png")
    encode = "encode --input in --device cpu --shards 2 --output codes.npz --checkpoint"
    assert run(f"{encode} run") == 0
    first, second = (f"codes-0000{n}-of-00002.npz" for n in range(2))
    with pytest.raises(UserError, match=f"{first}: this shard is given twice"):
        tokens.load_codes([first, second, first])
    content = npz(second)
    for name, other in (("model", "0" * 16), ("num_codes", 8), ("grid", (1, 4)), ("image_shape", (3, 16, 4))):
        np.savez(second, **content | {name: other})
        with pytest.raises(UserError, match=f"{second}: its {name} is not that of {first}; encode both again"):
            tokens.load_codes("codes.npz")
    np.savez(second, **content | {"labels": np.array([3])})
    assert tokens.load_codes("codes.npz").labels is None  # those of the first shard are unknown


def test_a_file_that_would_be_read_in_place_of_the_shards_is_not_overlooked(workdir, capsys):
    stored(workdir / "run")
    write_images("in/a.png")
    encode = "encode --checkpoint run --input in --device cpu --output codes.npz"
    assert run(encode) == 0
    assert run(f"{encode} --shards 2") == 2
    assert "--output codes.npz: exists, and would be read in place of its shards" in capsys.readouterr().err
    assert not list(workdir.glob("codes-*"))


def test_shards_of_another_number_would_be_read_together_and_are_refused(workdir, capsys):
    stored(workdir / "run")
    write_images(*(f"in/{name}.png" for name in "abc"))
    encode = "encode --checkpoint run --input in --device cpu --output codes.npz --shards"
    assert run(f"{encode} 3") == 0
    assert run(f"{encode} 2 --resume") == 2
    refusal = "--output codes.npz: codes-00000-of-00003.npz is one of another number of shards, "
    assert refusal in capsys.readouterr().err
    assert len(tokens.load_codes("codes.npz").codes) == 3
    assert run(f"{encode} 3 --resume") == 0
    assert run(encode.removesuffix(" --shards")) == 0  # from now on, this file is read
    assert len(tokens.load_codes("codes.npz").codes) == 3


def test_a_data_set_is_encoded_as_it_was_trained_on(workdir):
    write_images(*(f"in/{i}.png" for i in range(40)))
    write_images(*(f"other/{i}.png" for i in range(8)))
    options = "channels=1 holdout=0.4 resize=pad"
    line = f"train --dataset folder {options} --data-dir in --image-size 16 --hidden 8 --codes 8 --max-steps 1"
    assert run(f"{line} --batch-size 5 --device cpu --name gray") == 0
    encode = "encode --checkpoint logs/gray --dataset folder --device cpu --split test --data-dir"
    assert run(f"{encode} in --output test.npz") == 0
    held_out = data.load("folder", data_dir="in", image_size=16, channels=1, holdout=0.4, resize="pad").test
    model = tokens.restore(checkpoint.read("logs/gray"), "logs/gray", "cpu")
    assert torch.equal(torch.from_numpy(tokens.load_codes("test.npz").codes.astype(int)), model.encode(held_out.images))
    assert run(f"{encode} other --output other.npz") == 0


@pytest.mark.parametrize("count", [5, 1])  # one image leaves a shard empty
def test_labels_of_shards_are_joined(workdir, count):
    model = stored(workdir / "run", (1, 16, 16))
    source = tokens.DatasetSplit(Choice("digits", {}), model, 2, limit=count)
    assert tokens.encode_shards(Path("codes.npz"), model, source, 2).images == count
    assert np.array_equal(tokens.load_codes("codes-*.npz").labels, source.labels.numpy())


def test_arrays_of_every_kind_are_those_that_numpy_reads(tmp_path):
    arrays = {
        "turned": np.asfortranarray(np.arange(6, dtype=np.int16).reshape(2, 3)),
        "swapped": np.arange(3, dtype=">f8"),
        "half": np.ones((), np.float16),
        "flags": np.array([True, False]),
        "nothing": np.zeros((3, 0), np.uint8),
        "text": np.array(["a", "\U0010ffff"]),
        "no text": np.array([], dtype=str),
    }
    np.savez(tmp_path / "a.npz", **arrays)
    long = io.BytesIO()
    np.lib.format.write_array(long, np.arange(5), version=(2, 0))  # whose header may have more than 64 KB
    with zipfile.ZipFile(tmp_path / "a.npz", "a") as archive:
        archive.writestr("long.npy", long.getvalue())
        archive.writestr("notes.txt", "no array")
    with open(tmp_path / "a.npz", "rb") as file:
        assert archives.array_names(file) == [*arrays, "long"]
        found = archives.read_arrays(file, [*arrays, "long"])
    for name, expected in (arrays | {"long": np.arange(5)}).items():
        assert found[name].dtype == expected.dtype
        assert found[name].shape == expected.shape
        assert np.array_equal(found[name], expected)


def test_the_bytes_of_all_arrays_together_are_bounded(tmp_path, monkeypatch):
    np.savez(tmp_path / "a.npz", a=np.zeros(600, np.uint8), b=np.zeros(400, np.uint8))
    monkeypatch.setattr(archives, "RATIO", 0)
    with open(tmp_path / "a.npz", "rb") as file:
        monkeypatch.setattr(archives, "ALWAYS_FITS", 1000)
        assert archives.read_arrays(file, ["a", "b"])["b"].size == 400
        monkeypatch.setattr(archives, "ALWAYS_FITS", 999)
        assert archives.read_arrays(file, ["a"])["a"].size == 600
        with pytest.raises(ValueError, match="b has 400 bytes, far more than the file"):
            archives.read_arrays(file, ["a", "b"])


def test_arrays_may_have_bytes_in_proportion_to_their_file(tmp_path, monkeypatch):
    values = np.arange(25_000, dtype=np.int64)
    np.savez(tmp_path / "a.npz", values=values)
    monkeypatch.setattr(archives, "ALWAYS_FITS", 0)
    with open(tmp_path / "a.npz", "rb") as file:
        assert np.array_equal(archives.read_arrays(file, ["values"])["values"], values)
        monkeypatch.setattr(archives, "RATIO", 0.9)
        with pytest.raises(ValueError, match="200,000 bytes, far more than the file"):
            archives.read_arrays(file, ["values"])
