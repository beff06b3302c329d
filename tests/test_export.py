"""An exported model is the same model, and its programs compute the same for any batch size, without this package."""

import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from tests.checkpoints import stored, unambiguous
from tests.helpers import ROOT, choose, fitting, images
from tests.test_tokens import run, write_images
from vqvae import checkpoint, load
from vqvae.bottlenecks import BOTTLENECKS
from vqvae.checkpoint import UNKNOWN, seal, weights_checksum
from vqvae.errors import UserError
from vqvae.export import export
from vqvae.programs import HALVES, INTERFACE, agreement, write_program
from vqvae.registry import Choice

MODELS = {  # tracing takes seconds per model, so most of them have the nets with the fewest operations
    **{name: fitting(name) | {"nets": "mlp"} for name in BOTTLENECKS},
    **{
        name: {"bottleneck": choose("bottleneck", name, init="kmeans"), "nets": "mlp"}  # otherwise they use one code
        for name in ("deterministic", "categorical", "gumbel")
    },
    "vq": {"bottleneck": "vq"},
    "hierarchy": {"bottleneck": "hierarchy"},
    "codes of one cell": {"nets": "conv-vae"},
    "flow prior": {"nets": "mlp", "bottleneck": "gaussian", "prior": "made-flow"},
    "points": {"shape": (2, 1, 1), "nets": "mlp", "likelihood": "gaussian"},
    "softmax": {"likelihood": "softmax256", "prior": "transformer"},
}


@pytest.fixture
def workdir(tmp_path, monkeypatch):
    """An empty folder, made the current one."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def examples(model, count: int) -> torch.Tensor:
    return images(count, model.image_shape) if model.shows_images else torch.randn(count, *model.image_shape)


@pytest.mark.parametrize("kind", MODELS)
def test_an_exported_model_and_its_programs_are_the_same_model(workdir, kind, capsys):
    model = stored(workdir / "run", **MODELS[kind])
    assert run("export --checkpoint run --output exported") == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 4
    assert "on 5 random examples" in out
    files = {p.name for p in Path("exported").iterdir()}
    assert files == {"model.safetensors", "config.json", "encoder.pt2", "decoder.pt2", "README.md"}
    assert json.loads(Path("exported/config.json").read_text())["checksum"] == weights_checksum(model)
    check_loaded(model)
    check_programs(model)


def check_loaded(model):
    """Check that the exported model has the weights of the model and computes the same, bit for bit."""
    back = load("exported")
    assert not back.training
    assert back.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(value, back.state_dict()[name]) for name, value in model.state_dict().items())
    inputs = examples(model, 4)
    assert torch.equal(model.reconstruct(inputs), back.reconstruct(inputs))


def check_programs(model):
    """Check that the programs compute what the model does for any batch size, and describe inputs and outputs."""
    encoder, decoder = (torch.export.load(f"exported/{name}.pt2").module() for name in HALVES)
    inputs = examples(model, 200)
    if model.discrete is not None:
        inputs = unambiguous(model, inputs, 20)  # other strides round otherwise, which cannot change these codes
    for batch in inputs[:20].split([1, 2, 3, 14]):
        latent = encoder(batch)
        if model.discrete is not None:
            assert latent.dtype == torch.int64
            assert torch.equal(latent, model.encode(batch))
            expected = model.decode(latent)
        else:
            assert torch.allclose(latent, model.posterior_mean(batch), atol=1e-5)
            expected = model.decode_latents(latent)
        assert torch.allclose(decoder(latent), expected, atol=1e-5)
        assert not decoder(latent).requires_grad
    if model.discrete is not None:
        assert len(latent.unique()) > 2
        check_range(decoder, latent, model.discrete.num_codes)
    about = json.loads(Path("exported/config.json").read_text())["programs"]
    for name, taken, returned in (("encoder.pt2", inputs, latent), ("decoder.pt2", latent, decoder(latent))):
        extra = {INTERFACE: ""}
        torch.export.load(f"exported/{name}", extra_files=extra)
        assert json.loads(extra[INTERFACE]) == about[name]
        check_described(about[name]["input"], taken)
        check_described(about[name]["output"], returned)


def check_range(decoder, codes, num_codes: int):
    """Check that the program refuses the codes that the model refuses."""
    for wrong in (-1, num_codes):
        spoiled = codes.clone()
        spoiled[-1, 0, 0] = wrong
        with pytest.raises(RuntimeError, match=f"codes must be from 0 to {num_codes - 1}"):
            decoder(spoiled)


def check_described(about: dict, value: torch.Tensor):
    assert about["shape"] == ["B", *value.shape[1:]]
    assert f"torch.{about['dtype']}" == str(value.dtype)
    if about["range"]:
        assert about["range"][0] <= value.min() <= value.max() <= about["range"][1]


def test_a_program_takes_other_strides_than_it_was_traced_with(workdir):
    model = stored(workdir / "run", **MODELS["gaussian"])
    half = HALVES["decoder"](model)
    wide = torch.randn(3, 2 * model.bottleneck.code_dim, 1, 1)
    part = wide.chunk(2, dim=1)[0]
    for example, other in ((part, part.clone()), (part.clone(), part)):
        write_program(half, example, workdir / "decoder.pt2", {})
        agreement(half, workdir / "decoder.pt2", other)


@pytest.fixture(scope="module")
def exported_once(tmp_path_factory) -> Path:
    """A folder with a model in `run` and its export in `exported`, shared because exporting takes seconds."""
    folder = tmp_path_factory.mktemp("once")
    torch.manual_seed(0)
    stored(folder / "run")
    assert run(f"export --checkpoint {folder / 'run'} --output {folder / 'exported'}") == 0
    return folder


@pytest.fixture
def exported(exported_once, workdir) -> Path:
    """A copy of `exported_once`, made the current folder."""
    shutil.copytree(exported_once, workdir, dirs_exist_ok=True)
    return workdir


def test_programs_contain_only_weights_that_they_use_and_no_paths_of_this_machine(exported):
    for name, absent in (("encoder.pt2", "model.decoder"), ("decoder.pt2", "model.encoder")):
        weights = torch.export.load(exported / "exported" / name).state_dict
        assert weights
        assert not [key for key in weights if key.startswith((absent, "model.prior")) or key.endswith(".totals")]
        assert b"autoencoder.py" not in (exported / "exported" / name).read_bytes()


def test_programs_need_only_torch(exported):
    model = load("run")
    inputs = unambiguous(model, images(16), 3)
    torch.save({"images": inputs, "codes": model.encode(inputs)}, "expected.pt")
    code = (
        "import sys, torch\n"
        "expected = torch.load('expected.pt')\n"
        "codes = torch.export.load('exported/encoder.pt2').module()(expected['images'])\n"
        "print(torch.equal(codes, expected['codes']), 'vqvae' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "True False\n"


def test_an_exported_model_encodes_and_decodes_as_its_checkpoint_does(exported):
    write_images("in/a.png", "in/b.png", "in/c.png")
    assert run("export --checkpoint exported --output again") == 0
    assert run("encode --checkpoint run --input in --output codes.npz --device cpu") == 0
    assert run("decode codes.npz --checkpoint exported --output back --device cpu") == 0
    assert run("encode --checkpoint again --input in --output again.npz --device cpu") == 0
    assert run("decode again.npz --checkpoint run --output back2 --device cpu") == 0
    assert len(list(Path("back").iterdir())) == 3
    for path in Path("back").iterdir():
        assert path.read_bytes() == Path("back2", path.name).read_bytes()


def test_a_folder_with_a_checkpoint_counts_as_the_folder_of_a_run(exported):
    torch.manual_seed(1)
    other = stored(exported / "exported")
    assert weights_checksum(other) != weights_checksum(load("run"))
    assert weights_checksum(load("exported")) == weights_checksum(other)


def test_a_folder_that_is_not_empty_is_refused(workdir, capsys):
    stored(workdir / "run")
    before = Path("run/checkpoint.pt").read_bytes()
    assert run("export --checkpoint run --output run") == 2
    assert "--output run: is not empty" in capsys.readouterr().err
    assert [p.name for p in Path("run").iterdir()] == ["checkpoint.pt"]
    assert Path("run/checkpoint.pt").read_bytes() == before


def rewrite(**changes):
    """A function that replaces entries of config.json, or removes those that are None, and corrects its checksum."""

    def spoil(folder: Path) -> None:
        path = folder / "config.json"
        content = json.loads(path.read_text()) | {"sha256": UNKNOWN} | changes
        text = json.dumps({key: value for key, value in content.items() if value is not None})
        path.write_text(seal(text) if UNKNOWN in text else text)

    return spoil


def keep(name: str, count: int):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:count])


def reweigh(change):
    """A function that changes the dictionary of weights and corrects their checksum."""

    def spoil(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors")
        correct_checksum(folder)

    return spoil


def correct_checksum(folder: Path) -> None:
    raw = (folder / "model.safetensors").read_bytes()
    rewrite(weights_sha256=hashlib.sha256(raw).hexdigest())(folder)


def claim_too_much(folder: Path) -> None:
    """Give a weight a shape of more values than the file has."""
    path = folder / "model.safetensors"
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    next(entry for key, entry in header.items() if key != "__metadata__")["shape"] = [2**40]
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + size :])
    correct_checksum(folder)


def pipe(name: str):
    def spoil(folder: Path) -> None:
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return spoil


DATA = {"name": "none", "shape": [3, 8, 8], "variance": 0.06, "classes": [], "note": ""}


DAMAGE = {
    "no settings": (lambda folder: (folder / "config.json").unlink(), "config.json: cannot be read"),
    "settings cut short": (keep("config.json", 50), "config.json: cannot be read"),
    "settings of bytes": (lambda folder: (folder / "config.json").write_bytes(b"\xff\xfe"), "config.json: cannot be"),
    "settings too deep": (lambda folder: (folder / "config.json").write_text("[" * 100_000), "config.json: cannot be"),
    "a list": (lambda folder: (folder / "config.json").write_text("[]"), "not the config.json of an exported model"),
    "a run's settings": (rewrite(format=None), "not the config.json of an exported model"),
    "an earlier format": (rewrite(format=1), "install vqvae 0.1 to read it"),
    "a later format": (rewrite(format=3), "written by a later version of vqvae"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "no such file"),
    "empty weights": (keep("model.safetensors", 0), "model.safetensors: cannot be read"),
    "a start of weights": (keep("model.safetensors", 100), "model.safetensors: cannot be read"),
    "weights cut short": (keep("model.safetensors", -4), "model.safetensors: cannot be read"),
    "a pipe for weights": (pipe("model.safetensors"), "model.safetensors: cannot be read (not a regular file)"),
    "a pipe for settings": (pipe("config.json"), "config.json: cannot be read (not a regular file)"),
    "a weight too many": (claim_too_much, "model.safetensors: cannot be read"),
    "a weight of a long name": (
        reweigh(lambda weights: weights.update({"x" * 10_000: torch.zeros(1)})),
        "x... (10,000 characters) should be absent",
    ),
    "a weight lost": (reweigh(lambda weights: weights.popitem()), "its weights do not fit the model"),
    "halves": (
        reweigh(lambda weights: weights.update({key: value.half() for key, value in weights.items()})),
        "should be float32 [4, 3, 4, 4] and is float16 [4, 3, 4, 4]",
    ),
    "other weights": (
        lambda folder: save_file({"x": torch.zeros(3)}, folder / "model.safetensors"),
        "it does not match the checksum in config.json",
    ),
    "without a checksum": (rewrite(sha256=None), "config.json: damaged, or changed"),
    "a wrong checksum": (rewrite(sha256="0" * 63), "config.json: damaged, or changed"),
    "settings edited": (
        lambda folder: (folder / "config.json").write_text((folder / "config.json").read_text() + " "),
        "config.json: damaged, or changed",
    ),
    "no model": (rewrite(config={"nets": 3}), "config.json: its config lacks augment"),
    "data of nothing": (rewrite(data={}), "its data lack classes, name, note, shape, variance"),
    **{
        f"the shape {shape}": (rewrite(data=DATA | {"shape": shape}), "its data.shape must be")
        for shape in ("abc", [3, 8], [], [3, 0, 8], [3, 8.5, 8], [3, 8, 2**40], [True, 8, 8])
    },
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damage_to_an_exported_folder_is_named_in_one_line(workdir, what):
    model = stored(workdir / "run")
    Path("exported").mkdir()
    next(export(checkpoint.read("run"), model, Path("exported")))  # the first step writes config.json and the weights
    assert weights_checksum(load("exported")) == weights_checksum(model)
    spoil, message = DAMAGE[what]
    spoil(workdir / "exported")
    with pytest.raises(UserError) as caught:
        load("exported")
    assert message in str(caught.value)
    assert str(caught.value).startswith("exported")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_commands_that_need_a_run_say_that_a_folder_has_an_exported_model(workdir, capsys):
    model = stored(workdir / "run")
    Path("exported").mkdir()
    next(export(checkpoint.read("run"), model, Path("exported")))
    for line, message in (
        ("train --resume exported", "--resume exported: an exported model, which has no training to resume; --init"),
        ("train --evaluate --checkpoint exported", "--checkpoint exported: an exported model; this needs the check"),
        ("visualize --checkpoint exported", "exported: an exported model; this needs the checkpoint.pt of its run"),
    ):
        assert run(line) == 2
        assert message in capsys.readouterr().err


def test_a_flipped_bit_of_an_exported_folder_is_refused(workdir):
    model = stored(workdir / "run")
    Path("exported").mkdir()
    next(export(checkpoint.read("run"), model, Path("exported")))
    draw = random.Random(0)
    for path in sorted(Path("exported").iterdir()):
        raw = path.read_bytes()
        for _ in range(60):
            at, bit = draw.randrange(len(raw)), draw.randrange(8)
            path.write_bytes(raw[:at] + bytes([raw[at] ^ 1 << bit]) + raw[at + 1 :])
            with pytest.raises(UserError) as caught:
                load("exported")
            assert str(caught.value).startswith(str(path)), (at, bit)
            assert "\n" not in str(caught.value)
        path.write_bytes(raw)


@pytest.mark.parametrize("kind", ["vq", "gaussian"])
@pytest.mark.parametrize("half", HALVES)
def test_a_program_that_disagrees_with_the_model_is_deleted(workdir, half, kind):
    model = stored(workdir / "run", **MODELS[kind])
    torch.manual_seed(1)
    other = stored(workdir / "other", **MODELS[kind])
    path = workdir / f"{half}.pt2"
    inputs = images(64) if half == "encoder" else HALVES["encoder"](model)(images(64))
    write_program(HALVES[half](other), inputs, path, {})
    assert "on 64 random examples" in agreement(HALVES[half](other), path, inputs)
    with pytest.raises(UserError, match=f"{half}.pt2: .* deleted, because it is not the model"):
        agreement(HALVES[half](model), path, inputs)
    assert not path.exists()


class DependsOnValues(nn.Module):
    def forward(self, images):
        return images if images.float().mean() > 1 else -images  # a branch that no exported program can take


def test_a_model_that_cannot_be_exported_is_named_in_one_line(workdir):
    with pytest.raises(UserError, match="encoder.pt2: cannot be made from this model") as caught:
        write_program(DependsOnValues(), images(2), workdir / "encoder.pt2", {})
    assert "\n" not in str(caught.value)
    assert not list(workdir.iterdir())


def test_export_does_not_change_the_model(workdir):
    model = stored(workdir / "run")
    grads = [p.requires_grad for p in model.parameters()]
    Path("exported").mkdir()
    lines = list(export(checkpoint.read("run"), model, Path("exported")))
    assert len(lines) == 4
    assert [p.requires_grad for p in model.parameters()] == grads
    assert next(model.encoder.parameters()).is_contiguous(memory_format=torch.channels_last)


ONNX = {"vqgan": {"nets": Choice("vqgan", {"hidden": 8, "ch_mult": "1,2"})}, "continuous": MODELS["gaussian"]}


@pytest.mark.parametrize("kind", ONNX)
def test_onnx_programs_compute_what_the_model_computes_for_any_batch(workdir, kind, capsys):
    onnx, runtime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = stored(workdir / "run", (3, 4, 6), **ONNX[kind])
    assert run("export --checkpoint run --output exported --format onnx") == 0
    assert "on 5 random examples, in batches of 1, 2, 5" in capsys.readouterr().out
    names = {path.name for path in Path("exported").iterdir()}
    assert names == {"model.safetensors", "config.json", "encoder.onnx", "decoder.onnx", "README.md"}
    check_loaded(model)
    about = json.loads(Path("exported/config.json").read_text())["programs"]
    inputs = examples(model, 40)
    inputs = inputs[:5] if model.discrete is None else unambiguous(model, inputs, 5)
    for half in HALVES:
        path, outputs = Path(f"exported/{half}.onnx"), HALVES[half](model)(inputs)
        session = runtime.InferenceSession(path)
        for count in (1, 2, 5):
            name = session.get_inputs()[0].name
            found = torch.from_numpy(session.run(None, {name: inputs[:count].numpy()})[0])
            assert torch.allclose(found, outputs[:count], atol=1e-4)
        proto = onnx.load(path)
        described = json.loads(next(p.value for p in proto.metadata_props if p.key == INTERFACE))
        assert described == about[path.name]
        for end, value, values in (
            ("input", session.get_inputs()[0], inputs),
            ("output", session.get_outputs()[0], outputs),
        ):
            assert value.shape == described[end]["shape"]
            check_described(described[end], values)
        raw = path.read_bytes()
        assert b"autoencoder.py" not in raw
        assert str(ROOT).encode() not in raw
        inputs = outputs


def test_without_the_extra_the_format_onnx_is_one_line_and_nothing_is_written(workdir, capsys, monkeypatch):
    stored(workdir / "run")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    for name in ("onnx", "onnxruntime"):
        monkeypatch.setitem(sys.modules, name, sys.modules.get(name, sys))
    assert run("export --checkpoint run --output exported --format onnx") == 2
    line = "error: --format onnx: needs onnxscript, which is not installed; pip install 'vqvae[onnx]'\n"
    assert capsys.readouterr().err == line
    assert not Path("exported").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--format tflite", "--format tflite: must be one of pt2, onnx, diffusers"),
        ("--license two words", "--license two words"),
        ("--license a:b", "--license a:b: must be an identifier such as mit or cc-by-4.0"),
    ],
)
def test_a_bad_option_of_export_is_one_line(workdir, words, message, capsys):
    assert run(f"export --checkpoint run --output exported {words}") == 2
    assert message in capsys.readouterr().err
