#!/usr/bin/env python3
"""`python train.py ...`, the same as `vqvae train ...`: see vqvae/commands/train.py."""

from vqvae import interrupts

if __name__ == "__main__":
    interrupts.install()  # before imports that take time

    from vqvae.cli import run
    from vqvae.commands.train import main

    interrupts.leave(run(main))
