"""The probabilistic family agrees with enumeration, autograd, finite differences and torch.distributions."""

import itertools
import math

import pytest
import torch
from torch import nn

from tests.bottleneck_helpers import assert_nearest, make, rows
from vqvae.autoencoder import SLOTS, Autoencoder
from vqvae.bottlenecks import categorical
from vqvae.bottlenecks.codebook import Codebook, EMAOptions
from vqvae.contracts import Latent
from vqvae.errors import OptionError
from vqvae.evaluation import evaluate
from vqvae.flows import SimplexFlow
from vqvae.objectives import ElboObjective, ElboOptions
from vqvae.registry import Choice, build
from vqvae.stage_one import AutoencoderTraining

L, K, D = 2, 3, 4


def tiny(name: str = "categorical", **options) -> Autoencoder:
    """Two latents of three codes and images of four binary pixels: few enough to enumerate."""
    images = {"image_shape": (1, 2, 2), "data_variance": 0.25}
    codes = {"num_codes": K, "grid": (L, 1), "num_classes": 0, "scales": ()}
    model = Autoencoder(
        encoder=nn.Sequential(nn.Flatten(), nn.Linear(4, L * D), nn.Unflatten(1, (D, L, 1))),
        bottleneck=make(name, (L, 1), D, num_codes=K, code_dim=D, init="normal", **options),
        decoder=nn.Sequential(nn.Flatten(), nn.Linear(L * D, 4), nn.Unflatten(1, (1, 2, 2))),
        likelihood=build(SLOTS["likelihood"], Choice("bernoulli", {}), images),
        prior=build(SLOTS["prior"], Choice("transformer", {"layers": 1, "width": 8, "heads": 2}), codes),
        **images,
    )
    for p in [*model.encoder.parameters(), *model.decoder.parameters(), *model.prior.parameters()]:
        nn.init.normal_(p, std=0.7)  # so that posteriors, images and the prior all vary
    return model


def binary(n: int) -> torch.Tensor:
    return torch.randint(2, (n, 1, 2, 2), dtype=torch.uint8) * 255


@torch.no_grad()
def enumerate_codes(model: Autoencoder, x: torch.Tensor):
    """log p(x|z) `[n, K^L]`, log p(z) `[K^L]` and log q(z|x) `[n, K^L]` of all K^L codes z, for images x."""
    codes = torch.tensor(list(itertools.product(range(K), repeat=L))).view(-1, L, 1)
    params = model.decoder(model.bottleneck.embed(codes))
    x_all = x[:, None].expand(-1, len(codes), -1, -1, -1)
    likelihood = torch.stack([model.likelihood.log_prob(params, row) for row in x_all])
    prior = model.prior.log_prob(Latent.of_codes(codes))
    distances = torch.cdist(model.features(x).flatten(2).transpose(1, 2), model.bottleneck.code_vectors())
    log_p = (-distances).log_softmax(-1)  # [n, L, K]
    posterior = sum(log_p[:, position, codes[:, position, 0]] for position in range(L))
    return likelihood, prior, posterior


def test_the_bound_is_below_the_exact_likelihood_and_equals_its_enumeration():
    model, images = tiny().eval(), binary(3)
    x = images / 255
    likelihood, prior, posterior = enumerate_codes(model, x)
    assert prior.exp().sum().item() == pytest.approx(1, abs=1e-5)
    assert torch.allclose(posterior.exp().sum(1), torch.ones(3), atol=1e-5)
    exact = (likelihood + prior).logsumexp(1)
    bound = (posterior.exp() * (likelihood + prior - posterior)).sum(1)
    assert (bound < exact).all()
    draws = 4000
    repeated = model.elbo(x.repeat_interleave(draws, 0))
    with torch.no_grad():
        for sampled, expected in [
            (repeated.nats, bound),
            (-repeated.log_posterior, -(posterior.exp() * posterior).sum(1)),  # the entropy of q
            (repeated.log_prior, (posterior.exp() * prior).sum(1)),
            (repeated.log_likelihood, (posterior.exp() * likelihood).sum(1)),
        ]:
            values = sampled.view(3, draws)
            assert ((values.mean(1) - expected).abs() < 4.5 * values.std(1) / math.sqrt(draws) + 1e-5).all()


def test_the_importance_weighted_bound_rises_to_the_exact_likelihood():
    model, images = tiny().eval(), binary(2)
    likelihood, prior, posterior = enumerate_codes(model, images / 255)
    exact = (likelihood + prior).logsumexp(1).mean().item()
    log_w = likelihood + prior - posterior  # [n, K^L]

    def expected(samples: int) -> float:
        total = 0.0
        for chosen in itertools.product(range(K**L), repeat=samples):
            share = posterior[:, chosen].sum(1).exp()
            total += (share * (log_w[:, chosen].logsumexp(1) - math.log(samples))).mean().item()
        return total

    bounds = [expected(s) for s in (1, 2, 3)]
    assert bounds[0] < bounds[1] < bounds[2] < exact
    many = images.repeat(3000, 1, 1, 1)  # both images equally often
    for samples, bound in zip((2, 3), bounds[1:], strict=True):
        found = evaluate(model, many, torch.zeros(len(many)), iw_samples=samples, batch_size=3000)
        assert -found["iw_bound"] == pytest.approx(bound, abs=5 * found["iw_bound_se"])
    far = evaluate(model, images.repeat(50, 1, 1, 1), torch.zeros(100), iw_samples=300)
    assert -far["iw_bound"] == pytest.approx(exact, abs=0.05)


def test_a_point_posterior_needs_one_draw():
    model, images = tiny("deterministic").eval(), binary(5)
    found = evaluate(model, images, torch.zeros(5), iw_samples=7)
    assert found["iw_bound"] == pytest.approx(found["neg_elbo"])
    assert found["entropy"] == 0
    likelihood, prior, _ = enumerate_codes(model, images / 255)
    assert -found["neg_elbo"] <= (likelihood + prior).logsumexp(1).mean().item()


def test_averaged_samples_have_the_multinomials_log_probability():
    bottleneck = make("categorical", (2, 1), num_codes=5, num_samples=7)
    log_p = torch.randn(4, 2, 1, 5).log_softmax(-1)
    w, log_q = bottleneck.assign(log_p, 0)
    assert w.shape == (1, 4, 2, 1, 5)
    counts = (w[0] * 7).round()
    assert (counts.sum(-1) == 7).all()
    expected = torch.distributions.Multinomial(7, logits=log_p).log_prob(counts).flatten(1).sum(1)
    assert torch.allclose(log_q[0], expected, atol=1e-4)


@pytest.mark.parametrize("average", [True, False])
def test_categorical_draws_have_the_posteriors_frequencies(average):
    log_p = torch.tensor([[0.6, 0.3, 0.0, 0.1], [0.0, 0.0, 1.0, 0.0]]).log().clamp(min=-200).view(2, 1, 1, 4)
    bottleneck = make("categorical", (1, 1), num_codes=4, num_samples=20_000, average_samples=average)
    w, log_q = bottleneck.assign(log_p, 0)
    assert torch.allclose(w.mean(0).view(2, 4), log_p.exp().view(2, 4), atol=0.015)
    if not average:
        expected = (w.argmax(-1, keepdim=True) == torch.arange(4)).float() * log_p
        assert torch.allclose(log_q, expected.flatten(2).sum(2))


def test_samples_that_are_not_averaged_repeat_the_batch():
    model = tiny(num_samples=6, average_samples=False, decay=1 - 1e-7).train()
    images = binary(3)
    elbo = model.elbo(images / 255)
    assert elbo.nats.shape == (18,)
    assert torch.equal(elbo.x, (images / 255).repeat(6, 1, 1, 1))
    assert torch.allclose(elbo.latent.z, model.bottleneck.embed(elbo.latent.codes), atol=1e-4)
    assert torch.allclose(elbo.latent.assignments.sum(1), torch.ones(18, L, 1))
    model.eval()
    assert model.elbo(images / 255).nats.shape == (3,)


def test_leave_one_out_gives_the_encoder_the_exact_gradient_of_the_bound_on_average(monkeypatch):
    model = tiny("categorical", estimator="rloo", num_samples=2, beta=0.0).double().train()
    monkeypatch.setattr(model.bottleneck, "update", lambda *_: None)  # the codebook stays
    module = AutoencoderTraining(model, ElboObjective(total_steps=1, options=ElboOptions(reduction="sum")))
    images, codes = binary(1), torch.tensor(list(itertools.product(range(K), repeat=L))).view(-1, L, 1)
    weights = [*model.encoder.parameters(), *model.decoder.parameters()]

    features = model.features(images / 255)
    log_p = model.bottleneck.logits(features, model.bottleneck.code_vectors())[0].log_softmax(-1)[0, :, 0]  # [L, K]
    log_q = sum(log_p[position, codes[:, position, 0]] for position in range(L))
    params = model.decoder(model.bottleneck.embed(codes))
    joint = model.likelihood.log_prob(params, (images / 255).expand(len(codes), -1, -1, -1))
    joint = joint + model.prior.log_prob(Latent.of_codes(codes))
    exact = torch.autograd.grad((log_q.exp() * (log_q - joint)).sum(), weights)

    share, total = log_q.exp().detach(), torch.zeros(()).double()
    for first, second in itertools.product(range(len(codes)), repeat=2):
        monkeypatch.setattr(categorical, "_draw", lambda *_, pair=(first, second): codes[list(pair), None])
        total = total + share[first] * share[second] * module(images, None, 0).loss
    for ours, theirs in zip(torch.autograd.grad(total, weights), exact, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-3, atol=1e-4)


def test_leave_one_out_decodes_every_draw_and_passes_it_no_gradient():
    bottleneck = make("categorical", (2, 1), 4, num_codes=5, code_dim=4, num_samples=3, estimator="rloo").train()
    features = torch.randn(6, 4, 2, 1, requires_grad=True)
    latent = bottleneck(features, 0)
    assert latent.z.shape == (18, 4, 2, 1)
    assert not latent.z.requires_grad
    assert torch.equal(latent.score.flatten(), latent.log_q)
    assert bottleneck.eval()(features, 0).score is None
    assert make("categorical").train()(torch.randn(6, 6, 2, 4), 0).score is None


def test_straight_through_has_the_softmaxs_gradient():
    bottleneck = make("deterministic", (2, 1), num_codes=5)
    logits = torch.randn(4, 2, 1, 5, dtype=torch.float64, requires_grad=True)
    direction = torch.randn(4, 2, 1, 5, dtype=torch.float64)
    w, _ = bottleneck.assign(logits.log_softmax(-1), 0)
    assert torch.allclose(w[0], torch.nn.functional.one_hot(logits.argmax(-1), 5).double())
    (w * direction).sum().backward()
    step = 1e-6
    for index in [(0, 0, 0, 1), (3, 1, 0, 4)]:
        shifted = [logits.detach().clone() for _ in "+-"]
        shifted[0][index] += step
        shifted[1][index] -= step
        high, low = ((s.softmax(-1) * direction).sum() for s in shifted)
        assert logits.grad[index].item() == pytest.approx((high - low).item() / (2 * step), rel=1e-5)


@pytest.mark.parametrize("entropy", ["draw", "exact"])
def test_gumbel_softmaxs_gradient_is_that_of_finite_differences(entropy):
    bottleneck = make("gumbel", (2, 1), num_codes=5, num_samples=2, entropy=entropy)

    def value(logits):
        torch.manual_seed(1)
        w, log_q = bottleneck.assign(logits.log_softmax(-1), 0)
        return (w * direction).sum() + log_q.sum()

    torch.manual_seed(0)
    direction = torch.randn(2, 3, 2, 1, 5, dtype=torch.float64)
    logits = torch.randn(3, 2, 1, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(value, logits)


def test_gumbel_draws_have_the_posteriors_frequencies_and_harden_with_the_temperature():
    log_p = torch.tensor([0.6, 0.3, 0.1]).log().view(1, 1, 1, 3)
    cold = make("gumbel", (1, 1), num_codes=3, num_samples=20_000, temperature="0.05")
    w, log_q = cold.assign(log_p, 0)
    assert torch.allclose(w.mean(0).flatten(), log_p.exp().flatten(), atol=0.015)
    assert (w.amax(-1) > 0.95).float().mean() > 0.8
    expected = log_p.flatten()[w.argmax(-1)].flatten()  # exact at the corners
    sharp = w.amax(-1).flatten() > 0.999
    assert torch.allclose(log_q.flatten()[sharp], expected[sharp], atol=0.02)
    hard = make("gumbel", (1, 1), num_codes=3, hard=True).assign(log_p, 0)[0]
    assert hard.sum() == pytest.approx(1)
    assert sorted(hard.flatten().tolist())[:2] == pytest.approx([0, 0], abs=1e-6)


def test_the_temperature_follows_its_schedule():
    gumbel = make("gumbel", (1, 1), num_codes=3, temperature="linear:5:0.01")  # over the run's ten steps
    log_p = torch.zeros(50, 1, 1, 3).log_softmax(-1)
    flat, sharp = (gumbel.assign(log_p, step)[0].amax(-1).mean() for step in (0, 10))
    assert flat < 0.6 < 0.95 < sharp


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("gumbel", {"temperature": "linear:1:0"}, "temperature=linear:1:0: must be above 0 at every step"),
        ("gumbel", {"temperature": "-1"}, "temperature=-1: must be above 0"),
        ("gumbel", {"temperature": "cosine:1"}, "temperature=cosine:1: must be a number, or"),
        ("gumbel", {"entropy": "exact", "iaf_flows": 1}, "entropy=exact: .* use entropy=draw or iaf_flows=0"),
        ("gumbel", {"num_samples": 0}, "num_samples=0: must be from 1 to"),
        ("categorical", {"estimator": "rloo", "num_samples": 1}, "num_samples=1: is too few for estimator=rloo; use 2"),
        ("categorical", {"estimator": "rloo", "iaf_flows": 1}, "estimator=rloo: would not train iaf_flows"),
        ("categorical", {"iaf_flows": -1}, "iaf_flows=-1: must be at least 0"),
        ("deterministic", {"num_codes": 1}, "num_codes=1: must be from 2 to"),
    ],
)
def test_impossible_options_are_refused(name, options, message):
    with pytest.raises(OptionError, match=f"^{name} {message}"):
        make(name, **options)


@pytest.mark.parametrize("name", ["deterministic", "categorical", "gumbel"])
def test_the_most_likely_code_is_the_nearest(name):
    bottleneck, features = make(name, num_codes=9, init="normal").eval(), torch.randn(4, 6, 2, 4)
    f, table = rows(bottleneck.projection(features)), bottleneck.code_vectors()
    assert_nearest(bottleneck.quantize(features).codes.flatten(), f, table)
    if name == "deterministic":  # evaluation computes the distances to all codes
        assert_nearest(bottleneck(features, 0).codes.flatten(), f, table)


@pytest.mark.parametrize("name", ["deterministic", "categorical", "gumbel"])
def test_codes_start_at_the_centers_of_the_features(name):
    bottleneck, centers = make(name, (2, 3), num_codes=12, code_dim=6), 3 * torch.randn(12, 6)
    features = centers[torch.randint(12, (40, 2, 3))].movedim(-1, 1)
    bottleneck.initialize(features)
    found = bottleneck.quantize(features)
    assert len(found.codes.unique()) == 12
    assert torch.allclose(found.z, features, atol=1e-3)


@pytest.mark.parametrize("options", [{}, {"entropy": "exact"}, {"posterior": "linear", "num_samples": 3}])
def test_the_entropy_of_the_posterior_is_that_of_an_images_codes_averaged_over_images(options):
    bottleneck, features = make("gumbel", (2, 4), num_codes=5, init="normal", **options), torch.randn(3, 6, 2, 4)
    logits = bottleneck.logits(features, bottleneck.code_vectors().clone())[0].detach()
    expected = torch.distributions.Categorical(logits=logits).entropy().sum((1, 2)).mean().item()
    for training in (False, True):
        stats = bottleneck.train(training)(features, 0).stats
        assert stats["posterior_entropy"].item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("deterministic", {}),
        ("categorical", {}),
        ("categorical", {"average_samples": False, "iaf_flows": 1}),
        ("categorical", {"estimator": "rloo"}),
        ("gumbel", {"num_samples": 10}),
        ("gumbel", {"iaf_flows": 1, "hard": True}),
        ("gumbel", {"posterior": "linear", "entropy": "exact"}),
    ],
)
def test_nothing_is_decided_by_values_on_the_device(name, options):
    bottleneck = make(name, (10, 1), 16, **options).to("meta")  # tensors on it have no values
    features = torch.randn(4, 16, 10, 1, device="meta", requires_grad=True)
    latent = bottleneck(features, 0)
    (latent.z.sum() + latent.log_q.sum() + latent.loss).backward()
    assert features.grad.shape == features.shape
    assert bottleneck.eval()(features, 0).codes.shape == (4, 10, 1)
    assert bottleneck.quantize(features).codes.shape == (4, 10, 1)


def points(n: int, latents: int = 3, codes: int = 4) -> torch.Tensor:
    return torch.distributions.Dirichlet(torch.ones(codes, dtype=torch.float64)).sample((n, latents))


def random_flow(parameters: str, latents: int = 3, codes: int = 4) -> SimplexFlow:
    flow = SimplexFlow(latents, codes, parameters=parameters).double()
    for p in flow.parameters():
        nn.init.normal_(p, std=0.5)
    return flow.eval()


@pytest.mark.parametrize("parameters", ["transformer", "triangular"])
def test_the_simplex_flow_starts_as_the_identity(parameters):
    w, log_det = SimplexFlow(3, 4, parameters=parameters).double()(points(5))
    torch.manual_seed(0)
    assert torch.allclose(log_det, torch.zeros(5, dtype=torch.float64), atol=1e-6)
    given = points(5)
    assert torch.allclose(SimplexFlow(3, 4, parameters=parameters).double()(given)[0], given, atol=1e-6)
    assert torch.allclose(w.sum(-1), torch.ones(5, 3, dtype=torch.float64))


@pytest.mark.parametrize("parameters", ["transformer", "triangular"])
def test_the_simplex_flows_log_determinant_is_autograds_on_the_free_coordinates(parameters):
    flow, given = random_flow(parameters), points(3)

    def free(y):
        y = y.view(1, 3, 3)
        return flow(torch.cat([y, 1 - y.sum(-1, keepdim=True)], -1))[0][..., :-1].flatten()

    for w in given:
        jacobian = torch.autograd.functional.jacobian(free, w[:, :-1].flatten())
        assert flow(w[None])[1].item() == pytest.approx(torch.linalg.slogdet(jacobian)[1].item(), abs=1e-9)
        blocks = jacobian.view(3, 3, 3, 3)  # [latent out, code, latent in, code]
        assert all(blocks[i, :, j].abs().max() == 0 for i in range(3) for j in range(i + 1, 3))
        assert blocks[2, :, 0].abs().max() > 1e-6  # the past is seen


@pytest.mark.parametrize("parameters", ["transformer", "triangular"])
def test_the_simplex_flow_keeps_the_corners(parameters):
    flow = random_flow(parameters)
    corners = torch.eye(4, dtype=torch.float64)[torch.randint(4, (6, 3))]
    assert torch.allclose(flow(corners)[0], corners)


def test_a_flow_changes_the_density_of_relaxed_draws_and_not_that_of_points():
    features = torch.randn(3, D, L, 1)
    for name, changes in (("gumbel", True), ("categorical", False)):
        bottleneck = tiny(name, iaf_flows=1, iaf_parameters="triangular", num_samples=2).bottleneck.train()
        log_q = []
        for weight in (0.0, 1.0):
            bottleneck.flows[0].weight.data.fill_(weight)
            bottleneck.codebook.vectors.copy_(torch.eye(K, D))
            torch.manual_seed(0)
            log_q.append(bottleneck(features, 0).log_q)
        assert torch.allclose(*log_q) is not changes


def test_the_prior_never_sees_present_or_future_assignments():
    prior = tiny().prior
    for position in range(L):
        w = torch.rand(1, K, L, 1, requires_grad=True)
        prior.logits(w)[0, :, position].square().sum().backward()
        seen = w.grad[0, :, :, 0].abs().sum(0) > 0
        assert seen.tolist() == [i < position for i in range(L)]


def test_assignments_at_the_corners_cost_what_their_codes_cost():
    prior = tiny().prior
    codes = torch.randint(K, (5, L, 1))
    w = torch.nn.functional.one_hot(codes, K).movedim(-1, 1).float()
    latent = Latent.of_codes(codes)
    assert torch.allclose(prior.log_prob(latent), prior.log_prob(latent._replace(assignments=w)), atol=1e-5)


def test_soft_assignments_update_the_codebook_as_computed_by_hand():
    options = EMAOptions(num_codes=3, decay=0.9, epsilon=0.0, init="normal")
    book = Codebook(options, 2, forgets_start=False)
    first, f = book.vectors.double().clone(), torch.randn(8, 2)
    w = torch.rand(8, 3).softmax(-1)
    book.ema_update(w.sum(0), w.T @ f, f, 0)
    start = 8 / 3  # vectors per code in an average batch
    count = 0.9 * start + 0.1 * w.double().sum(0)
    expected = (0.9 * start * first + 0.1 * w.double().T @ f.double()) / count[:, None]
    assert torch.allclose(book.vectors.double(), expected, atol=1e-5)
