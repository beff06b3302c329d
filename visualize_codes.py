#!/usr/bin/env python3
"""`python visualize_codes.py ...`, the same as `vqvae visualize ...`: see vqvae/commands/visualize.py."""

from vqvae import interrupts

if __name__ == "__main__":
    interrupts.install()  # before imports that take time

    from vqvae.cli import run
    from vqvae.commands.visualize import main

    interrupts.leave(run(main))
