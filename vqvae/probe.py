"""How much latents tell of labels: a linear probe, and the mutual information of codes and labels.

N images, D code dimension, K codes, h w code grid, F latent values of an image, Y classes.
"""

import math
import warnings
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vqvae.autoencoder import Autoencoder, unit_range
from vqvae.data.base import Images
from vqvae.errors import OptionError

MOST_IMAGES = 10_000  # that the probe is fitted to, evenly chosen
MOST_VALUES = 4096  # of an image's latent; larger grids are averaged over blocks
STRENGTH = 0.01  # scikit-learn's C, the inverse of the penalty's weight, for latents of variance 1
ITERATIONS = 200


class Latents(NamedTuple):
    """The latents of images that have a label."""

    z: Tensor  # [N, F]
    codes: Tensor | None  # [N, h, w]; None for continuous latents
    labels: Tensor  # [N]


@torch.no_grad()
def probe(model: Autoencoder, train: Images, test: Images, *, seed: int = 0) -> tuple[dict[str, float], str]:
    """Predict labels from an autoencoder's most likely latents; returns metrics and the protocol in words.

    A logistic regression is fitted to the standardized latents of training images and evaluated on `test`. The controls
    repeat everything with the labels shuffled within each split. Images without a label are left out. Raises
    `OptionError` unless there are two classes or more.
    """
    count = min(len(train.labels), MOST_IMAGES)
    picked = torch.arange(count) * len(train.labels) // max(count, 1)
    labels = train.labels[picked]
    if len(labels[labels >= 0].unique()) < 2 or not (test.labels >= 0).any():
        raise OptionError("probe", None, "needs images with labels, of two classes or more; leave it out")
    fitted, held_out = latents(model, train.images[picked], labels), latents(model, *test)
    dealt = [found._replace(labels=_shuffled(found.labels, seed)) for found in (fitted, held_out)]
    results = dict[str, float]()
    for name, hits in (("probe_accuracy", linear_probe(fitted, held_out)), ("probe_control", linear_probe(*dealt))):
        results |= {name: float(hits.mean())}
        if len(hits) > 1:
            results[f"{name}_se"] = float(hits.std() / math.sqrt(len(hits)))
    results["probe_chance"] = float(held_out.labels.bincount().max() / len(held_out.labels))
    for name, found in (("label_bits", held_out), ("label_bits_control", dealt[1])):
        if model.discrete is not None and found.codes is not None:
            each = [model.discrete.usage(found.codes[found.labels == y]) for y in found.labels.unique()]
            results[name] = mutual_information(torch.stack(each))
    import sklearn

    values = f"{fitted.z.shape[1]:,} latent values of {len(fitted.labels):,} training images"
    return results, f"probe: logistic regression (C={STRENGTH}) on {values}, scikit-learn {sklearn.__version__}"


def latents(model: Autoencoder, images: Tensor, labels: Tensor, batch_size: int | None = None) -> Latents:
    """The most likely latents of those images `[N, C, H, W]` whose label is not -1."""
    known = labels >= 0
    z, codes = list[Tensor](), list[Tensor]()
    for batch in images[known].split(batch_size or model.at_once):
        latent = model.quantize(unit_range(batch.to(model.device)))
        z.append(pooled(latent.need_z().float()).cpu())
        if model.discrete is not None:
            codes.append(latent.need_codes().cpu())
    return Latents(torch.cat(z), torch.cat(codes) if codes else None, labels[known])


def pooled(z: Tensor) -> Tensor:
    """Latents `[B, D, h, w]` as `[B, F]`, averaged over blocks of the grid until F is at most `MOST_VALUES`."""
    side = max(1, math.isqrt(MOST_VALUES // z.shape[1]))
    if z[0].numel() > MOST_VALUES:
        z = F.adaptive_avg_pool2d(z, (min(side, z.shape[2]), min(side, z.shape[3])))
    return z.flatten(1)


def linear_probe(fitted: Latents, held_out: Latents) -> Tensor:
    """1 for each held-out image `[N]` whose label a logistic regression gives, 0 for the others."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    regression: Any = make_pipeline(StandardScaler(), LogisticRegression(C=STRENGTH, max_iter=ITERATIONS))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the protocol ends after so many iterations
        regression.fit(fitted.z.numpy(), fitted.labels.numpy())
    return (torch.from_numpy(regression.predict(held_out.z.numpy())) == held_out.labels).double()


def mutual_information(counts: Tensor) -> float:
    """Mutual information of code and label in bits, given how often they occur together `[Y, levels, K]`.

    The plug-in estimate of each level, averaged over levels. It is too large by about (K - 1)(Y - 1) / (2 n ln 2) for n
    codes of which K occur; the control shows by how much.
    """
    joint = counts.double() / counts.double().sum((0, 2), keepdim=True)
    entropies = [torch.special.entr(p).sum((0, -1)) for p in (joint.sum(0, True), joint.sum(2, True), joint)]
    return float((entropies[0] + entropies[1] - entropies[2]).mean() / math.log(2))


def _shuffled(labels: Tensor, seed: int) -> Tensor:
    return labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))]
