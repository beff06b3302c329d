"""The autoencoder: images in, codes and images out. Encoding changes nothing."""

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.helpers import choose, fitting, images, make
from vqvae.autoencoder import Autoencoder
from vqvae.bottlenecks import BOTTLENECKS
from vqvae.checkpoint import weights_checksum
from vqvae.errors import OptionError
from vqvae.evaluation import evaluate, evaluate_prior
from vqvae.likelihoods import LIKELIHOODS
from vqvae.nets import NETS


def test_encode_decode_round_trip():
    model, batch = make().eval(), images(4)
    codes = model.encode(batch)
    assert codes.shape == (4, 2, 2)
    assert codes.dtype == torch.int64
    decoded = model.decode(codes)
    assert decoded.shape == (4, 3, 8, 8)
    assert 0 <= decoded.min() <= decoded.max() <= 1
    assert torch.allclose(decoded, model.reconstruct(batch), rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", ["uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"])
def test_codes_of_every_integer_type_are_the_same_codes(dtype):
    model = make().eval()
    codes = model.encode(images(4))
    stored = torch.from_numpy(codes.numpy().astype(dtype))  # as `vqvae encode` writes them
    assert torch.equal(model.decode(stored), model.decode(codes))
    with pytest.raises(ValueError, match="codes must be from 0 to 6, not 0 to 100"):
        model.decode(torch.from_numpy(np.array([[[0, 1], [2, 100]]], dtype)))


# rounding the weights moves some vectors to other codes; in float32, distances between rounded vectors lose none
@pytest.mark.parametrize(("dtype", "agreeing"), [("bfloat16", 0.6), ("float16", 0.9), ("float64", 0.9)])
@pytest.mark.parametrize("name", BOTTLENECKS)
def test_a_model_of_other_precision_does_nearly_the_same(name, dtype, agreeing):
    names: dict[str, Any] = fitting(name) | ({"prior": "made-flow"} if name == "gaussian" else {"prior": "transformer"})
    model, batch, labels = make(**names).eval(), images(20), torch.zeros(20, dtype=torch.int64)
    with torch.no_grad():
        model.bottleneck.initialize(model.features(images(200) / 255))
    other = copy.deepcopy(model).to(getattr(torch, dtype))
    before = {key: value.clone() for key, value in other.state_dict().items()}
    if model.discrete is None:
        assert torch.allclose(other.posterior_mean(batch).float(), model.posterior_mean(batch), atol=0.02)
    else:
        codes = other.encode(batch)
        assert codes.dtype == torch.int64
        assert (codes == model.encode(batch)).float().mean() >= agreeing
        decoded = other.decode(codes)
        assert decoded.dtype == torch.float32
        assert torch.allclose(decoded, model.decode(codes), atol=0.02)
    assert other.reconstruct(batch).dtype == other.sample(2).dtype == torch.float32
    assert evaluate(other, batch, labels)["mse"] == pytest.approx(evaluate(model, batch, labels)["mse"], rel=0.02)
    assert all(torch.equal(value, before[key]) for key, value in other.state_dict().items())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
@pytest.mark.parametrize("slot", ["nets", "likelihood"])
def test_nets_and_likelihoods_work_in_other_precisions(slot, dtype):
    for name in {"nets": NETS, "likelihood": LIKELIHOODS}[slot]:
        model = make((3, 16, 16), **{slot: name}).eval().to(getattr(torch, dtype))
        shown = model.decode(model.encode(images(2, (3, 16, 16))))
        assert shown.dtype == torch.float32, name
        assert 0 <= shown.min() <= shown.max() <= 1, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_for_evaluation(dtype):
    model, x = make().train(), images(2) / 255
    wide = weights_checksum(model)
    model.to(dtype)
    with pytest.raises(ValueError, match="for evaluation; train in float32, with autocast"):
        model.elbo(x)
    assert len(weights_checksum(model.eval())) == len(wide)  # it has one, although numpy has no bfloat16
    assert weights_checksum(model) != wide


def test_uint8_and_floats_are_the_same_pixels():
    model, batch = make().eval(), images(4)
    assert torch.equal(model.encode(batch), model.encode(batch.float() / 255))


def test_points_of_the_plane_may_lie_anywhere():
    names = {"nets": "mlp", "bottleneck": "gaussian", "prior": "normal", "likelihood": "gaussian"}
    model, points = make((2, 1, 1), **names).eval(), torch.tensor([[-3.0, 4.0], [0.5, 9.0]]).view(2, 2, 1, 1)
    assert model.posterior_mean(points).isfinite().all()
    assert model.reconstruct(points).shape == points.shape


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (torch.zeros(3, 8, 8), r"shape \[B, 3, 8, 8\], not \[3, 8, 8\]"),
        (torch.zeros(1, 1, 8, 8), r"not \[1, 1, 8, 8\]"),
        (torch.full((1, 3, 8, 8), 255.0), r"\[0, 1\]"),
        (torch.full((1, 3, 8, 8), float("nan")), r"\[0, 1\]"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.int64), "int64"),
        ([[0]], "list"),
        (np.zeros((1, 3, 8, 8), np.uint8), "numpy array; torch.from_numpy makes one a tensor"),
    ],
)
def test_encode_refuses_everything_but_a_batch_of_images(batch, message):
    for method in (make().encode, make().reconstruct):
        with pytest.raises(ValueError, match=message):
            method(batch)


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (torch.zeros(1, 2, 2), "integers, not torch.float32"),
        (torch.zeros(1, 2, 2, dtype=torch.bool), "integers, not torch.bool"),
        (torch.zeros(2, 2, dtype=torch.int64), r"shape \[B, 2, 2\], not \[2, 2\]"),
        (torch.full((1, 2, 2), 7), "from 0 to 6, not 7 to 7"),
        (torch.full((1, 2, 2), -1), "from 0 to 6"),
        (None, "NoneType"),
        (np.zeros((1, 2, 2), np.uint16), "numpy array; torch.from_numpy makes one a tensor"),
        (torch.zeros(1, 2, 2, dtype=torch.complex64), "integers, not torch.complex64"),
    ],
)
def test_decode_refuses_everything_but_a_grid_of_codes(codes, message):
    with pytest.raises(ValueError, match=message):
        make().decode(codes)


def test_continuous_latents_have_a_mean_and_no_codes():
    model = make(**fitting("gaussian")).eval()
    assert model.posterior_mean(images(4)).shape == (4, model.bottleneck.code_dim, 1, 1)
    with pytest.raises(ValueError, match="encode needs discrete codes"):
        model.encode(images(4))
    with pytest.raises(ValueError, match="decode needs discrete codes"):
        model.decode(torch.zeros(4, 1, 1, dtype=torch.int64))
    with pytest.raises(ValueError, match="posterior_mean needs a continuous latent"):
        make().posterior_mean(images(4))


def test_samples_are_images():
    samples = make().eval().sample(3, generator=torch.Generator().manual_seed(0))
    assert samples.shape == (3, 3, 8, 8)
    assert 0 <= samples.min() <= samples.max() <= 1


# options that make a training step random or that make it change buffers
CHANGING = {
    "vq": {"revive": 0.9, "decay": 0.5},
    "cosine": {"revive": 0.9, "decay": 0.5, "diversity": 0.1},
    "residual": {"dropout": 0.9},
}


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("name", BOTTLENECKS)
def test_encoding_draws_nothing_and_changes_nothing(name, mode):
    model = make(**fitting(name) | {"bottleneck": choose("bottleneck", name, **CHANGING.get(name, {}))})
    batch = images(6)
    expected = latent_and_images(model.eval(), batch)
    getattr(model, mode)()
    before, draws = {key: value.clone() for key, value in model.state_dict().items()}, torch.get_rng_state()
    found = latent_and_images(model, batch)
    assert torch.equal(torch.get_rng_state(), draws)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key
    for value, other in zip(found, expected, strict=True):  # the mode makes no difference
        assert torch.equal(value, other)


@torch.no_grad()
def latent_and_images(model: Autoencoder, batch: Tensor) -> list[Tensor]:
    """The results of all methods that encode."""
    latent, discrete = model.quantize(batch / 255), model.discrete is not None
    encode: Callable[[Tensor], Tensor] = model.encode if discrete else model.posterior_mean
    assert latent.z is not None
    return [latent.z, latent.log_q, encode(batch), model.reconstruct(batch)]


VAE = {"prior": "made-flow", "bottleneck": "gaussian"}


@pytest.mark.parametrize(
    ("names", "options", "message"),
    [
        ({"prior": "transformer"}, {"temperature": -0.5}, "temperature=-0.5: must be from 0 to below 1000"),
        ({"prior": "transformer"}, {"top_k": 8}, "top_k=8: must be from 0 to 7"),
        ({"prior": "uniform"}, {"temperature": float("nan")}, "temperature=nan: must be a finite number, from 0"),
        (VAE, {"temperature": -1}, "temperature=-1: must be from 0 to below 1000"),
    ],
)
def test_options_of_samples_out_of_range_are_refused(names, options, message):
    with pytest.raises(ValueError, match=message):
        make(**({"nets": "mlp"} | names)).sample(2, **options)


CODES = {"prior": choose("prior", "transformer", dropout=0.5)}


@pytest.mark.parametrize(("nets", "names"), [(name, CODES) for name in NETS] + [("mlp", VAE), ("conv-vae", VAE)])
def test_using_a_model_in_training_mode_changes_nothing(nets, names):
    model, batch = make(nets=nets, **names), images(6)
    expected = used(model.eval(), batch)
    model.train()
    model.encoder.requires_grad_(False).eval()  # every part keeps its own mode
    before = {key: value.clone() for key, value in model.state_dict().items()}
    modes = {name: module.training for name, module in model.named_modules()}
    for found, value in zip(used(model, batch), expected, strict=True):
        assert torch.equal(found, value)
    assert {name: module.training for name, module in model.named_modules()} == modes
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key


def used(model: Autoencoder, batch: Tensor) -> list[Tensor]:
    """The results of all methods that encode, decode or sample."""
    found = latent_and_images(model, batch)
    if model.discrete is not None:
        found.append(model.decode(model.encode(batch)))
    found.append(model.sample(3, generator=torch.Generator().manual_seed(0)))
    return found


@pytest.mark.parametrize(
    ("shape", "names", "flagged"),
    [
        ((2, 1, 1), {"nets": "mlp", "likelihood": "mse"}, "--likelihood mse: is a likelihood of pixels"),
        ((2, 1, 1), {"nets": "mlp", "likelihood": "softmax256"}, "--likelihood softmax256: is a likelihood of pixels"),
        ((2, 1, 1), {"nets": "sonnet", "likelihood": "gaussian"}, "--nets: must be mlp or conv-vae"),
        ((3, 1, 1), {"nets": "mlp"}, "--image-size 1: leaves one pixel"),
        ((3, 4, 4), {"nets": "henrhoi"}, "--image-size 4: gives the batch norm"),
        ((3, 8, 8), {"bottleneck": "gaussian", "prior": "normal"}, "--bottleneck gaussian: takes one vector"),
        ((3, 8, 8), {"bottleneck": "hierarchy", "nets": "mlp"}, "--bottleneck hierarchy: halves the nets' grid"),
    ],
)
def test_members_that_do_not_fit_the_examples_are_refused(shape, names, flagged):
    with pytest.raises(OptionError) as caught:
        make(shape, **names)
    assert caught.value.flagged.startswith(flagged)


def test_members_that_do_not_fit_are_named():
    with pytest.raises(OptionError, match="needs latent_dim.*those that fit: uniform") as caught:
        make(prior="normal")
    assert caught.value.flagged.startswith("--prior normal: needs latent_dim")
    with pytest.raises(OptionError, match="the prior uniform cannot use labels") as caught:
        make(num_classes=3)
    assert caught.value.flagged.startswith("--conditional: ")


def test_models_that_differ_only_in_their_prior_start_from_the_same_nets():
    states = []
    for prior in ("normal", "made-flow"):
        torch.manual_seed(0)
        states.append(make(nets="mlp", bottleneck="gaussian", prior=prior).state_dict())
    shared = [name for name in states[0] if not name.startswith("prior.")]
    assert shared
    assert all(torch.equal(states[0][name], states[1][name]) for name in shared)


@pytest.mark.parametrize(
    ("side", "likelihood", "count"),
    [
        (8, "mse", 256), (64, "mse", 256), (128, "mse", 64), (256, "mse", 16), (2048, "mse", 1),
        (32, "softmax256", 85), (256, "softmax256", 1), (64, "discretized-logistic", 256),
    ],
)  # fmt: skip
def test_fewer_images_with_more_pixels_or_parameters_are_evaluated_together(side, likelihood, count):
    assert make((3, side, side), likelihood=likelihood).at_once == count


@pytest.mark.parametrize(
    ("bottleneck", "prior", "count"),
    [("vq", "uniform", 256), ("vq", "pixelcnn", 3), ("vq", "masked", 3), ("gumbel", "uniform", 3)],
)
def test_fewer_images_with_many_logits_of_codes_are_evaluated_together(bottleneck, prior, count, monkeypatch):
    monkeypatch.setattr("vqvae.autoencoder.MOST_LOGITS", 100)
    model = make(bottleneck=bottleneck, prior=prior)
    assert (model.discrete.tokens, model.discrete.num_codes) == (4, 7)
    assert model.at_once == model.codes_at_once == count


def test_a_prior_is_evaluated_on_as_many_codes_as_fit_into_memory(monkeypatch):
    model, codes, sizes = make(prior="pixelcnn"), torch.randint(7, (8, 2, 2)), []
    whole = evaluate_prior(model, codes, torch.zeros(8).long(), conditional=False)
    monkeypatch.setattr("vqvae.autoencoder.MOST_LOGITS", 100)
    log_prob = model.prior.log_prob

    def counted(latent, labels):
        sizes.append(len(latent.codes))
        return log_prob(latent, labels)

    monkeypatch.setattr(model.prior, "log_prob", counted)
    parts = evaluate_prior(model, codes, torch.zeros(8).long(), conditional=False)
    assert sizes == [3, 3, 2]
    assert parts["prior_nats"] == pytest.approx(whole["prior_nats"], rel=1e-5)


@pytest.mark.parametrize("bottleneck", ["residual", "hierarchy", "multiscale"])
def test_images_of_the_first_levels_of_codes(bottleneck):
    model, batch = make((1, 8, 8), bottleneck=bottleneck).eval(), images(3, (1, 8, 8))
    codes = model.encode(batch)
    levels = len(model.discrete.maps(codes))
    assert torch.equal(model.decode(codes, levels=levels), model.decode(codes))
    assert not torch.equal(model.decode(codes, levels=1), model.decode(codes))
    for wrong in (0, levels + 1, 1.5, "first"):
        with pytest.raises(ValueError, match=f"levels={wrong}: must be "):
            model.decode(codes, levels=wrong)


def test_images_do_not_depend_on_how_many_are_computed_together(monkeypatch):
    model, batch = make((1, 8, 8)).eval(), images(7, (1, 8, 8))
    expected = model.reconstruct(batch)
    codes = model.encode(batch)
    assert torch.allclose(model.decode(codes), expected, atol=1e-5)
    monkeypatch.setattr(Autoencoder, "at_once", 3)
    sizes = []
    model.encoder.register_forward_hook(lambda module, inputs, features: sizes.append(len(features)))
    assert torch.equal(model.encode(batch), codes)
    assert sizes == [3, 3, 1]
    assert model.encode(batch[:0]).shape == codes[:0].shape
    assert torch.allclose(model.reconstruct(batch), expected, atol=1e-5)
    assert torch.allclose(model.decode(codes), expected, atol=1e-5)
    assert model.decode(codes[:0]).shape == (0, 1, 8, 8)
