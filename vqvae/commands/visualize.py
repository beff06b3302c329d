"""Plot what a trained model learned: reconstructions, codes, codebook, samples, interpolations."""

import argparse

from vqvae import cli, sampling
from vqvae.commands import add_device, path
from vqvae.registry import Range

EXAMPLES = """
examples
  python visualize_codes.py --checkpoint logs/vqvae-mnist/checkpoint.pt
  python visualize_codes.py --checkpoint logs/vqvae-mnist --only codebook.png usage.png
  python visualize_codes.py --checkpoint logs/vqvae-mnist-pixelcnn --samples 100 --temperature 0.9
  python visualize_codes.py --checkpoint logs/digits-by-class --class 3 --seed 1

plots, each drawn if it applies to the model
  every model
    curves.png              metrics over the training steps
    training_animation.gif  the images drawn after each epoch
  models of images
    original.png            held-out images
    reconstructions.png     held-out images and their reconstructions
    samples.png             samples of the prior; those of the uniform prior, which is not trained, only with --only
    class_rows.png          samples of each class, if the prior is conditional
  models with codes
    code_visualization.png  held-out images and their codes
    codebook.png            the codebook in the plane (t-SNE), each code as the patch it decodes to
    usage.png               how often the held-out split uses each code
    levels.png              reconstructions from the first levels of codes, if there are several
    completions.png         images completed from half of their codes, if the prior was trained on codes
  models with a continuous latent
    interpolations.png      images between the reconstructions of two held-out images
    traversals.png          one latent dimension varied at a time
    posterior_map.png       posterior means of the held-out split, if the latent has two dimensions
    latent_grid.png         the plane of such a latent, decoded
  models of points
    scatter_2d.png          data, reconstructions and samples

The page index.html shows all plots, how to read them, and the run's metrics and settings. --only does not change it.
Images come from the checkpoint, so no data set is needed. Plots without samples do not use --samples, --temperature,
--top-k, --top-p, --guidance, --steps, --choice-temperature, --class and --seed.
"""


def main(argv: list[str]) -> int:
    """Parse the command line and draw. Returns the exit code; raises `UserError`."""
    options = _parse(argv)
    from vqvae import report  # imports torch, which --help does without

    report.draw(options)
    return 0


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = cli.parser(__doc__ or "", EXAMPLES, prog=cli.program("visualize"))
    add = parser.add_argument
    checkpoint, folder = path("checkpoint"), path("plot_dir", "folder")
    help = "logs/<run>/checkpoint.pt, or the folder logs/<run>"
    add("--checkpoint", metavar="PATH", required=True, type=checkpoint, help=help)
    help = "draw into DIR/<run> (default: plots/<run>)"
    add("--plot-dir", metavar="DIR", type=folder, help=help)
    add("--only", metavar="PLOT", nargs="+", help="draw only these plots, such as codebook.png usage.png")
    count = cli.value("samples", int, Range(1, 10_000))
    add("--samples", metavar="N", type=count, default=64, help="number of samples (default: 64)")
    for name, option in sampling.OPTIONS.items():
        kind = cli.value(name, option.kind, *option.rules)
        flag, metavar = f"--{name.replace('_', '-')}", "N" if option.kind is int else "X"
        add(flag, metavar=metavar, type=kind, default=option.default, help=option.help)
    add(
        "--class", dest="label", metavar="CLASS", help="class of the samples, a name or number, for a conditional prior"
    )
    seed = cli.value("seed", int, Range(0, 2**63 - 1))
    add("--seed", metavar="N", type=seed, default=0, help="seed of the samples (default: 0)")
    add_device(parser)
    return parser.parse_args(argv)
