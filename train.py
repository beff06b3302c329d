#!/usr/bin/env python3
"""`python train.py ...`, the same as `vqvae train ...`: see vqvae/commands/train.py."""

import sys

from vqvae.cli import run
from vqvae.commands.train import main

if __name__ == "__main__":
    sys.exit(run(main))
