"""`vqvae COMMAND ...`, the same as `python -m vqvae COMMAND ...`."""

import importlib

from vqvae import __version__, interrupts
from vqvae.errors import UserError, near_misses, shown

COMMANDS = {  # modules of vqvae.commands
    "train": "train an autoencoder, or a prior on the codes of a trained one",
    "visualize": "plot a trained model: reconstructions, codes, samples, curves",
    "compare": "print several runs in one table",
    "encode": "encode images to a file of codes",
    "decode": "decode a file of codes to images",
    "export": "write a trained model as files for other programs",
    "cache": "list and remove the images that were converted for training",
}
HELP = f"""usage: vqvae COMMAND ...

Train, compare and visualize vector-quantized and variational autoencoders on images.

commands
{chr(10).join(f"  {name:11}{text}" for name, text in COMMANDS.items())}

examples
  vqvae train --dataset cifar10
  vqvae visualize --checkpoint logs/vqvae-cifar10
  vqvae compare logs/vqvae-cifar10 logs/vqvae-cifar10-2
  vqvae encode --checkpoint logs/vqvae-cifar10 --dataset cifar10 --output codes.npz
  vqvae decode codes.npz --checkpoint logs/vqvae-cifar10 --output decoded
  vqvae export --checkpoint logs/vqvae-cifar10 --output exported
  vqvae cache --clear

`vqvae COMMAND --help` explains a command, `vqvae --version` prints the version. `python -m vqvae` is the same program.
"""


def main(argv: list[str] | None = None) -> int:
    """Run the command that `argv` names and return its exit code.

    Without `argv`, run the command line's words and end the process with that code.
    """
    if argv is None:
        interrupts.install()  # before imports that take time

    from vqvae import cli

    code = cli.run(dispatch, argv)
    return code if argv is not None else interrupts.leave(code)


def dispatch(argv: list[str]) -> int:
    if not argv:
        raise UserError(f"no command; known: {', '.join(COMMANDS)}; see vqvae --help")
    name, *words = argv
    if name in ("-h", "--help", "--version"):
        if words:
            raise UserError(f"{shown(' '.join(words))}: comes after {name}, which takes nothing more; leave it out")
        print(f"vqvae {__version__}" if name == "--version" else HELP)
        return 0
    if name not in COMMANDS:
        kind, known = ("flag", ["--help", "--version"]) if name.startswith("-") else ("command", list(COMMANDS))
        problem = f"no such {kind}{near_misses(name, known)}; known: {', '.join(known)}; see vqvae --help"
        raise UserError(f"{shown(name)}: {problem}")
    return importlib.import_module(f"vqvae.commands.{name}").main(words)


if __name__ == "__main__":
    main()
