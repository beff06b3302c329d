"""A model as plain files is the same model; its programs give what it gives, for any batch, without this package."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from tests.test_autoencoder import choose, fitting, pictures
from tests.test_tokens import encoded, run, stored
from vqvae import checkpoint, load
from vqvae.bottlenecks import BOTTLENECKS
from vqvae.errors import UserError
from vqvae.export import HALVES, agreement, export, write_program
from vqvae.stage_two import weights_checksum

MODELS = {
    **{name: fitting(name) for name in BOTTLENECKS},
    **{
        name: {"bottleneck": choose("bottleneck", name, init="kmeans")}  # random features then have several codes
        for name in ("deterministic", "categorical", "gumbel")
    },
    "codes of one cell": {"nets": "conv-vae"},
    "flow prior": {"nets": "mlp", "bottleneck": "gaussian", "prior": "made-flow"},
    "points": {"shape": (2, 1, 1), "nets": "mlp", "likelihood": "gaussian"},
    "softmax": {"likelihood": "softmax256", "prior": "transformer"},
}


@pytest.fixture
def there(tmp_path, monkeypatch):
    """An empty folder to run in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def examples(model, count: int) -> torch.Tensor:
    return pictures(count, model.image_shape) if model.shows_pictures else torch.randn(count, *model.image_shape)


@pytest.mark.parametrize("kind", MODELS)
def test_what_is_exported_loads_as_the_same_model_bit_for_bit(there, kind, capsys):
    model = stored(there / "run", **MODELS[kind])
    assert run("export --checkpoint run --output exported") == 0
    said = capsys.readouterr().out
    assert said.count("\n") == 3
    assert "on 5 random examples" in said
    files = {p.name for p in Path("exported").iterdir()}
    assert files == {"model.safetensors", "config.json", "encoder.pt2", "decoder.pt2"}
    back = load("exported")
    assert not back.training
    assert back.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(value, back.state_dict()[name]) for name, value in model.state_dict().items())
    images, outputs = examples(model, 4), []
    for either in (model, back):
        torch.manual_seed(0)  # continuous latents are drawn
        outputs.append(either.reconstruct(images))
    assert torch.equal(*outputs)
    assert json.loads(Path("exported/config.json").read_text())["checksum"] == weights_checksum(model)


@pytest.mark.parametrize("kind", MODELS)
def test_programs_give_what_the_model_gives_for_any_batch(there, kind):
    model = stored(there / "run", **MODELS[kind])
    assert run("export --checkpoint run --output exported") == 0
    encoder, decoder = (torch.export.load(f"exported/{name}").module() for name in HALVES)
    discrete = model.bottleneck.num_codes is not None
    for count in (1, 2, 3, 64):
        images = examples(model, count)
        codes = encoder(images)
        assert codes.dtype == (torch.int64 if discrete else torch.float32)
        expected = model.encode(images) if discrete else model.posterior_mean(images)
        back = model.decode(codes) if discrete else model.pictures(codes)
        if discrete:
            assert (codes == expected).float().mean() > 0.99  # random features can be nearly as near to two codes
        else:
            assert torch.allclose(codes, expected, atol=1e-5)
        assert torch.allclose(decoder(codes), back, atol=1e-5)
        assert not decoder(codes).requires_grad
    if discrete:
        assert kind in ("points", "codes of one cell") or len(codes.unique()) > 2


def test_a_program_takes_other_strides_than_those_it_was_traced_with(there):
    model = stored(there / "run", **MODELS["gaussian"])
    half = HALVES["decoder.pt2"](model)
    wide = torch.randn(3, 2 * model.bottleneck.code_dim, 1, 1)
    part = wide.chunk(2, dim=1)[0]
    for example, other in ((part, part.clone()), (part.clone(), part)):
        write_program(half, example, there / "decoder.pt2")
        agreement(half, there / "decoder.pt2", other)


def test_programs_hold_what_they_use_and_nothing_of_this_machine(there):
    stored(there / "run")
    assert run("export --checkpoint run --output exported") == 0
    for name, absent in (("encoder.pt2", "model.decoder"), ("decoder.pt2", "model.encoder")):
        held = torch.export.load(f"exported/{name}").state_dict
        assert held
        assert not [key for key in held if key.startswith((absent, "model.prior", "model.bottleneck.totals"))]
        assert b"autoencoder.py" not in Path("exported", name).read_bytes()


def test_programs_need_torch_alone(there):
    model = stored(there / "run")
    images = pictures(3)
    torch.save({"images": images, "codes": model.encode(images)}, "expected.pt")
    assert run("export --checkpoint run --output exported") == 0
    code = (
        "import sys, torch\n"
        "held = torch.load('expected.pt')\n"
        "codes = torch.export.load('exported/encoder.pt2').module()(held['images'])\n"
        "print(torch.equal(codes, held['codes']), 'vqvae' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "True False\n"


def test_an_exported_model_encodes_and_decodes_as_its_checkpoint_does(there):
    encoded(there)
    assert run("export --checkpoint run --output exported") == 0
    assert run("export --checkpoint exported --output again") == 0
    assert run("decode codes.npz --checkpoint exported --output back --device cpu") == 0
    assert run("encode --checkpoint again --input in --output again.npz --device cpu") == 0
    assert run("decode again.npz --checkpoint run --output back2 --device cpu") == 0
    for path in Path("back").iterdir():
        assert path.read_bytes() == Path("back2", path.name).read_bytes()


def test_a_folder_with_a_checkpoint_is_a_runs(there):
    stored(there / "run")
    assert run("export --checkpoint run --output exported") == 0
    torch.manual_seed(1)
    other = stored(there / "exported")
    assert weights_checksum(load("exported")) == weights_checksum(other)


def test_a_full_folder_is_refused(there, capsys):
    stored(there / "run")
    before = Path("run/checkpoint.pt").read_bytes()
    assert run("export --checkpoint run --output run") == 2
    assert "--output run: is not empty" in capsys.readouterr().err
    assert [p.name for p in Path("run").iterdir()] == ["checkpoint.pt"]
    assert Path("run/checkpoint.pt").read_bytes() == before


def rewrite(**changes):
    """A way to spoil config.json: entries replaced, or removed with None."""

    def spoil(folder: Path) -> None:
        path = folder / "config.json"
        held = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({key: value for key, value in held.items() if value is not None}))

    return spoil


def keep(name: str, count: int):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:count])


def lose_a_weight(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights.popitem()
    save_file(weights, folder / "model.safetensors")


DAMAGE = {
    "no settings": (lambda folder: (folder / "config.json").unlink(), "config.json: cannot be read"),
    "settings cut short": (keep("config.json", 50), "config.json: cannot be read"),
    "settings of bytes": (lambda folder: (folder / "config.json").write_bytes(b"\xff\xfe"), "config.json: cannot be"),
    "settings too deep": (lambda folder: (folder / "config.json").write_text("[" * 100_000), "config.json: cannot be"),
    "a list": (lambda folder: (folder / "config.json").write_text("[]"), "not the settings of an exported model"),
    "a run's settings": (rewrite(format=None), "not the settings of an exported model"),
    "a later format": (rewrite(format=2), "format 2, but this version reads format 1"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "no such file"),
    "empty weights": (keep("model.safetensors", 0), "model.safetensors: cannot be read"),
    "a start of weights": (keep("model.safetensors", 100), "model.safetensors: cannot be read"),
    "weights cut short": (keep("model.safetensors", -4), "model.safetensors: cannot be read"),
    "a weight lost": (lose_a_weight, "its weights are those of another model"),
    "no model": (rewrite(config={}), "its settings are not those of a model"),
    "a shape of text": (rewrite(data={"shape": "abc", "variance": 1, "classes": []}), "its settings are not those"),
    "a short shape": (rewrite(data={"shape": [3, 8], "variance": 1, "classes": []}), "its settings are not those"),
    "an empty shape": (rewrite(data={"shape": [], "variance": 1, "classes": []}), "its settings are not those"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damaged_folders_are_named_in_one_line(there, what):
    model = stored(there / "run")
    Path("exported").mkdir()
    next(export(checkpoint.read("run"), model, Path("exported")))  # the model's own files, which come first
    assert weights_checksum(load("exported")) == weights_checksum(model)
    spoil, message = DAMAGE[what]
    spoil(there / "exported")
    with pytest.raises(UserError) as caught:
        load("exported")
    assert message in str(caught.value)
    assert str(caught.value).startswith("--checkpoint exported")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["vq", "gaussian"])
@pytest.mark.parametrize("half", HALVES)
def test_a_program_that_is_not_the_model_is_found_out_and_removed(there, half, kind):
    model = stored(there / "run", **MODELS[kind])
    torch.manual_seed(1)
    other = stored(there / "other", **MODELS[kind])
    images = pictures(64)
    path = there / half
    inputs = images if half == "encoder.pt2" else HALVES["encoder.pt2"](model)(images)
    write_program(HALVES[half](other), inputs, path)
    assert "on 64 random examples" in agreement(HALVES[half](other), path, inputs)
    with pytest.raises(UserError, match=f"{half}: .* removed, since it is not the model"):
        agreement(HALVES[half](model), path, inputs)
    assert not path.exists()


class Wavers(nn.Module):
    def forward(self, pictures):
        return pictures if pictures.float().mean() > 1 else -pictures  # what no fixed program can do


def test_what_cannot_be_exported_is_said_in_one_line(there):
    with pytest.raises(UserError, match="wavers.pt2: cannot be made of this model") as caught:
        write_program(Wavers(), pictures(2), there / "wavers.pt2")
    assert "\n" not in str(caught.value)
    assert not list(there.iterdir())


def test_export_leaves_the_model_as_it_was(there):
    model = stored(there / "run")
    grads = [p.requires_grad for p in model.parameters()]
    Path("exported").mkdir()
    lines = list(export(checkpoint.read("run"), model, Path("exported")))
    assert len(lines) == 3
    assert [p.requires_grad for p in model.parameters()] == grads
    assert next(model.encoder.parameters()).is_contiguous(memory_format=torch.channels_last)
