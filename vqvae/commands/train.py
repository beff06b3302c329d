"""Train a vector-quantized or variational autoencoder on images, or a prior on the codes of a trained one."""

import argparse
from collections.abc import Collection, Mapping
from typing import Any, Literal

from vqvae import cli, metrics, presets
from vqvae.commands import path
from vqvae.config import add_flags, typed
from vqvae.errors import OptionError
from vqvae.registry import Range

EXAMPLES = f"""
examples
  python train.py                                       a VQ-VAE on scikit-learn's digits, no download
  python train.py --dataset cifar10 --epochs 50         Sonnet's VQ-VAE on CIFAR-10
  python train.py --dataset mnist --codes 128 --code-dim 32
  python train.py --preset sonnet-cifar10 --name paper  a published set-up; other flags override it
  python train.py --dataset folder --data-dir ~/Pictures --image-size 64
  python train.py --bottleneck vq codebook=gradient init=uniform revive=0
  python train.py --bottleneck gumbel --objective elbo reduction=sum free_bits=2
  python train.py --lr linear:0:3e-4:500,cosine:3e-4:1e-6
  python train.py --resume logs/vqvae-cifar10 --epochs 80
  python train.py --prior pixelcnn --checkpoint logs/vqvae-cifar10/checkpoint.pt
  python train.py --evaluate --checkpoint logs/vqvae-cifar10/checkpoint.pt
  python train.py --evaluate --checkpoint logs/vqvae-cifar10 --probe --metrics fid kid --weights inception.pth
  torchrun --nproc-per-node 2 train.py --dataset cifar10   the same batches, shared by two GPUs or processes
  python train.py --list bottlenecks                    members, options, defaults and sources

metrics
{metrics.explanations()}

Watch a run with `tensorboard --logdir logs`. Look at it with `python visualize_codes.py --checkpoint
logs/<run>/checkpoint.pt`. Ctrl-C saves and prints the command that resumes.
"""


OF_EVALUATE = ("iw_samples", "output", "probe", "metrics", "weights", "samples")
EVALUATE_USES = ("checkpoint", "data_dir", "device", *OF_EVALUATE)


def parse(argv: list[str]) -> dict[str, Any]:
    """The flags that were typed, settings in their types."""
    parser = cli.parser(__doc__, EXAMPLES, prog=cli.program("train"))
    add_flags(parser)
    other = parser.add_argument_group("other")

    def add(flag: str, **keywords: Any) -> None:
        other.add_argument(flag, default=argparse.SUPPRESS, **keywords)

    add("--resume", metavar="RUN", type=path("resume"), help="resume logs/<run> exactly where it stopped")
    add("--rescan", action="store_true", help="convert all images of the data again, whatever their sizes and times")
    add("--list", metavar="WHAT", help="print data, nets, bottlenecks, priors, likelihoods, objectives or presets")
    add("--evaluate", action="store_true", help="print the metrics of --checkpoint on the test split")
    draws = cli.value("iw_samples", int, Range(0, 1_000_000))
    help = "draws for --evaluate's importance-weighted bound (default: 100 if the model has one)"
    add("--iw-samples", metavar="S", type=draws, help=help)
    add("--probe", action="store_true", help="add a linear probe to --evaluate: labels predicted from latents")
    named = cli.value("metrics", Literal[metrics.WORDS])
    help = f"add metrics of --evaluate that nets compute: {', '.join(metrics.WORDS)}; pip install 'vqvae[metrics]'"
    add("--metrics", metavar="NAME", nargs="+", type=named, help=help)
    help = "files of weights for --metrics: torch-fidelity's Inception-v3, torchvision's AlexNet or VGG-16 for lpips"
    add("--weights", metavar="FILE", nargs="+", type=path("weights"), help=help)
    help = "images that --metrics draws from the prior, for gfid, gkid, gis, gfd_lite0: 2 or more (default: none)"
    add("--samples", metavar="N", type=cli.value("samples", int, Range(2, 1_000_000)), help=help)
    help = "file for --evaluate's metrics (default: evaluation.json, or evaluation-best.json, next to it)"
    add("--output", metavar="FILE", type=path("output", "file"), help=help)
    options = vars(parser.parse_args(argv))  # only what was typed
    own: dict[str, Any] = {
        key: options.pop(key) for key in ("resume", "rescan", "list", "evaluate", *OF_EVALUATE) if key in options
    }
    return {**own, **typed(options)}


def main(argv: list[str]) -> int:
    given = parse(argv)
    if "list" in given:
        return _list(given)
    if given.pop("evaluate", False):
        return _evaluate(given)
    _refuse(given, given.keys() - set(OF_EVALUATE), "has no effect without --evaluate")

    from vqvae import experiment

    return experiment.run(given, given.pop("resume", None))


def _list(given: dict[str, Any]) -> int:
    what = given.pop("list")
    _refuse(given, (), f"has no effect, because --list {what} only prints")
    if what == "presets":
        print(presets.describe())
        return 0

    from vqvae import experiment

    print(experiment.listing(what))
    return 0


def _evaluate(given: dict[str, Any]) -> int:
    if "checkpoint" not in given:
        raise OptionError("evaluate", None, "name the model with --checkpoint logs/<run>/checkpoint.pt")
    used = ", ".join(f"--{key.replace('_', '-')}" for key in EVALUATE_USES)
    _refuse(given, EVALUATE_USES, f"has no effect, because --evaluate does not train; it uses only {used}")
    words = tuple(dict.fromkeys(given.pop("metrics", ())))
    if not set(words) - {"lpips"}:
        _refuse(given, given.keys() - {"samples"}, "has no effect without --metrics fid, kid, is or lite0")
    if not words:
        _refuse(given, given.keys() - {"weights"}, "has no effect without --metrics")

    from vqvae import experiment

    asked = experiment.Asked(
        iw_samples=given.pop("iw_samples", None),
        samples=given.pop("samples", 0),
        probed=given.pop("probe", False),
    )
    output, weights = given.pop("output", None), given.pop("weights", ())
    return experiment.evaluate_checkpoint(given, asked, output, words=words, weights=weights)


def _refuse(given: Mapping[str, Any], used: Collection[str], problem: str) -> None:
    """Raise `OptionError` for what was typed and is not used."""
    for key, value in given.items():
        if key not in used:
            shown = " ".join(value) if isinstance(value, list) else None if value is True else value
            raise OptionError(key, shown, f"{problem}; leave it out")
