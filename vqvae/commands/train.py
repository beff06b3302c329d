"""Train a vector-quantized or variational autoencoder on images, or a prior on the codes of a trained one."""

from vqvae import cli, metrics, presets
from vqvae.config import add_flags
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
  python train.py --objective elbo reduction=sum free_bits=2
  python train.py --lr linear:0:3e-4:500,cosine:3e-4:1e-6
  python train.py --resume logs/vqvae-cifar10 --epochs 80
  python train.py --prior pixelcnn --checkpoint logs/vqvae-cifar10/checkpoint.pt
  python train.py --evaluate --checkpoint logs/vqvae-cifar10/checkpoint.pt
  torchrun --nproc-per-node 2 train.py --dataset cifar10   the same batches, shared by two GPUs or processes
  python train.py --list bottlenecks                    members, options, defaults and sources

metrics
{metrics.explanations()}

Watch a run with `tensorboard --logdir logs`. Look at it with `python visualize_codes.py --checkpoint
logs/<run>/checkpoint.pt`. Ctrl-C saves and prints the command that resumes.
"""


def main(argv: list[str]) -> int:
    parser = cli.parser(__doc__, EXAMPLES, prog=cli.program("train"))
    add_flags(parser)
    other = parser.add_argument_group("other")
    other.add_argument("--resume", metavar="RUN", help="resume logs/<run> exactly where it stopped")
    other.add_argument(
        "--list", metavar="WHAT", help="print data, nets, bottlenecks, priors, likelihoods, objectives or presets"
    )
    other.add_argument("--evaluate", action="store_true", help="print the held-out metrics of --checkpoint")
    samples = cli.value("iw_samples", Range(1), int)
    other.add_argument(
        "--iw-samples",
        metavar="S",
        type=samples,
        help="draws for --evaluate's importance-weighted bound (default: 100)",
    )
    given = vars(parser.parse_args(argv))
    resume, what, iw_samples = (given.pop(key) for key in ("resume", "list", "iw_samples"))
    evaluate = given.pop("evaluate")
    if what == "presets":
        print(presets.describe())
        return 0
    if iw_samples and not evaluate:
        raise OptionError("", "iw_samples", iw_samples, "goes with --evaluate")
    if evaluate and "checkpoint" not in given:
        raise OptionError("", "evaluate", None, "name the model with --checkpoint logs/<run>/checkpoint.pt")

    from vqvae import experiment

    if what is not None:
        print(experiment.listing(what))
        return 0
    if evaluate:
        return experiment.evaluate_checkpoint(given, iw_samples or 100)
    return experiment.run(given, resume)
