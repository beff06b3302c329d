"""Bottlenecks: features to a latent, and what it costs. One class each; the table below names them."""

from vqvae.bottlenecks.categorical import Categorical, Deterministic, Gumbel
from vqvae.bottlenecks.cosine import CosineVQ
from vqvae.bottlenecks.fsq import FSQ
from vqvae.bottlenecks.gaussian import Gaussian
from vqvae.bottlenecks.lfq import LFQ
from vqvae.bottlenecks.multilevel import GroupedVQ, Hierarchy, ResidualVQ
from vqvae.bottlenecks.simvq import SimVQ
from vqvae.bottlenecks.vq import VQ

BOTTLENECKS = {
    "vq": VQ,
    "cosine": CosineVQ,
    "simvq": SimVQ,
    "fsq": FSQ,
    "lfq": LFQ,
    "residual": ResidualVQ,
    "grouped": GroupedVQ,
    "hierarchy": Hierarchy,
    "deterministic": Deterministic,
    "categorical": Categorical,
    "gumbel": Gumbel,
    "gaussian": Gaussian,
}
