"""Held-out metrics: one pass over a split, per-example values summed once, exact on the ragged last batch.

Several processes share every batch, and each gets the metrics of the whole split.

B batch, N examples, C channels, H W pixels, S importance samples, h w code grid.
"""

import contextlib
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from vqvae import distributed, metrics, shares
from vqvae.autoencoder import Autoencoder, Elbo, unit_range
from vqvae.contracts import Latent, evaluating
from vqvae.errors import OptionError
from vqvae.features import Net
from vqvae.randomness import forked, stream

MOST_POINTS = 2**16  # posterior means that are kept for the plot of a latent plane


def weighable(model: Autoencoder) -> bool:
    """Whether the model has an importance-weighted bound.

    A stochastic posterior has none if the prior only estimates a bound of log p: the mean would exceed the bound.
    """
    return model.prior.exact or not model.bottleneck.stochastic


@torch.no_grad()
def evaluate(
    model: Autoencoder,
    images: Tensor,
    labels: Tensor,
    *,
    batch_size: int | None = None,
    iw_samples: int = 0,
    seed: int = 0,
    nets: Sequence[Net] = (),
    samples: Iterable[Tensor] = (),
) -> dict[str, Any]:
    """Metrics of an autoencoder on images `[N, C, H, W]` (uint8, or float points) that it was not trained on.

    metrics.py explains each metric. Nats are per image with one draw of z, a hard draw where training relaxes it. MSE,
    PSNR, code usage and active units use the most likely z. `<metric>_se` is the standard error of a mean over
    images. Scalars that the bottleneck monitors (commitment ...) are averaged; `usage` counts the codes, `[levels, K]`.
    If the latent is a plane, `posterior` has the `means` `[N, 2]` and `labels` `[N]` of all images, or of
    `MOST_POINTS` evenly chosen ones.

    `iw_samples` = S adds the importance-weighted bound with S draws. `nets` (features.py) adds metrics in the nets'
    features, of the reconstructions and of `samples`: batches of images `[B, C, H, W]` in [0, 1] that the model drew.

    Raises `OptionError` for `iw_samples` of a model that has no such bound (`weighable`).
    """
    if iw_samples and not weighable(model):
        problem = (
            "the prior only bounds log p(z), and importance weights would exceed the bound; use 0, or another prior"
        )
        raise OptionError("iw_samples", iw_samples, problem)
    totals = Totals()
    with evaluating(model), seeded(seed, model.device):
        for batch, batch_labels in shares.batches(batch_size or model.at_once, images, labels):
            x, y = unit_range(batch.to(model.device)), batch_labels.to(model.device)
            features = model.features(x)
            elbo = model.elbo_of(features, x, y)
            bounds = {"iw_bound": _iw_bound(model, features, elbo, y, iw_samples)} if iw_samples else {}
            latent, shown = elbo.latent, model.likelihood.center(elbo.params)
            if model.bottleneck.stochastic:
                latent = model.bottleneck.quantize(features)
                shown = model.decode_latents(latent.need_z())
            distances: dict[str, Tensor] = {}
            for net in nets:
                distances |= net.distances(shown, x)
                totals.add_features("images", net.features(x))
                totals.add_features("reconstructions", net.features(shown))
            examples = metrics.Examples(
                elbo.log_prior, elbo.log_likelihood, elbo.log_posterior, x, shown, model.shows_images,
                distances=distances,
            )  # fmt: skip
            totals.add(metrics.of_examples(examples) | bounds, elbo.latent.stats)
            if model.discrete is None:
                totals.add_latents(latent.need_z())
            elif not model.discrete.counted:
                totals.add_codes(latent.need_codes())
            else:
                totals.add_usage(model.discrete.usage(latent.need_codes()))
        for drawn in samples:  # the same in all processes, of which each takes a share
            for (mine,) in shares.batches(len(drawn), drawn):
                for net in nets:
                    totals.add_features("samples", net.features(mine))
    totals = Totals.of_shares(distributed.gather_objects(totals))
    results = distributed.on_first(lambda: totals.results(facts_of(model)))
    if model.discrete is None and model.bottleneck.code_dim == 2:
        count = min(len(images), MOST_POINTS)
        kept = torch.arange(count) * len(images) // count
        results["posterior"] = {"means": torch.cat(totals.latents)[kept].float(), "labels": labels.cpu()[kept].long()}
    return results


def _iw_bound(model: Autoencoder, features: Tensor, elbo: Elbo, labels: Tensor, samples: int) -> Tensor:
    """The importance-weighted bound on -log p(x) with S draws, `[B]` nats (1509.00519, eq. 8).

    A draw consists of z and the noise of a likelihood that is itself a bound. If the posterior is one point, only the
    noise differs between draws. Without noise, too, the bound is the -ELBO.
    """

    def draw() -> Tensor:
        if model.bottleneck.stochastic:
            return model.elbo_of(features, elbo.x, labels).nats
        return model.likelihood.log_prob(elbo.params, elbo.x) - elbo.log_posterior + elbo.log_prior

    if not (model.bottleneck.stochastic or model.likelihood.stochastic):
        return -elbo.nats
    draws = [draw().cpu().double() for _ in range(samples)]
    return math.log(samples) - torch.stack(draws).logsumexp(0)  # over [S, B]


@torch.no_grad()
def evaluate_prior(
    model: Autoencoder,
    codes: Tensor,
    labels: Tensor,
    *,
    conditional: bool,
    batch_size: int | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Metrics of a model's prior on held-out codes `[N, h, w]`: nats per image, bits per code, and what follows.

    A prior that estimates a bound of log p draws from generators seeded with `seed`.
    """
    totals = Totals()
    with evaluating(model.prior), seeded(seed, model.device):
        for batch, batch_labels in shares.batches(batch_size or model.codes_at_once, codes, labels):
            log_prior = log_prior_of_codes(model, batch.to(model.device), batch_labels.to(model.device), conditional)
            totals.add(metrics.of_examples(metrics.Examples(log_prior)))
    totals = Totals.of_shares(distributed.gather_objects(totals))
    return distributed.on_first(lambda: totals.results(facts_of(model)))


def log_prior_of_codes(model: Autoencoder, codes: Tensor, labels: Tensor, conditional: bool) -> Tensor:
    """log p of codes `[B, h, w]` in nats, `[B]`."""
    return model.prior.log_prob(Latent.of_codes(codes.long()), labels if conditional else None)


def facts_of(model: Autoencoder) -> metrics.Facts:
    """The facts about a model that metrics need."""
    return metrics.Facts(
        dimensions=model.dimensions,
        data_variance=model.data_variance,
        eight_bit=model.likelihood.discrete,
        num_codes=None if model.discrete is None else model.discrete.num_codes,
        codes_per_image=math.prod(model.bottleneck.grid),
    )


@contextlib.contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Random draws, on the CPU and the device, that depend on the seed only; the generators get their states back."""
    with forked(device):
        torch.manual_seed(stream(seed, "evaluation"))
        shares.seed(stream(seed, "evaluation"))
        yield


class Totals:
    """Sums up a split: per-example values, means over batches, code usage and posterior means."""

    def __init__(self) -> None:
        self.rows: dict[str, list[Tensor]] = {}
        self.sums: dict[str, float] = {}
        self.count = 0
        self.usage: Tensor | None = None
        self.latents: list[Tensor] = []
        self.features: dict[str, dict[str, list[Tensor]]] = {}
        self.codes: list[Tensor] = []

    @classmethod
    def of_shares(cls, shares: Sequence["Totals"]) -> "Totals":
        """Join the totals of processes that shared each batch of a split, in the order of its examples."""
        if len(shares) == 1:
            return shares[0]
        whole, first = cls(), shares[0]  # the first has rows of every batch
        for name in first.rows:
            whole.rows[name] = _interleaved([share.rows.get(name, []) for share in shares])
        for word, sets in first.features.items():
            whole.features[word] = {
                which: _interleaved([share.features.get(word, {}).get(which, []) for share in shares]) for which in sets
            }
        whole.sums = {name: sum(share.sums.get(name, 0.0) for share in shares) for name in first.sums}
        whole.count = sum(share.count for share in shares)
        whole.latents = _interleaved([share.latents for share in shares])
        whole.codes = _interleaved([share.codes for share in shares])
        for share in shares:
            if share.usage is not None:
                whole.add_usage(share.usage)
        return whole

    def add(self, values: Mapping[str, Tensor], stats: Mapping[str, Tensor] | None = None) -> None:
        """Add a batch's per-example values, each `[B]`, and its scalars, which are weighted by B."""
        size = len(next(iter(values.values())))
        for name, value in values.items():
            self.rows.setdefault(name, []).append(value.cpu().double())
        for name, value in (stats or {}).items():
            self.sums[name] = self.sums.get(name, 0) + size * float(value)
        self.count += size

    def add_usage(self, counts: Tensor) -> None:
        counts = counts.cpu().double()
        self.usage = counts if self.usage is None else self.usage + counts

    def add_codes(self, codes: Tensor) -> None:
        """Add codes `[B, ...]` of a single level that are too many to count each."""
        self.codes.append(codes.flatten().cpu().int())

    def add_latents(self, means: Tensor) -> None:
        """Add posterior means `[B, D, ...]`."""
        self.latents.append(means.flatten(1).cpu().double())

    def add_features(self, which: str, features: Mapping[str, Tensor]) -> None:
        """Add features `[B, F]`, by the word that asks for metrics in them; `which` is a field of `Features`."""
        for word, values in features.items():
            self.features.setdefault(word, {}).setdefault(which, []).append(values.cpu())

    def results(self, facts: metrics.Facts) -> dict[str, Any]:
        """Every mean, its standard error as `<name>_se`, whole-set metrics, and `usage` `[levels, K]` as int64.

        A single example has no standard errors.
        """
        results: dict[str, Any] = {name: total / self.count for name, total in self.sums.items()}
        for name, parts in self.rows.items():
            values = torch.cat(parts)
            results[name] = float(values.mean())
            if len(values) > 1:
                results[f"{name}_se"] = float(values.std() / math.sqrt(len(values)))
        latents = torch.cat(self.latents) if self.latents else None
        features = {
            word: metrics.Features(**{which: torch.cat(parts) for which, parts in sets.items()})
            for word, sets in self.features.items()
        }
        usage = torch.cat(self.codes).unique(return_counts=True)[1].double()[None] if self.codes else self.usage
        results |= metrics.of_split(metrics.Split(results, facts, usage, latents, features))
        if self.usage is not None:
            results["usage"] = self.usage.long()
        return results


def _interleaved(lists: list[list[Tensor]]) -> list[Tensor]:
    """The first entries of all lists, then their second ones, and so on."""
    return [entry for entries in itertools.zip_longest(*lists) for entry in entries if entry is not None]
