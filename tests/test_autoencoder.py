"""The five slots together: the objective's arithmetic, pictures in and out, and every combination that fits."""

import math

import pytest
import torch

from vqvae.autoencoder import SLOTS, Objective, build_autoencoder, unit_range
from vqvae.bottlenecks import BOTTLENECKS
from vqvae.config import PRESETS
from vqvae.errors import UserError
from vqvae.likelihoods import LIKELIHOODS
from vqvae.members import Choice, signature
from vqvae.nets import NETS
from vqvae.priors import PRIORS
from vqvae.schedules import Schedule

SMALL = {
    "num_codes": 7,
    "code_dim": 4,
    "levels": "3,4",
    "bits": 4,
    "hidden": 8,
    "layers": 1,
    "blocks": 1,
    "channels": 8,
    "width": 8,
    "heads": 2,
}


def choose(slot: str, name: str, **options) -> Choice:
    """A member at a size that trains in milliseconds."""
    known = signature(SLOTS[slot].table[name])[1]
    return Choice(name, {k: v for k, v in SMALL.items() if k in known} | options)


def make(shape=(3, 8, 8), objective=None, num_classes=0, **names):
    names = {"nets": "sonnet", "bottleneck": "vq", "prior": "uniform", "likelihood": "mse"} | names
    choices = {slot: name if isinstance(name, Choice) else choose(slot, name) for slot, name in names.items()}
    return build_autoencoder(
        choices, image_shape=shape, data_variance=0.06, num_classes=num_classes, objective=objective
    )


def fitting(bottleneck: str) -> dict[str, str]:
    """The bottleneck with nets and a prior that go with it."""
    if bottleneck == "gaussian":
        return {"bottleneck": bottleneck, "prior": "normal", "nets": "conv-vae"}
    return {"bottleneck": bottleneck, "prior": "uniform"}


def pictures(n: int, shape=(3, 8, 8)) -> torch.Tensor:
    return torch.randint(256, (n, *shape), dtype=torch.uint8)


ROWS = (
    [{"nets": name} for name in NETS]
    + [fitting(name) for name in BOTTLENECKS]
    + [fitting("gaussian") | {"prior": "made-flow", "nets": "mlp"}]
    + [{"likelihood": name} for name in LIKELIHOODS]
    + [{"prior": name} for name in PRIORS if "num_codes" in signature(PRIORS[name])[0]]
    + [
        {"bottleneck": bottleneck, "prior": prior}
        for bottleneck in ("residual", "hierarchy", "gumbel")
        for prior in ("unigram", "pixelcnn", "gated-pixelcnn", "transformer")
    ]
)


@pytest.mark.parametrize("names", ROWS, ids=lambda names: "-".join(names.values()))
def test_every_row_of_every_table_trains_two_steps(names):
    model = make(**names)
    model.initialise(lambda n: pictures(8))
    optimiser = torch.optim.Adam(model.parameters(), 1e-3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for step in range(2):
        out = model(pictures(4), torch.zeros(4, dtype=torch.int64), step)
        out.loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        assert out.loss.isfinite()
        numbers = model.summary(out.metrics)
        assert all(math.isfinite(value) for value in numbers.values())
    moved = [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])]
    assert any(name.startswith("encoder") for name in moved)
    assert any(name.startswith("decoder") for name in moved)


def test_the_loss_is_sonnets():
    out = make().eval()(pictures(5), None, 0)
    expected = out.metrics["reconstruction"] + 0.25 * out.metrics["commitment"]
    assert out.loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_reconstruction_metric_is_mse_over_variance():
    model = make().eval()
    images = pictures(5)
    elbo = model.elbo(unit_range(images))
    error = (elbo.params + 0.5 - unit_range(images)).square().mean() / 0.06
    out = model(images, None, 0)
    assert out.metrics["reconstruction"].item() == pytest.approx(error.item(), rel=1e-4)


def test_duplicating_the_batch_leaves_the_loss_unchanged():
    model = make().eval()
    images = pictures(3)
    once, twice = model(images, None, 0), model(torch.cat([images, images]), None, 0)
    assert once.loss.item() == pytest.approx(twice.loss.item(), rel=1e-5)


def test_sum_and_mean_reductions_differ_by_the_dimensions():
    images = pictures(3)
    losses = {}
    for reduction in ("mean", "sum"):
        torch.manual_seed(0)
        model = make(objective=Objective(reduction)).eval()
        out = model(images, None, 0)
        losses[reduction] = out.loss - 0.25 * out.metrics["commitment"]
    assert losses["sum"].item() == pytest.approx(losses["mean"].item() * 3 * 8 * 8, rel=1e-4)


def test_kl_weight_follows_its_schedule():
    schedule = Schedule.parse("--kl-weight", "linear:0:1:10")
    model = make(prior="unigram", objective=Objective("sum", schedule, total_steps=100)).eval()
    images = pictures(3)
    at = [model(images, None, step) for step in (0, 5, 10)]
    rate = at[0].metrics["rate"].item()
    assert rate == pytest.approx(4 * math.log(7), rel=0.2)
    assert at[1].loss.item() - at[0].loss.item() == pytest.approx(0.5 * rate, rel=1e-3)
    assert at[2].loss.item() - at[0].loss.item() == pytest.approx(rate, rel=1e-3)


def test_encode_decode_round_trip():
    model = make().eval()
    images = pictures(4)
    codes = model.encode(images)
    assert codes.shape == (4, 2, 2)
    assert codes.dtype == torch.int64
    out = model.decode(codes)
    assert out.shape == (4, 3, 8, 8)
    assert 0 <= out.min() <= out.max() <= 1
    assert torch.allclose(out, model.reconstruct(images), atol=1e-5)
    assert torch.equal(codes, model.encode(images.float() / 255))
    assert torch.allclose(out, model.decode(codes.to(torch.uint8)))


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(3, 8, 8), r"shape \[B, 3, 8, 8\], not \[3, 8, 8\]"),
        (torch.zeros(1, 1, 8, 8), r"not \[1, 1, 8, 8\]"),
        (torch.full((1, 3, 8, 8), 255.0), r"\[0, 1\]"),
        (torch.full((1, 3, 8, 8), float("nan")), r"\[0, 1\]"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.int64), "int64"),
        ([[0]], "list"),
    ],
)
def test_encode_refuses_what_is_not_a_batch_of_pictures(images, message):
    with pytest.raises(ValueError, match=message):
        make().encode(images)


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (torch.zeros(1, 2, 2), "integers, not torch.float32"),
        (torch.zeros(2, 2, dtype=torch.int64), r"shape \[B, 2, 2\], not \[2, 2\]"),
        (torch.full((1, 2, 2), 7), "from 0 to 6, not 7 to 7"),
        (torch.full((1, 2, 2), -1), "from 0 to 6"),
        (None, "NoneType"),
    ],
)
def test_decode_refuses_what_is_not_a_grid_of_codes(codes, message):
    with pytest.raises(ValueError, match=message):
        make().decode(codes)


def test_samples_are_pictures():
    pictures = make().eval().sample(3, generator=torch.Generator().manual_seed(0))
    assert pictures.shape == (3, 3, 8, 8)
    assert 0 <= pictures.min() <= pictures.max() <= 1


def test_members_that_do_not_fit_are_named():
    with pytest.raises(UserError, match="--prior normal needs latent_dim.*those that fit: uniform"):
        make(prior="normal")
    with pytest.raises(UserError, match="--conditional.*uniform"):
        make(num_classes=3)


def test_deep_vector_quantizations_loss_by_hand():
    """Mean square / (2 variance) + 5e-4 * the mean KL of a position, from the weights of --preset dvq-gumbel."""
    settings = PRESETS["dvq-gumbel"].settings
    objective = Objective(kl_weight=Schedule.parse("--kl-weight", settings["kl_weight"]))
    gumbel = Choice("gumbel", {"posterior": "linear", "entropy": "exact", "num_codes": 16, "code_dim": 4})
    mse = Choice("mse", {"variance": 0.0632704})
    model = make((3, 32, 32), objective, nets="deepmind", bottleneck=gumbel, likelihood=mse)
    images = pictures(5, (3, 32, 32))
    torch.manual_seed(1)
    loss = model(images, None, 5000).loss
    torch.manual_seed(1)
    elbo = model.elbo(unit_range(images), None, 5000)
    reconstruction = (elbo.params + 0.5 - elbo.x).square().mean() / (2 * 0.0632704)
    q = model.bottleneck.projection(model.features(elbo.x)).softmax(1)
    kl = (q * (16 * q).log()).sum(1).mean()
    assert loss.item() == pytest.approx((reconstruction + 5e-4 * kl).item(), rel=1e-5)


def test_below_the_free_bits_the_rate_has_no_gradient():
    def encoder_gradient(free_bits: float) -> float:
        torch.manual_seed(0)
        objective = Objective("sum", free_bits=free_bits)
        model = make(nets="conv-vae", bottleneck="gaussian", prior="normal", objective=objective)
        for p in model.decoder.parameters():
            p.data.zero_()  # the reconstruction tells the encoder nothing
        model(pictures(4), None, 0).loss.backward()
        return float(model.bottleneck.head.weight.grad.abs().sum())

    assert encoder_gradient(0) > 0
    assert encoder_gradient(1e4) == 0


def test_models_that_differ_in_their_prior_alone_start_from_the_same_nets():
    states = []
    for prior in ("normal", "made-flow"):
        torch.manual_seed(0)
        states.append(make(nets="mlp", bottleneck="gaussian", prior=prior).state_dict())
    shared = [name for name in states[0] if not name.startswith("prior.")]
    assert shared
    assert all(torch.equal(states[0][name], states[1][name]) for name in shared)
