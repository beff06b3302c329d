"""Held-out figures: per-example values over a whole split, summed once, exact on the ragged last batch.

B batch, C channels, H W pixels, S importance samples, K codes.
"""

import math
from typing import Any

import torch
from torch import Tensor

from vqvae.bottlenecks.codebook import perplexity


@torch.no_grad()
def evaluate(
    model, images: Tensor, labels: Tensor, *, batch_size: int = 256, iw_samples: int = 0, seed: int = 0
) -> dict[str, Any]:
    """What an autoencoder does to images it was not trained on (`[N, C, H, W]` uint8, or float points).

    Nats are per image, over the whole split, with one draw of z, hard where it is relaxed in training (the one there
    is, where the posterior is a point); likeness and code usage are of the likeliest z, without noise. `_se` is the
    standard error of the mean over images. Keys:

    neg_elbo, neg_elbo_se      -log p(x|z) + log q(z|x) - log p(z)
    reconstruction_nats, rate  its two halves: -log p(x|z), and log q(z|x) - log p(z)
    prior_nats, entropy        the rate's two parts: -log p(z), and -log q(z|x)
    iw_bound, iw_bound_se      the importance-weighted bound with S = iw_samples draws (1509.00519, eq. 8), if asked
    bits_per_dim               neg_elbo in bits per pixel and channel, where the likelihood is of 8-bit pixels
    mse, nmse, psnr            of the mean pictures in [0, 1]; nmse is mse over the training data's variance; psnr in
                               dB, the mean over images
    active_units               latent dimensions whose posterior mean varies over images by more than 0.01
                               (1509.00519, section 4): the others have collapsed onto the prior
    bits_per_code              what the prior pays for a code; uniform_bits_per_code is log2 K, for knowing nothing
    perplexity, active_codes   of the code usage over the whole split; `usage` are its counts `[levels, K]`, and
                               codebook_size = levels * K
    and the mean of every monitor that the bottleneck reports (commitment ...).
    """
    training = model.training
    model.eval()
    rows: dict[str, list[Tensor]] = {}
    sums: dict[str, float] = {}
    usage, means = None, []
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for batch, batch_labels in zip(images.split(batch_size), labels.split(batch_size), strict=True):
            x = batch.to(model.device)
            x = x.float() / 255 if x.dtype == torch.uint8 else x
            y = batch_labels.to(model.device)
            features = model.features(x)
            elbo = model.elbo_of(features, x, y)
            values = _bound(elbo)
            if iw_samples and model.bottleneck.stochastic:
                draws = (model.elbo_of(features, x, y).nats.cpu().double() for _ in range(iw_samples))
                values["iw_bound"] = math.log(iw_samples) - torch.stack(list(draws)).logsumexp(0)  # of [S, B]
            elif iw_samples:  # all draws are the same
                values["iw_bound"] = values["neg_elbo"]
            latent, pictures = elbo.latent, model.likelihood.mean(elbo.params)
            if model.bottleneck.stochastic:
                latent = model.bottleneck.mode(features)
                pictures = model.pictures(latent.z)
            values |= _likeness(pictures, x, model.shows_pictures)
            for name, value in values.items():
                rows.setdefault(name, []).append(value.cpu().double())
            for name, value in elbo.latent.stats.items():
                sums[name] = sums.get(name, 0) + len(x) * float(value)
            if latent.codes is None:
                means.append(latent.z.flatten(1).cpu().double())
            else:
                counts = model.bottleneck.usage(latent.codes)
                usage = counts.cpu().double() if usage is None else usage + counts.cpu()
    model.train(training)

    results: dict[str, Any] = {name: value / len(images) for name, value in sums.items()}
    for name, parts in rows.items():
        values = torch.cat(parts)
        results[name] = float(values.mean())
        results[f"{name}_se"] = float(values.std() / math.sqrt(len(values))) if len(values) > 1 else math.nan
    results["nmse"] = results["mse"] / model.data_variance
    if model.likelihood.discrete:
        results["bits_per_dim"] = results["neg_elbo"] / (model.dimensions * math.log(2))
    if means:
        results["active_units"] = int((torch.cat(means).var(dim=0) > 0.01).sum())
    if usage is not None:
        results["perplexity"] = float(perplexity(usage))
        results["active_codes"] = int((usage > 0).sum())
        results["codebook_size"] = usage.numel()
        results["codes_per_image"] = math.prod(model.bottleneck.grid)
        results["bits_per_code"] = results["prior_nats"] / (results["codes_per_image"] * math.log(2))
        results["uniform_bits_per_code"] = math.log2(model.bottleneck.num_codes)
        results["usage"] = usage.long().cpu()
    return results


def _bound(elbo) -> dict[str, Tensor]:
    """The bound and its parts, each `[B]`."""
    return {
        "neg_elbo": -elbo.nats,
        "reconstruction_nats": -elbo.log_likelihood,
        "rate": elbo.log_posterior - elbo.log_prior,
        "prior_nats": -elbo.log_prior,
        "entropy": -elbo.log_posterior,
    }


def _likeness(pictures: Tensor, x: Tensor, shows_pictures: bool) -> dict[str, Tensor]:
    """How near pictures `[B, C, H, W]` come to x, each `[B]`."""
    mse = (pictures - x).square().flatten(1).mean(1)
    return {"mse": mse, "psnr": -10 * mse.clamp(min=1e-10).log10()} if shows_pictures else {"mse": mse}
