"""Bottlenecks used as layers of other models."""

import copy
import math
import pickle

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import vqvae
from vqvae import FSQ, LFQ, VQ, Quantizer, ResidualVQ, SimVQ
from vqvae.bottlenecks import BOTTLENECKS
from vqvae.layers import LAYERS
from vqvae.registry import signature

FORMS = {"grid": (6, 12, 5, 4), "sequence": (6, 20, 12)}  # of inputs with 12 channels


def batch(form: str = "grid") -> Tensor:
    return torch.randn(FORMS[form])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", LAYERS)
def test_every_bottleneck_with_codes_is_a_layer(name, form):
    quantize, x = Quantizer(name, 12), batch(form).requires_grad_()
    out = quantize(x)
    assert out.z.shape == x.shape
    assert out.codes.dtype == torch.int64
    levels = {"residual": (4,), "grouped": (2,)}.get(name, ())
    assert out.codes.shape == ((6, 5, 4) if form == "grid" else (6, 20)) + levels
    (out.z.sum() + out.loss).backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0
    quantize.eval()
    out = quantize(x)
    assert torch.allclose(quantize.decode(out.codes), out.z, atol=1e-5)
    assert torch.allclose(
        quantize.decode(out.codes.to(torch.uint8 if quantize.num_codes < 256 else torch.int32)), out.z, atol=1e-5
    )


def test_the_three_lines_of_the_readme_work():
    quantize = vqvae.VQ(64, 512)
    out = quantize(torch.randn(8, 64, 8, 8))
    assert (out.z.shape, out.codes.shape, out.loss.dim()) == ((8, 64, 8, 8), (8, 8, 8), 0)
    assert out[:3] == (out.z, out.codes, out.loss)
    assert quantize.codebook.shape == (512, 64)


def test_a_sequence_is_the_grid_of_one_column():
    sequence = batch("sequence")
    quantize = VQ(12, 7).eval()
    grid = quantize(sequence.mT.unsqueeze(3))
    out = quantize(sequence)
    assert torch.equal(out.codes, grid.codes.squeeze(2))
    assert torch.equal(out.z, grid.z.squeeze(3).mT)


def test_the_first_training_batch_fits_the_codebook_and_evaluation_changes_nothing():
    quantize, centers = VQ(12, 8), 3 * torch.randn(8, 12)
    x = centers.repeat(10, 1)[None] + 0.01 * torch.randn(1, 80, 12)
    before = {name: value.clone() for name, value in quantize.state_dict().items()}
    quantize.eval()
    quantize(x)
    assert all(torch.equal(value, before[name]) for name, value in quantize.state_dict().items())
    far = quantize(x).loss
    quantize.train()
    quantize(x)
    assert quantize.steps == 1
    assert quantize.eval()(x).loss < far / 100  # k-means found the vectors
    assert quantize(x).codes.unique().numel() == 8


def test_without_a_projection_the_codes_are_nearest_to_the_input():
    quantize, x = VQ(12, 8), batch("sequence")
    quantize(x)
    quantize.eval()
    rows, codes = x.flatten(0, 1), quantize(x).codes.flatten()
    chosen = (rows.double() - quantize.codebook.double()[codes]).norm(dim=1)
    nearest = torch.cdist(rows.double(), quantize.codebook.double()).min(dim=1).values
    assert torch.allclose(chosen, nearest, atol=1e-5)


@pytest.mark.parametrize("name", ["vq", "gumbel", "residual"])
def test_a_layer_that_is_loaded_goes_on_where_it_was(name):
    x, y = batch(), batch()
    straight = Quantizer(name, 12)
    straight(x)
    loaded = Quantizer(name, 12)
    loaded.load_state_dict(straight.state_dict())
    outputs = []
    for quantize in (straight, loaded):
        torch.manual_seed(1)
        outputs.append(quantize(y))
    assert torch.equal(outputs[0].z, outputs[1].z)
    assert all(
        torch.equal(a, b) for a, b in zip(straight.state_dict().values(), loaded.state_dict().values(), strict=True)
    )
    assert loaded.steps == 2


def test_a_layer_learns_inside_a_model():
    encoder, quantize, decoder = nn.Linear(5, 3), VQ(3, 16), nn.Linear(3, 5)
    model = nn.ModuleList([encoder, quantize, decoder])
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    x = torch.randn(4, 25, 5)
    losses = []
    for _ in range(60):
        out = quantize(encoder(x))
        error = (decoder(out.z) - x).square().mean()
        optimizer.zero_grad()
        (error + out.loss).backward()
        optimizer.step()
        losses.append(error.item())
    assert losses[-1] < losses[0] / 2


def test_a_code_dimension_of_its_own_goes_through_projections():
    quantize, x = VQ(12, 8, code_dim=3), batch("sequence")
    out = quantize(x)
    assert quantize.codebook.shape == (8, 3)
    assert out.z.shape == x.shape


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["residual", "grouped"])
def test_the_first_levels_of_codes_can_be_decoded(name, form):
    quantize = Quantizer(name, 12)
    out = quantize(batch(form))
    quantize.eval()
    levels = quantize.levels
    assert torch.equal(quantize.decode(out.codes[..., :levels]), quantize.decode(out.codes))
    first = quantize.decode(out.codes[..., :1])
    books = quantize.bottleneck.codebooks
    vectors = books[0].vectors[out.codes[..., 0]]
    if name == "grouped":
        vectors = torch.cat([vectors, torch.zeros_like(vectors)], dim=-1)
    assert torch.allclose(first, vectors.movedim(-1, 1) if form == "grid" else vectors)
    with pytest.raises(ValueError, match="they must be"):
        quantize.decode(out.codes[..., :0])


def test_shortcuts_take_their_main_option_by_position():
    assert ResidualVQ(12, 8, quantizers=3)(batch()).codes.shape == (6, 5, 4, 3)
    assert SimVQ(12, 8).num_codes == 8
    assert FSQ(12, (8, 5, 5)).num_codes == 200
    assert LFQ(12, 5).num_codes == 32


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_layer_takes_the_type_of_its_weights(name, dtype):
    quantize = Quantizer(name, 12)
    quantize(batch())
    quantize.to(dtype)
    assert all(value.dtype == dtype for value in quantize.state_dict().values() if value.is_floating_point())
    if dtype == torch.bfloat16 and any(key.endswith("counts") for key in quantize.state_dict()):
        before = copy.deepcopy(quantize.state_dict())
        with pytest.raises(ValueError, match=r"in half precision cannot be trained; float\(\) the layer"):
            quantize(batch().to(dtype))
        assert all(torch.equal(value, before[key]) for key, value in quantize.state_dict().items())
        quantize.float()
        assert quantize(batch().to(dtype)).z.dtype == dtype
        quantize.to(dtype)
    else:
        assert quantize(batch().to(dtype)).z.dtype == dtype
    out = quantize.eval()(20 * batch().to(dtype))
    assert torch.equal(out.z, quantize.decode(out.codes))


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("options", [{}, {"code_dim": 6}])
def test_a_layer_computes_in_the_type_of_its_weights_whatever_the_input_and_autocast(name, options):
    if options and "code_dim" not in signature(BOTTLENECKS[name]).options:
        pytest.skip("has no code_dim")
    x = batch().bfloat16()
    outputs = []
    for enabled in (False, True):
        torch.manual_seed(0)
        quantize = Quantizer(name, 12, **options)
        for training, given in ((True, x), (False, x), (False, x.float())):
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                out = quantize.train(training)(given)
            assert out.z.dtype == given.dtype
            assert out.loss.dtype == torch.float32
            outputs.append(out)
    for narrow, wide in (outputs[1:3], outputs[4:6]):  # in evaluation, of the same numbers in two types
        assert torch.equal(narrow.codes, wide.codes)
        assert torch.equal(narrow.z, wide.z.bfloat16())
    assert all(torch.equal(a.codes, b.codes) for a, b in zip(outputs[:3], outputs[3:], strict=True))


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("weights", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_a_layer_takes_floats_of_any_type_narrower_or_wider_than_its_weights(name, weights):
    quantize = Quantizer(name, 12)
    quantize(batch())
    quantize.to(weights).eval()
    for given in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        assert quantize(batch().to(given)).z.dtype == given
    if weights.itemsize >= 4:
        x = batch().double().requires_grad_()
        out = quantize.train()(x)
        (out.z.sum() + out.loss).backward()
        assert out.loss.dtype == weights
        assert x.grad.isfinite().all()


@pytest.mark.parametrize(
    ("given", "found"),
    [(torch.zeros(2, 12, 3, 3, dtype=torch.int64), "torch.int64"), (np.zeros((2, 12, 3, 3)), "numpy"), (None, "None")],
)
def test_inputs_other_than_tensors_of_floats_are_refused(given, found):
    with pytest.raises(ValueError, match=f"the input must be a tensor of floats, not .*{found}"):
        VQ(12, 8)(given)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", LAYERS)
def test_a_batch_that_is_not_finite_does_not_stay_in_the_codebook(name, value):
    torch.manual_seed(0)
    quantize = Quantizer(name, 12)
    for _ in range(40):  # until codes are judged, of which most are dead
        quantize(batch())
    vectors = quantize.codebook.clone()
    spoiled = batch()
    spoiled[:, :, 0] = value
    with pytest.raises(ValueError, match="the first training batch, .* not finite"):
        Quantizer(name, 12)(spoiled)
    quantize(spoiled)
    assert all(tensor.isfinite().all() for tensor in quantize.state_dict().values())
    # decayed counts change the share of Laplace's smoothing, and dead codes move onto vectors that are finite
    assert torch.isclose(quantize.codebook, vectors, rtol=1e-3, atol=1e-4).all(dim=1).any()
    assert quantize(batch()).z.isfinite().all()


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_gradient_checkpointing_gives_the_same_step_or_is_refused_in_one_line(name, reentrant):
    found = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        before, quantize = nn.Conv2d(3, 12, 1), Quantizer(name, 12)

        def outputs(x, before=before, quantize=quantize):
            out = quantize(before(x))
            return out.z, out.loss

        updated = any(key.endswith("counts") for key in quantize.state_dict())
        for _ in range(3):
            x = torch.randn(4, 3, 5, 5, requires_grad=True)
            z, loss = checkpoint(outputs, x, use_reentrant=reentrant) if checkpointed else outputs(x)
            if checkpointed and updated:
                with pytest.raises(ValueError, match="end the gradient checkpoint before the layer"):
                    (z.square().sum() + loss).backward()
                assert quantize.steps == 1
                return
            (z.square().sum() + loss).backward()
        found.append((before.weight.grad, quantize.state_dict()))
    torch.testing.assert_close(*found)


def test_a_layer_is_pickled_and_copied():
    quantize, x = VQ(12, 8), batch()
    quantize(x)
    for other in (pickle.loads(pickle.dumps(quantize)), copy.deepcopy(quantize)):
        assert torch.equal(other.eval()(x).z, quantize.eval()(x).z)
        other.load_state_dict(VQ(12, 8).state_dict())
        assert other.train()(x).codes.shape == (6, 5, 4)
        assert other.steps == 1


@pytest.mark.parametrize("name", ["vq", "fsq"])
def test_a_model_with_a_layer_can_be_compiled(name):
    found = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 12, 1), Quantizer(name, 12))
        called = torch.compile(model, backend="eager") if compiled else model
        for _ in range(3):
            out = called(torch.randn(4, 3, 5, 5))
            (out.z.sum() + out.loss).backward()
        model.eval()
        found.append((called(torch.ones(4, 3, 5, 5)).codes, model[0].weight.grad, model[1].state_dict()))
    torch.testing.assert_close(*found)
    assert found[1][2]["steps"] == 3


@pytest.mark.parametrize("shape", [(6, 5, 4, 12), (6, 12), (6, 12, 20), (1, 6, 12, 5, 4)])
def test_inputs_of_other_shapes_are_refused(shape):
    with pytest.raises(ValueError, match=r"must be \[B, 12, h, w\] or \[B, N, 12\]"):
        VQ(12, 8)(torch.randn(shape))


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (torch.full((2, 3), 8), "codes must be from 0 to 7, not 8 to 8"),
        (torch.full((2, 3), -1), "codes must be from 0 to 7, not -1 to -1"),
        (np.zeros((2, 3), int), "codes must be a tensor of integers, not "),
        ([[1, 2]], "codes must be a tensor of integers, not "),
        (torch.zeros(2, 3, 4, 1).int(), r"the codes are \[2, 3, 4, 1\]; they must be \[B, h, w\] or \[B, N\]"),
    ],
)
def test_codes_out_of_range_are_refused(codes, message):
    with pytest.raises(ValueError, match=message):
        VQ(12, 8).decode(codes)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: VQ(12, 0), "num_codes=0: must be"),
        (lambda: VQ(12, 8, decay=2), "decay=2: must be"),
        (lambda: VQ(12, 8, decya=0.5), "decya=0.5: unknown option .did you mean 'decay'"),
        (lambda: Quantizer("hierarchy", 12), "known: vq, cosine"),
        (lambda: Quantizer("gaussian", 12), "known: vq, cosine"),
        (lambda: Quantizer("stochastic", 12), "known: vq, cosine"),
        (lambda: Quantizer("categorical", 12, estimator="rloo", num_samples=2), "estimator=rloo: needs the bound"),
        (lambda: Quantizer("categorical", 12, iaf_flows=1), "flows need the size of the grid"),
    ],
)
def test_options_out_of_range_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
