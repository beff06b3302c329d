#!/usr/bin/env python3
"""`python visualize_codes.py ...`, the same as `vqvae visualize ...`: see vqvae/commands/visualize.py."""

import sys

from vqvae.cli import run
from vqvae.commands.visualize import main

if __name__ == "__main__":
    sys.exit(run(main))
