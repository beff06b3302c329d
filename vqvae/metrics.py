"""Metrics: one row each, read by the terminal, TensorBoard, the curves, `--help` and both evaluations.

A row has a function of the examples of a batch, whose values are averaged over a split with a standard error, or a
function of the whole split. A function returns None where its metric does not apply. Rows with `monitored` are computed
in training too, from the batch at hand and the averages over steps.

This module imports no torch, because `--help` prints its table.

B batch, N examples, C channels, H W pixels, D latent dimension, K codes.
"""

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

EVALUATION, EVALUATION_OF_BEST = "evaluation.json", "evaluation-best.json"  # of checkpoint.pt and best.pt, next to them


class Examples(NamedTuple):
    """The quantities of each example of a batch. Stage two knows only `log_prior`."""

    log_prior: "Tensor"  # [B] nats, log p(z)
    log_likelihood: "Tensor | None" = None  # [B] nats, log p(x|z)
    log_posterior: "Tensor | None" = None  # [B] nats, log q(z|x)
    images: "Tensor | None" = None  # [B, C, H, W] in [0, 1]
    shown: "Tensor | None" = None  # [B, C, H, W], the model's reconstructions
    are_images: bool = True  # False for points of the plane
    relaxed: bool = False  # whether z lies between codes, as some bottlenecks draw it in training
    distances: "Mapping[str, Tensor]" = {}  # [B] each, those of nets that compare images


class Facts(NamedTuple):
    """The facts about a model that metrics need."""

    dimensions: int  # C H W
    data_variance: float  # of the training data
    eight_bit: bool  # whether the likelihood is a probability of 8-bit pixels
    num_codes: int | None  # K; None for continuous latents
    codes_per_image: int


class Features(NamedTuple):
    """Features `[N, F]` of a net, for the images of a split, their reconstructions, and samples of the model."""

    images: "Tensor"
    reconstructions: "Tensor"
    samples: "Tensor | None" = None


class Split(NamedTuple):
    """The quantities of a whole split, or in training of the steps so far."""

    means: Mapping[str, float]  # per-example metrics, averaged
    facts: Facts
    usage: "Tensor | None" = None  # [levels, K], how often each code was used; for K above 2^20, [1, number used]
    latents: "Tensor | None" = None  # [N, D], posterior means
    features: Mapping[str, Features] = {}  # by the word that asks for metrics in them


class Metric(NamedTuple):
    """One metric."""

    name: str
    explanation: str
    per_example: "Callable[[Examples], Tensor | None] | None" = None  # values [B]
    whole_set: "Callable[[Split], float | None] | None" = None
    monitored: bool = False  # computed in training too
    label: str = ""  # short name on the terminal, which shows only metrics that have one
    form: str = "{}"  # format of its values there
    curve: str = ""  # label of its curve; "" draws none
    logarithmic: bool = False
    constant: bool = False  # the same after every epoch: no chart
    asked: str = ""  # the word that asks for it; "" is computed in every evaluation
    heading: str = ""  # of its column in a table of runs; "" has none
    largest_first: bool = False  # when runs are sorted by it


# per example


def _terms(e: Examples) -> "Tensor | None":
    if e.log_likelihood is None or e.log_posterior is None:
        return None
    return -(e.log_likelihood - e.log_posterior + e.log_prior)


def _neg_elbo(e: Examples) -> "Tensor | None":
    return None if e.relaxed else _terms(e)


def _relaxed_nats(e: Examples) -> "Tensor | None":
    return _terms(e) if e.relaxed else None


def _reconstruction_nats(e: Examples) -> "Tensor | None":
    return None if e.log_likelihood is None else -e.log_likelihood


def _rate(e: Examples) -> "Tensor | None":
    return None if e.log_posterior is None else e.log_posterior - e.log_prior


def _prior_nats(e: Examples) -> "Tensor":
    return -e.log_prior


def _entropy(e: Examples) -> "Tensor | None":
    return None if e.log_posterior is None else -e.log_posterior


def _mse(e: Examples) -> "Tensor | None":
    if e.images is None or e.shown is None:
        return None
    return (e.shown - e.images).square().flatten(1).mean(1)


def _psnr(e: Examples) -> "Tensor | None":
    mse = _mse(e)
    return -10 * mse.clamp(min=1e-10).log10() if mse is not None and e.are_images else None


def _ssim(e: Examples) -> "Tensor | None":
    if e.images is None or e.shown is None or not e.are_images:
        return None
    from vqvae.ssim import ssim

    return ssim(e.shown, e.images)


def _lpips(e: Examples) -> "Tensor | None":
    return e.distances.get("lpips")


# whole set


def _nmse(s: Split) -> float | None:
    return s.means["mse"] / s.facts.data_variance if "mse" in s.means else None


def _psnr_of_mse(s: Split) -> float | None:
    return -10 * math.log10(max(s.means["mse"], 1e-10)) if {"mse", "psnr"} <= set(s.means) else None


def _bits_per_dim(s: Split) -> float | None:
    if not s.facts.eight_bit or "neg_elbo" not in s.means:
        return None
    return s.means["neg_elbo"] / (s.facts.dimensions * math.log(2))


def _bits_per_code(s: Split) -> float | None:
    if s.facts.num_codes is None or "prior_nats" not in s.means:
        return None
    return s.means["prior_nats"] / (s.facts.codes_per_image * math.log(2))


def _uniform_bits_per_code(s: Split) -> float | None:
    return None if s.facts.num_codes is None else math.log2(s.facts.num_codes)


def _code_bits_per_dim(s: Split) -> float | None:
    if s.facts.num_codes is None or "prior_nats" not in s.means:
        return None
    return s.means["prior_nats"] / (s.facts.dimensions * math.log(2))


def _code_perplexity(s: Split) -> float | None:
    bits = _bits_per_code(s)
    return None if bits is None else 2**bits if bits < 1000 else math.inf


def _perplexity(s: Split) -> float | None:
    return None if s.usage is None else float(perplexity(s.usage))


def _active_codes(s: Split) -> int | None:
    return None if s.usage is None else int((s.usage > 0).sum())


def _codebook_size(s: Split) -> int | None:
    return None if s.usage is None or s.facts.num_codes is None else len(s.usage) * s.facts.num_codes


def _codes_per_image(s: Split) -> int | None:
    return None if s.facts.num_codes is None else s.facts.codes_per_image


def _active_units(s: Split) -> int | None:
    if s.latents is None or len(s.latents) < 2:
        return None
    return int((s.latents.var(dim=0) > 0.01).sum())


def perplexity(usage: "Tensor") -> "Tensor":
    """exp(-sum p log p) of usage counts or shares `[..., K]`, averaged over levels.

    The number of codes that, used equally often, would have the same entropy.
    """
    import torch

    share = usage.float() / usage.float().sum(dim=-1, keepdim=True).clamp(min=1e-12)
    return torch.special.entr(share).sum(dim=-1).exp().mean()


def _in_features(
    word: str, name: str, heading: str, distance: str, what: str, note: str, **more: Any
) -> tuple[Metric, Metric]:
    """Two metrics in a net's features, of reconstructions (r...) and samples (g...); `distance` is in features.py."""

    def row(letter: str, which: str) -> Metric:
        def value(s: Split) -> float | None:
            found = getattr(s.features[word], which) if word in s.features else None
            if found is None:
                return None
            from vqvae import features

            return getattr(features, distance)(found, s.features[word].images)

        explanation = f"{what} of {which}; {note}"
        return Metric(letter + name, explanation, whole_set=value, asked=word, heading=letter + heading, **more)

    return row("r", "reconstructions"), row("g", "samples")


TABLE = (
    Metric(
        "mse", "mean squared error of images in [0, 1]",
        per_example=_mse, monitored=True, label="MSE", form="{:.5f}", heading="MSE",
    ),
    Metric(
        "nmse", "MSE / variance of the training data, as Sonnet prints it",
        whole_set=_nmse, monitored=True, label="MSE/var", form="{:.4f}", curve="MSE / data variance", logarithmic=True,
    ),
    Metric(
        "psnr", "peak signal-to-noise ratio in dB, averaged over images; higher is better",
        per_example=_psnr, label="PSNR", form="{:.2f}", curve="PSNR, dB", heading="PSNR", largest_first=True,
    ),
    Metric("psnr_of_mse", "peak signal-to-noise ratio in dB of the mean MSE; at most psnr", whole_set=_psnr_of_mse),
    Metric(
        "ssim", "structural similarity, averaged over images of 11x11 or more; at most 1, higher is better",
        per_example=_ssim, form="{:.4f}", heading="SSIM", largest_first=True,
    ),
    Metric(
        "lpips", "learned perceptual distance (1801.03924) of images and reconstructions",
        per_example=_lpips, asked="lpips", form="{:.4f}", heading="LPIPS",
    ),
    *_in_features(
        "fid", "fid", "FID", "frechet", "Fréchet Inception distance (1706.08500)",
        "comparable only at equal numbers of images", form="{:.2f}",
    ),
    *_in_features(
        "kid", "kid", "KID", "kernel_distance", "kernel Inception distance (1801.01401)",
        "not biased by the number of images", form="{:.5f}",
    ),
    *_in_features(
        "is", "is", "IS", "inception_score", "Inception score (1606.03498)", "higher is better", form="{:.2f}",
        largest_first=True,
    ),
    *_in_features(
        "lite0", "fd_lite0", "FD-Lite0", "frechet", "Fréchet distance in features of EfficientNet-Lite0",
        "not FID: comparable only with itself, at equal numbers of images", form="{:.2f}",
    ),
    Metric(
        "neg_elbo", "-ELBO = -log p(x|z) + log q(z|x) - log p(z) in nats per image, one draw of z; lower is better; "
        "comparable between models with the same likelihood",
        per_example=_neg_elbo, monitored=True, label="-ELBO", form="{:.1f}", curve="-ELBO, nats per image",
    ),
    Metric(
        "relaxed_nats", "the terms of -ELBO in training where z lies between codes: no bound on -log p(x)",
        per_example=_relaxed_nats, monitored=True,
    ),
    Metric(
        "bits_per_dim", "-ELBO in bits per pixel and channel: of pixels and codes together, where the likelihood is a "
        "probability of 8-bit pixels (code_bits_per_dim: of the codes only)",
        whole_set=_bits_per_dim, label="bits/dim", form="{:.3f}", curve="bits/dim",
    ),
    Metric(
        "reconstruction_nats", "-log p(x|z)",
        per_example=_reconstruction_nats, monitored=True, curve="reconstruction: -log p(x|z), nats",
    ),
    Metric(
        "rate", "log q(z|x) - log p(z)", per_example=_rate, monitored=True, curve="rate: log q - log p, nats",
    ),
    Metric("prior_nats", "-log p(z)", per_example=_prior_nats),
    Metric("entropy", "-log q(z|x)", per_example=_entropy),
    Metric(
        "commitment", "mean squared distance between the encoder's vectors and their codes",
        label="commitment", form="{:.4f}", curve="commitment",
    ),
    Metric(
        "perplexity", "exp of the entropy of code usage over the whole split: how many codes, used equally often, "
        "would be as varied; at most K, and near 1 the codebook has collapsed (batch_perplexity: of one batch)",
        whole_set=_perplexity, monitored=True, label="perplexity", form="{:,.0f}", curve="perplexity of code usage",
        heading="perplexity", largest_first=True,
    ),
    Metric(
        "active_codes", "codes used at least once on the split",
        whole_set=_active_codes, monitored=True, label="active", form="{:,.0f}", curve="active codes",
    ),
    Metric("codebook_size", "levels x K", whole_set=_codebook_size, constant=True),
    Metric("codes_per_image", "codes of one image", whole_set=_codes_per_image, constant=True),
    Metric(
        "active_units", "latent dimensions whose posterior mean varies over images by more than 0.01 (1509.00519, "
        "section 4); the others have collapsed onto the prior",
        whole_set=_active_units, label="active", form="{:,.0f}", curve="active latent units",
    ),
    Metric(
        "bits_per_code", "the prior's cost of a code; log2 K is the cost under a uniform prior",
        whole_set=_bits_per_code, monitored=True, label="bits/code", form="{:.4f}", curve="bits per code",
    ),
    Metric("uniform_bits_per_code", "log2 K", whole_set=_uniform_bits_per_code, constant=True),
    Metric(
        "code_bits_per_dim", "the prior's cost of an image's codes only, in bits per pixel and channel; no bound on "
        "the cost of the pixels, which is bits_per_dim",
        whole_set=_code_bits_per_dim,
    ),
    Metric(
        "code_perplexity", "exp of the prior's nats per code",
        whole_set=_code_perplexity, monitored=True, label="code perplexity", form="{:,.1f}",
    ),
    Metric(
        "iw_bound", "importance-weighted bound on -log p(x) with S draws (1509.00519, eq. 8), if asked for",
    ),
    Metric(
        "probe_accuracy", "share of held-out images whose label a linear probe on their latents gives", asked="probe",
        form="{:.3f}", heading="probe", largest_first=True,
    ),
    Metric("probe_control", "the same, with the latents shuffled among the images: chance", asked="probe",
           form="{:.3f}"),
    Metric("probe_chance", "share of the largest class", asked="probe", form="{:.3f}"),
    Metric(
        "label_bits", "mutual information of a code and the label of its image, in bits; averaged over levels",
        asked="probe", form="{:.4f}", heading="label bits", largest_first=True,
    ),
    Metric("label_bits_control", "the same, with the codes shuffled among the images: the estimate's bias",
           asked="probe", form="{:.4f}"),
)  # fmt: skip
METRICS = {metric.name: metric for metric in TABLE}
PROBE = "probe"  # asks for metrics that also need the training images
WORDS = tuple(dict.fromkeys(metric.asked for metric in TABLE if metric.asked not in ("", PROBE)))


def of_examples(examples: Examples, *, monitored: bool = False) -> dict[str, "Tensor"]:
    """The per-example metrics that apply, each `[B]`; with `monitored`, those computed in training."""
    rows = (m for m in TABLE if m.per_example and (m.monitored or not monitored))
    values = ((m.name, m.per_example(examples)) for m in rows if m.per_example)
    return {name: value for name, value in values if value is not None}


def of_split(split: Split, *, monitored: bool = False) -> dict[str, float]:
    """The whole-set metrics that apply; with `monitored`, those computed in training."""
    rows = (m for m in TABLE if m.whole_set and (m.monitored or not monitored))
    values = ((m.name, m.whole_set(split)) for m in rows if m.whole_set)
    return {name: value for name, value in values if value is not None}


def has_chart(name: str) -> bool:
    """Whether a value is worth a chart: no standard error, and not the same after every epoch."""
    return not name.endswith("_se") and not (name in METRICS and METRICS[name].constant)


def for_json(numbers: Mapping[str, Any]) -> dict[str, Any]:
    """The same entries, with None for numbers that are not finite: JSON has no NaN and no infinity."""
    finite = {k: not isinstance(value, float) or math.isfinite(value) for k, value in numbers.items()}
    return {k: value if finite[k] else None for k, value in numbers.items()}


def line(names: tuple[str, ...], numbers: Mapping[str, float]) -> str:
    """Metrics with their labels on one line, in the order of `names`."""
    shown = ((METRICS[name], numbers[name]) for name in names if name in numbers)
    return ", ".join(f"{metric.label} {metric.form.format(value)}" for metric, value in shown)


def explanations() -> str:
    """The metrics that the terminal shows or that are asked for, for `--help`."""
    shown = {m.name: m.explanation for m in TABLE if m.label or m.asked}
    return "\n".join(explained(shown))


def explained(rows: Mapping[str, str]) -> list[str]:
    """Names and explanations as lines of a help text."""
    import textwrap

    width = max(map(len, rows)) + 4
    return [
        line
        for name, text in rows.items()
        for line in textwrap.wrap(text, 118, initial_indent=f"  {name:{width - 2}}", subsequent_indent=" " * width)
    ]
