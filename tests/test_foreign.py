"""Folders of diffusers' VQModel are written and read, and models that do not fit are refused."""

import copy
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.checkpoints import stored, unambiguous
from tests.helpers import images
from tests.test_tokens import run
from vqvae import checkpoint, foreign, load
from vqvae.autoencoder import unit_range
from vqvae.errors import UserError
from vqvae.foreign import DEFAULTS, SETTINGS, WEIGHTS, write
from vqvae.programs import TOLERANCE
from vqvae.registry import Choice

SHAPE = (3, 16, 24)
SMALL = Choice("vqgan", {"hidden": 8, "features": 6})
OTHER = Choice(
    "vqgan",
    {"hidden": 8, "ch_mult": "1,2,1,2", "num_res_blocks": 2, "attention": "2,8", "middle_attention": False,
     "groups": 4, "features": 5},
)  # fmt: skip
MODELS = {
    "centered": {"nets": SMALL},
    "symmetric": {"nets": SMALL, "likelihood": Choice("mse", {"pixels": "symmetric"})},
    "another shape": {"nets": OTHER},
    "no projection": {"nets": SMALL, "bottleneck": Choice("vq", {"num_codes": 7, "code_dim": 6, "projection": False})},
    "by gradient": {"nets": SMALL, "bottleneck": Choice("vq", {"num_codes": 7, "code_dim": 4, "codebook": "gradient"})},
    "simvq": {"nets": SMALL, "bottleneck": "simvq"},
}


@pytest.fixture(autouse=True)
def workdir(tmp_path, monkeypatch):
    """An empty folder, made the current one."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)


def exported(**names):
    """A model in `run`, exported to `there`."""
    model = stored(Path("run"), SHAPE, **names)
    assert run("export --checkpoint run --output there --format diffusers") == 0
    return model


@torch.no_grad()
def theirs(model, x):
    """The codes `[B, h, w]` and the images in [0, 1] that diffusers computes for images x in [0, 1]."""
    pixels = 2 * x - 1
    latents = model.encode(pixels).latents
    codes = model.quantize(latents)[2][2].view(len(x), *latents.shape[2:])
    out = model.decode(latents).sample
    shape = (*codes.shape, latents.shape[1])
    if model.config.lookup_from_codebook:
        again = model.decode(codes.flatten(), force_not_quantize=True, shape=shape).sample
        assert torch.allclose(out, again, atol=1e-5)
    return codes, ((out + 1) / 2).clamp(0, 1)


@pytest.mark.parametrize("kind", MODELS)
def test_diffusers_opens_what_is_exported_and_computes_the_same(kind, capsys):
    diffusers = pytest.importorskip("diffusers")
    model = exported(**MODELS[kind])
    assert "gives 100% of the model's codes" in capsys.readouterr().out
    back, about = diffusers.VQModel.from_pretrained("there", output_loading_info=True)
    assert not any(about.values())  # no weight is missing or left over
    inputs = unambiguous(model, images(200, SHAPE), 4)
    codes, out = theirs(back.eval(), unit_range(inputs))
    assert torch.equal(codes, model.encode(inputs))
    assert len(codes.unique()) > 2
    assert torch.allclose(out, model.decode(codes), atol=1e-5)


@pytest.mark.parametrize("kind", MODELS)
def test_an_exported_folder_is_read_back_as_the_same_model(kind):
    model = exported(**MODELS[kind])
    back = load("there")
    inputs = unambiguous(model, images(200, SHAPE), 4)
    assert torch.equal(back.encode(inputs), model.encode(inputs))
    assert torch.allclose(back.reconstruct(inputs), model.reconstruct(inputs), atol=1e-5)
    assert back.data_variance == model.data_variance
    names = {path.name for path in Path("there").iterdir()}
    assert names == {SETTINGS, WEIGHTS, "README.md"}


@pytest.mark.parametrize("half", ["encoder", "decoder"])
def test_an_exported_folder_that_is_not_the_model_is_refused(half, monkeypatch, capsys):
    stored(Path("run"), SHAPE, nets=SMALL)

    @torch.no_grad()
    def spoil(content, model, folder):
        other = copy.deepcopy(model)
        for weight in getattr(other, half).parameters():
            weight.normal_()
        write(content, other, folder)

    monkeypatch.setattr(foreign, "write", spoil)
    assert run("export --checkpoint run --output there --format diffusers") == 2
    same, error = re.search(
        r"there: what was written is not the model \((\d+)% of its codes, images off by (.*)\)", capsys.readouterr().err
    ).groups()
    assert (int(same) >= 99, float(error) <= TOLERANCE) == (half == "decoder", half == "encoder")


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"block_out_channels": (8, 16, 8), "down_block_types": ("AttnDownEncoderBlock2D",) * 3,
         "up_block_types": ("AttnUpDecoderBlock2D",) * 3, "layers_per_block": 2, "vq_embed_dim": 5,
         "mid_block_add_attention": False, "norm_num_groups": 4, "latent_channels": 6},
    ],
)  # fmt: skip
def test_a_model_of_diffusers_is_read_and_computes_the_same(settings):
    diffusers = pytest.importorskip("diffusers")
    small = {"block_out_channels": (8, 8, 8), "down_block_types": ("DownEncoderBlock2D",) * 3,
             "up_block_types": ("UpDecoderBlock2D",) * 3, "norm_num_groups": 8, "sample_size": 16,
             "num_vq_embeddings": 9}  # fmt: skip
    model = diffusers.VQModel(**(small | settings)).eval()
    with torch.no_grad():  # the default codes are so small that the image hardly depends on them
        features = model.encode(torch.rand(40, 3, 16, 16) * 2 - 1).latents.movedim(1, -1).flatten(0, 2)
        model.quantize.embedding.weight.copy_(features[torch.randperm(len(features))[:9]])
    model.save_pretrained("there")
    back = load("there")
    inputs = unambiguous(back, images(400, (3, 16, 16)), 4)
    codes, out = theirs(model, unit_range(inputs))
    assert torch.equal(codes, back.encode(inputs))
    assert len(codes.unique()) > 2
    assert torch.allclose(out, back.decode(codes), atol=1e-5)


def test_weights_with_the_names_of_earlier_versions_and_in_half_precision_are_read():
    exported(nets=SMALL)
    before = load("there")
    weights = {}
    for name, value in load_file(f"there/{WEIGHTS}").items():
        for now, then in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
            name = name.replace(f".{now}.", f".{then}.")
        weights[name] = value.half()
    save_file(weights, f"there/{WEIGHTS}")
    after = load("there")
    for name, value in before.state_dict().items():
        assert torch.equal(value.half().float(), after.state_dict()[name]), name


@pytest.fixture(scope="module")
def once(tmp_path_factory):
    """An exported folder."""
    folder = tmp_path_factory.mktemp("once")
    model = stored(folder / "run", SHAPE, nets=SMALL)
    (folder / "there").mkdir()
    write(checkpoint.read(folder / "run"), model, folder / "there")
    return folder / "there"


def change(**entries):
    path = Path("there", SETTINGS)
    settings = json.loads(path.read_text()) | entries
    path.write_text(json.dumps({key: value for key, value in settings.items() if value is not ...}))


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"_class_name": "AutoencoderKL"}, "config.json: describes AutoencoderKL; name the folder of a VQModel"),
        ({"_class_name": ...}, "config.json: describes no model"),
        ({"act_fn": "relu"}, "config.json: act_fn=relu: the nets vqgan have silu only"),
        ({"norm_type": "spatial"}, "norm_type=spatial: the nets vqgan have group norm only"),
        ({"out_channels": 4}, "out_channels=4: must equal in_channels"),
        ({"in_channels": "3"}, "in_channels=3: must be a whole number"),
        ({"latent_channels": 0}, "latent_channels=0: must be a whole number"),
        ({"block_out_channels": 8}, "block_out_channels=8: must be 1 to 8 whole numbers"),
        ({"norm_num_groups": 3}, "norm_num_groups=3: must divide all of block_out_channels"),
        ({"down_block_types": ["DownEncoderBlock2D"]}, "one per level"),
        ({"down_block_types": ["DownBlock2D"] * 3}, "must be DownEncoderBlock2D or AttnDownEncoderBlock2D"),
        ({"up_block_types": ["AttnUpDecoderBlock2D"] * 3}, "attends where its encoder does"),
        ({"sample_size": [16]}, "sample_size=[16]: must be the pixels of a side"),
        ({"sample_size": 18}, "18: does not divide by 4; try 16 or 20"),
        ({"num_vq_embeddings": 8}, "bottleneck.codebook.vectors should be float32 [8, 4] and is float32 [7, 4]"),
        ({"num_vq_embeddings": 2**23}, "describe a larger model than its weights"),
        ({"layers_per_block": 2}, "resnets.1.norm1.weight should be float32 [8] and is absent"),
        ({"_vqvae": {"data": {"variance": "much"}}}, "its data.variance must be a positive number"),
        ({"_vqvae": {"step": -1}}, "its step must be a whole number"),
    ],
)
def test_settings_that_do_not_fit_are_named_in_one_line(once, entries, message):
    shutil.copytree(once, "there")
    change(**entries)
    with pytest.raises(UserError) as caught:
        load("there")
    assert message in str(caught.value)
    assert str(caught.value).startswith("there")
    assert "\n" not in str(caught.value)


def test_settings_with_a_default_may_be_missing_and_pickled_weights_are_not_read():
    exported(nets=SMALL)
    change(_vqvae=..., act_fn=..., norm_type=..., mid_block_add_attention=...)
    assert DEFAULTS["mid_block_add_attention"] is True
    assert load("there").image_shape == SHAPE
    Path("there", WEIGHTS).rename("there/diffusion_pytorch_model.bin")
    with pytest.raises(UserError, match="no such file; save the model with safe_serialization=True"):
        load("there")
    Path("there", WEIGHTS).write_bytes(b"no weights")
    with pytest.raises(UserError, match=f"{WEIGHTS}: cannot be read"):
        load("there")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({}, "takes the nets vqgan, and this model has sonnet; choose pt2 or onnx"),
        ({"nets": SMALL, "bottleneck": "fsq"}, "takes the bottleneck vq or simvq, and this model has fsq"),
        ({"nets": SMALL, "likelihood": "bernoulli"}, "takes the likelihood mse, and this model has bernoulli"),
        ({"nets": SMALL, "likelihood": Choice("mse", {"pixels": "sigmoid"})}, "takes nets whose output is pixels"),
    ],
)
def test_a_model_that_is_not_one_of_diffusers_is_refused_before_anything_is_written(names, message, capsys):
    stored(Path("run"), SHAPE, **names)
    assert run("export --checkpoint run --output there --format diffusers") == 2
    assert f"error: --format diffusers: {message}" in capsys.readouterr().err
    assert not Path("there").exists()


def test_a_foreign_model_encodes_decodes_and_is_exported_again():
    model = exported(nets=SMALL)
    inputs = images(3, SHAPE)
    assert run("export --checkpoint there --output again --format diffusers") == 0
    assert torch.equal(load("again").encode(inputs), model.encode(inputs))
    for name, value in load_file(f"there/{WEIGHTS}").items():
        assert torch.equal(value, load_file(f"again/{WEIGHTS}")[name]), name
