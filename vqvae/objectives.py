"""Objectives: the losses of training. One class each; the table at the end names them. Evaluation never sees them."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from torch import Tensor

from vqvae import shares
from vqvae.contracts import Latent, Objective
from vqvae.errors import OptionError
from vqvae.optimizer import decay_groups
from vqvae.registry import Options, Range, Slot
from vqvae.schedules import Schedule, ScheduleText

if TYPE_CHECKING:
    from vqvae.autoencoder import Autoencoder, Elbo


@dataclass(frozen=True, kw_only=True)
class ElboOptions(Options):
    """How the bound's terms are weighted."""

    reduction: Annotated[
        Literal["mean", "sum"], "nats per dimension (mean: with mse, Sonnet's MSE / variance) or per image (sum)"
    ] = "mean"
    kl_weight: Annotated[str, ScheduleText(low=0), "weight of log q(z|x) - log p(z)"] = "1"
    free_bits: Annotated[float, Range(0), "bits per image of log q(z|x) - log p(z) that cost nothing"] = 0.0


class ElboObjective(Objective):
    """The -ELBO: reconstruction + kl_weight * rate, plus the bottleneck's own losses.

    The rate is log q(z|x) - log p(z). Its mean over the batch has no gradient below free_bits (1606.04934, appendix
    C.8, with all of z as one group). With reduction=mean the nats of an image are divided by its dimensions.
    """

    def __init__(self, *, total_steps: int, options: ElboOptions = ElboOptions()):
        super().__init__()
        self.options, self.total_steps = options, total_steps
        self.kl_weight = Schedule.parse(options.kl_weight, "kl_weight")

    def forward(self, elbo: "Elbo", model: "Autoencoder", step: int) -> Tensor:
        nats = -elbo.log_likelihood.mean() - model.likelihood.log_normalizer
        weight, positions = self.kl_weight(step, self.total_steps), self.averaged_over(model)
        rate, free = self.rate(elbo).mean() / positions, self.options.free_bits * math.log(2)
        rate = shares.mean_over(rate, len(elbo.log_prior)) if free else rate
        if rate.requires_grad:  # a fixed prior over a deterministic code costs a constant: nothing to descend
            nats = nats + weight * (rate.clamp(min=free) if free else rate)
        if elbo.latent.score is not None:
            costs = weight * (rate >= free if free else 1) * self.encoders_rate(elbo) / positions
            nats = nats + leave_one_out(costs - elbo.log_likelihood, elbo.latent.score)
        return nats / (model.dimensions if self.options.reduction == "mean" else 1) + elbo.latent.loss

    def rate(self, elbo: "Elbo") -> Tensor:
        """Nats of each example, `[S*B]`."""
        return elbo.log_posterior - elbo.log_prior

    def encoders_rate(self, elbo: "Elbo") -> Tensor:
        """The part of the rate whose gradient reaches the encoder, `[S*B]`."""
        return self.rate(elbo)

    def averaged_over(self, model: "Autoencoder") -> int:
        """The number of code positions over which the rate is averaged; 1 where it is their sum."""
        return 1

    def parameter_groups(self, model: "Autoencoder", weight_decay: float) -> list[dict[str, Any]]:
        return decay_groups(model, weight_decay)


def leave_one_out(costs: Tensor, log_q: Tensor) -> Tensor:
    """A scalar of value 0 whose gradient is an unbiased estimate of that of E_q[cost] through q, from S draws.

    The gradient of a draw's log q, of `[S, B]`, is weighted by its cost, of `[S*B]`, minus the mean cost of the other
    draws of its image (Kool et al. 2019, "Buy 4 REINFORCE samples, get a baseline for free"). Costs get no gradient
    here.
    """
    costs = costs.detach().view_as(log_q)
    advantage = (costs - costs.mean(0)) * len(costs) / (len(costs) - 1)
    return (advantage * (log_q - log_q.detach())).mean()


@dataclass(frozen=True, kw_only=True)
class ProbabilisticOptions(ElboOptions):
    """Options that the experiments on probabilistic VQ-VAEs vary."""

    entropy_scale: Annotated[float, Range(0), "weight of log q(z|x) only; 0 drops the entropy bonus"] = 1.0
    sum_over_latents: Annotated[bool, "sum the rate over code positions, as the bound does; otherwise average"] = True
    stop_gradient_for_prior: Annotated[bool, "keep the prior's gradient from reaching the encoder"] = False
    iaf_startup_steps: Annotated[int, Range(0), "steps before the bottleneck's flows (iaf_flows) train"] = 0
    stop_training_encoder_after_startup: Annotated[bool, "then freeze the encoder; the rest trains on"] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stop_training_encoder_after_startup and not self.iaf_startup_steps:
            raise OptionError("stop_training_encoder_after_startup", "yes", "needs iaf_startup_steps above 0")


class ProbabilisticObjective(ElboObjective):
    """The -ELBO as probabilistic VQ-VAEs vary it (1805.11063 and the experiments probabilistic-1 to -4.2.2).

    Adds a weight of the entropy, the mean over latents in place of the sum, a stopped gradient from prior to encoder,
    and flows that start to train late.
    """

    options: ProbabilisticOptions

    def __init__(self, *, total_steps: int, options: ProbabilisticOptions = ProbabilisticOptions()):
        super().__init__(total_steps=total_steps, options=options)

    def rate(self, elbo: "Elbo") -> Tensor:
        return self.options.entropy_scale * elbo.log_posterior - elbo.log_prior

    def encoders_rate(self, elbo: "Elbo") -> Tensor:
        rate = self.rate(elbo)
        return rate + elbo.log_prior if self.options.stop_gradient_for_prior else rate

    def averaged_over(self, model: "Autoencoder") -> int:
        return 1 if self.options.sum_over_latents else math.prod(model.bottleneck.grid)

    def for_prior(self, latent: Latent) -> Latent:
        return latent.detached() if self.options.stop_gradient_for_prior else latent

    def check(self, model: "Autoencoder") -> None:
        steps = self.options.iaf_startup_steps
        if steps and not model.bottleneck.startup_flows():
            problem = "the bottleneck has no flows; give it some, as in gumbel iaf_flows=1"
            raise OptionError("iaf_startup_steps", steps, problem, owner="probabilistic", slot="objective")

    def freeze(self, model: "Autoencoder", step: int) -> None:
        flows = model.bottleneck.startup_flows()
        if flows is None or not self.options.iaf_startup_steps:
            return
        started = step >= self.options.iaf_startup_steps
        flows.requires_grad_(started)
        encoder_trains = not (started and self.options.stop_training_encoder_after_startup)
        model.encoder.requires_grad_(encoder_trains)
        model.bottleneck.get_submodule("projection").requires_grad_(encoder_trains)


OBJECTIVES = {"elbo": ElboObjective, "probabilistic": ProbabilisticObjective}
SLOT = Slot("objective", OBJECTIVES)
