"""The probabilistic family against enumeration, autograd's Jacobians, finite differences and torch.distributions."""

import itertools
import math

import pytest
import torch
from torch import nn

from train import settle
from vqvae.autoencoder import Autoencoder, Objective, build_autoencoder
from vqvae.bottlenecks import BOTTLENECKS
from vqvae.bottlenecks.categorical import Categorical, Deterministic, Gumbel
from vqvae.bottlenecks.codebook import Codebook
from vqvae.config import PRESETS
from vqvae.errors import UserError
from vqvae.evaluation import evaluate
from vqvae.flows import SimplexFlow
from vqvae.latent import Latent
from vqvae.likelihoods import LIKELIHOODS
from vqvae.priors.transformer import Transformer
from vqvae.training import Plan, optimiser, seed_step

L, K, D = 2, 3, 4
EXPERIMENTS = [name for name in PRESETS if name.startswith("probabilistic-")]


def tiny(kind=Categorical, objective=None, **options) -> Autoencoder:
    """Two latents of three codes, pictures of four binary pixels: all there is can be enumerated."""
    wiring = {"channels": D, "grid": (L, 1), "num_codes": K, "code_dim": D, "init": "normal"}
    if kind is Gumbel:
        wiring["total_steps"] = 1
    model = Autoencoder(
        encoder=nn.Sequential(nn.Flatten(), nn.Linear(4, L * D), nn.Unflatten(1, (D, L, 1))),
        bottleneck=kind(**wiring, **options),
        decoder=nn.Sequential(nn.Flatten(), nn.Linear(L * D, 4), nn.Unflatten(1, (1, 2, 2))),
        likelihood=LIKELIHOODS["bernoulli"](image_shape=(1, 2, 2), data_variance=0.25),
        prior=Transformer(num_codes=K, grid=(L, 1), num_classes=0, layers=1, width=8, heads=2),
        image_shape=(1, 2, 2),
        data_variance=0.25,
        objective=objective or Objective("sum"),
    )
    for p in [*model.encoder.parameters(), *model.decoder.parameters(), *model.prior.parameters()]:
        nn.init.normal_(p, std=0.7)  # so that posteriors, pictures and the prior all differ
    return model


def binary(n: int, *shape: int) -> torch.Tensor:
    return torch.randint(2, (n, *(shape or (1, 2, 2))), dtype=torch.uint8) * 255


@torch.no_grad()
def enumerate_codes(model: Autoencoder, x: torch.Tensor):
    """All K^L codes, and log p(x|z), log p(z), log q(z|x) of each for pictures x: `[n, K^L]`, prior `[K^L]`."""
    codes = torch.tensor(list(itertools.product(range(K), repeat=L))).view(-1, L, 1)
    params = model.decoder(model.bottleneck.embed(codes))
    x_all = x[:, None].expand(-1, len(codes), -1, -1, -1)
    likelihood = torch.stack([model.likelihood.log_prob(params, row) for row in x_all])
    prior = model.prior.log_prob(Latent.of_codes(codes))
    distances = torch.cdist(model.features(x).flatten(2).transpose(1, 2), model.bottleneck.code_vectors())
    log_p = (-distances).log_softmax(-1)  # [n, L, K]
    posterior = sum(log_p[:, position, codes[:, position, 0]] for position in range(L))
    return likelihood, prior, posterior


def test_the_bound_is_below_the_exact_likelihood_and_is_the_enumerated_one():
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
    many = images.repeat(3000, 1, 1, 1)  # both pictures equally often
    for samples, bound in zip((2, 3), bounds[1:], strict=True):
        found = evaluate(model, many, torch.zeros(len(many)), iw_samples=samples, batch_size=3000)
        assert -found["iw_bound"] == pytest.approx(bound, abs=5 * found["iw_bound_se"])
    far = evaluate(model, images, torch.zeros(2), iw_samples=5000)
    assert -far["iw_bound"] == pytest.approx(exact, abs=0.05)


def test_a_point_posterior_needs_one_draw():
    model, images = tiny(Deterministic).eval(), binary(5)
    found = evaluate(model, images, torch.zeros(5), iw_samples=7)
    assert found["iw_bound"] == found["neg_elbo"]
    assert found["entropy"] == 0
    likelihood, prior, _ = enumerate_codes(model, images / 255)
    assert -found["neg_elbo"] <= (likelihood + prior).logsumexp(1).mean().item()


def test_averaged_samples_have_the_multinomials_log_probability():
    bottleneck = Categorical(channels=3, grid=(2, 1), num_codes=5, num_samples=7)
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
    options = {"num_samples": 20_000, "average_samples": average}
    bottleneck = Categorical(channels=3, grid=(1, 1), num_codes=4, **options)
    w, log_q = bottleneck.assign(log_p, 0)
    assert torch.allclose(w.mean(0).view(2, 4), log_p.exp().view(2, 4), atol=0.015)
    if not average:
        expected = (w.argmax(-1, keepdim=True) == torch.arange(4)).float() * log_p
        assert torch.allclose(log_q, expected.flatten(2).sum(2))


def test_samples_that_are_not_averaged_lead_the_batch():
    model = tiny(Categorical, num_samples=6, average_samples=False, decay=1 - 1e-7).train()
    images = binary(3)
    elbo = model.elbo(images / 255)
    assert elbo.nats.shape == (18,)
    assert torch.equal(elbo.x, (images / 255).repeat(6, 1, 1, 1))
    assert torch.allclose(elbo.latent.z, model.bottleneck.embed(elbo.latent.codes), atol=1e-4)
    assert torch.allclose(elbo.latent.assignments.sum(1), torch.ones(18, L, 1))
    model.eval()
    assert model.elbo(images / 255).nats.shape == (3,)


def test_straight_through_has_the_softmaxs_gradient():
    bottleneck = Deterministic(channels=3, grid=(2, 1), num_codes=5)
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
    bottleneck = Gumbel(channels=3, grid=(2, 1), num_codes=5, total_steps=1, num_samples=2, entropy=entropy)

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
    cold = Gumbel(channels=3, grid=(1, 1), num_codes=3, total_steps=1, num_samples=20_000, temperature="0.05")
    w, log_q = cold.assign(log_p, 0)
    assert torch.allclose(w.mean(0).flatten(), log_p.exp().flatten(), atol=0.015)
    assert (w.amax(-1) > 0.95).float().mean() > 0.8
    expected = log_p.flatten()[w.argmax(-1)].flatten()  # exact at the corners
    sharp = w.amax(-1).flatten() > 0.999
    assert torch.allclose(log_q.flatten()[sharp], expected[sharp], atol=0.02)
    hard = Gumbel(channels=3, grid=(1, 1), num_codes=3, total_steps=1, hard=True).assign(log_p, 0)[0]
    assert hard.sum() == pytest.approx(1)
    assert sorted(hard.flatten().tolist())[:2] == pytest.approx([0, 0], abs=1e-6)


def test_the_temperature_follows_its_schedule():
    gumbel = Gumbel(channels=3, grid=(1, 1), num_codes=3, total_steps=100, temperature="linear:5:0.01")
    log_p = torch.zeros(50, 1, 1, 3).log_softmax(-1)
    flat, sharp = (gumbel.assign(log_p, step)[0].amax(-1).mean() for step in (0, 99))
    assert flat < 0.6 < 0.95 < sharp
    for wrong in ("linear:1:0", "-1", "cosine:1"):
        with pytest.raises(UserError, match="temperature"):
            Gumbel(channels=3, grid=(1, 1), total_steps=1, temperature=wrong)


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
        assert blocks[2, :, 0].abs().max() > 1e-6  # and the past is seen


@pytest.mark.parametrize("parameters", ["transformer", "triangular"])
def test_the_simplex_flow_is_inverted_and_keeps_the_corners(parameters):
    flow, w = random_flow(parameters), points(4)
    assert torch.allclose(flow.inverse(flow(w)[0]), w, atol=1e-9)
    corners = torch.eye(4, dtype=torch.float64)[torch.randint(4, (6, 3))]
    assert torch.allclose(flow(corners)[0], corners)


def test_a_flow_changes_the_density_of_relaxed_draws_and_not_that_of_points():
    features = torch.randn(3, D, L, 1)
    for kind, changes in ((Gumbel, True), (Categorical, False)):
        bottleneck = tiny(kind, iaf_flows=1, iaf_parameters="triangular", num_samples=2).bottleneck.train()
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


def test_soft_assignments_move_the_codebook_as_by_hand():
    book = Codebook(3, 2, decay=0.9, epsilon=0.0, forgets_start=False)
    first, f = book.vectors.double().clone(), torch.randn(8, 2)
    w = torch.rand(8, 3).softmax(-1)
    book.follow(w.sum(0), w.T @ f, f)
    start = 8 / 3  # an average batch gives each code so many vectors
    count = 0.9 * start + 0.1 * w.double().sum(0)
    expected = (0.9 * start * first + 0.1 * w.double().T @ f.double()) / count[:, None]
    assert torch.allclose(book.vectors.double(), expected, atol=1e-5)


def test_the_objectives_flags_weigh_the_terms():
    images = binary(4)

    def loss(**flags) -> tuple[float, dict]:
        torch.manual_seed(0)
        model = tiny(num_samples=3, average_samples=False, objective=Objective("sum", **flags))
        out = model(images, None, 0)
        return out.loss.item() - 0.25 * out.metrics["commitment"].item(), out

    full, out = loss()
    nats = {name: out.metrics[name].item() for name in ("reconstruction_nats", "rate")}
    assert full == pytest.approx(sum(nats.values()), rel=1e-5)
    averaged, _ = loss(sum_over_latents=False)
    assert averaged == pytest.approx(nats["reconstruction_nats"] + nats["rate"] / L, rel=1e-5)
    bare, _ = loss(entropy_scale=0.0)
    torch.manual_seed(0)
    model = tiny(num_samples=3, average_samples=False)
    prior_nats = -model.elbo(images / 255).log_prior.mean().item()
    assert bare == pytest.approx(nats["reconstruction_nats"] + prior_nats, rel=1e-4)


def test_without_its_gradient_the_prior_does_not_pull_the_encoder():
    def pull(stop: bool) -> float:
        torch.manual_seed(0)
        model = tiny(objective=Objective("sum", entropy_scale=0.0, stop_gradient_for_prior=stop), beta=0.0)
        for p in model.decoder.parameters():
            p.data.zero_()  # the reconstruction tells the encoder nothing
        model(binary(4), None, 0).loss.backward()
        assert model.prior.embedding.weight.grad.abs().sum() > 0
        return float(model.encoder[1].weight.grad.abs().sum())

    assert pull(stop=False) > 0
    assert pull(stop=True) == 0


@pytest.mark.parametrize("freeze_encoder", [False, True])
def test_what_a_stage_freezes_does_not_move_by_one_bit(freeze_encoder):
    objective = Objective("sum", iaf_startup_steps=3, stop_training_encoder_after_startup=freeze_encoder)
    model = tiny(Gumbel, objective=objective, iaf_flows=1).train()
    plan = Plan(1, 4, None, 0.1, 0, torch.device("cpu"), "fp32", 1, (None, None))
    opt = optimiser(model, plan)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}

    def moved() -> set[str]:
        return {name.split(".")[0] if "flows" not in name else "flows"
                for name, p in model.named_parameters() if not torch.equal(p, before[name])}  # fmt: skip

    for step in range(3):
        seed_step(0, step)
        model(binary(4), None, step).loss.backward()
        opt.step()
        opt.zero_grad()
    assert moved() == {"encoder", "decoder", "prior"}
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for step in range(3, 6):
        seed_step(0, step)
        model(binary(4), None, step).loss.backward()
        opt.step()
        opt.zero_grad()
    assert moved() == {"decoder", "prior", "flows"} | (set() if freeze_encoder else {"encoder"})


def test_a_startup_without_flows_is_refused():
    config = settle({"preset": "probabilistic-3"}, None, None)
    choices = {slot: getattr(config, slot) for slot in ("nets", "bottleneck", "prior", "likelihood")}
    with pytest.raises(UserError, match="iaf_flows=1"):
        build_autoencoder(choices, image_shape=(1, 28, 28), data_variance=0.1, objective=Objective(iaf_startup_steps=5))


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_no_experiments_draw_reads_values_off_the_device(name):
    choice = settle({"preset": name}, None, None).bottleneck
    wiring = {"total_steps": 1} if choice.name == "gumbel" else {}
    bottleneck = BOTTLENECKS[choice.name](channels=16, grid=(10, 1), **wiring, **choice.options).to("meta")
    features = torch.randn(4, 16, 10, 1, device="meta", requires_grad=True)  # which has no values to read
    latent = bottleneck(features, 0)
    (latent.z.sum() + latent.log_q.sum() + latent.loss).backward()
    assert features.grad.shape == features.shape
    assert bottleneck.eval()(features, 0).codes.shape == (4, 10, 1)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_trains_and_is_evaluated(name):
    config = settle({"preset": name}, None, None)
    choices = {slot: getattr(config, slot) for slot in ("nets", "bottleneck", "prior", "likelihood")}
    objective = Objective(
        config.reduction,
        entropy_scale=config.entropy_scale,
        sum_over_latents=config.sum_over_latents,
        stop_gradient_for_prior=config.stop_gradient_for_prior,
        iaf_startup_steps=config.iaf_startup_steps,
        stop_training_encoder_after_startup=config.stop_training_encoder_after_startup,
    )
    model = build_autoencoder(choices, image_shape=(1, 28, 28), data_variance=0.1, objective=objective)
    images = binary(2, 1, 28, 28)
    for step in (0, 5_000):
        out = model(images, None, step)
        out.loss.backward()
        assert out.loss.isfinite()
    found = evaluate(model, images, torch.zeros(2), iw_samples=2)
    assert found["neg_elbo"] == pytest.approx(found["reconstruction_nats"] + found["prior_nats"] - found["entropy"])


def test_the_ten_experiments_are_those_of_the_table():
    table = {  # experiment: bottleneck, summed, entropy, samples, stop gradient, beta, flows, startup, freeze
        "1": ("deterministic", True, 0, None, False, 0.25, None, 0, False),
        "2.1": ("categorical", False, 0, 10, True, 0.25, 0, 0, False),
        "2.2": ("categorical", False, 1, 10, True, 0.05, 0, 0, False),
        "2.3": ("categorical", True, 1, 10, True, 0.05, 0, 0, False),
        "2.4": ("categorical", True, 1, 10, False, 0.05, 0, 0, False),
        "2.5": ("categorical", False, 1, 10, True, 0.05, 1, 5000, True),
        "3": ("gumbel", True, 1, 10, False, 0.05, 0, 0, False),
        "4.1": ("gumbel", True, 1, 10, False, 0.05, 1, 0, False),
        "4.2.1": ("gumbel", True, 1, 10, False, 0.05, 1, 5000, False),
        "4.2.2": ("gumbel", True, 1, 10, False, 0.05, 1, 5000, True),
    }
    found = {}
    for name in EXPERIMENTS:
        c = settle({"preset": name}, None, None)
        o = c.bottleneck.options
        found[name.removeprefix("probabilistic-")] = (
            c.bottleneck.name, c.sum_over_latents, c.entropy_scale, o.get("num_samples"), c.stop_gradient_for_prior,
            o["beta"], o.get("iaf_flows"), c.iaf_startup_steps, c.stop_training_encoder_after_startup,
        )  # fmt: skip
        assert (o["num_codes"], o["code_dim"], o["decay"]) == (64, 16, 0.99)
        assert (c.batch_size, c.max_steps, float(c.lr), c.prior.options["layers"]) == (128, 10_000, 1e-3, 6)
    assert found == table
