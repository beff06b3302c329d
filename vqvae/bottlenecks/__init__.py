"""Bottlenecks: features to a latent, and what it costs. One class each; the table below names them."""

from vqvae.bottlenecks.categorical import Categorical, Deterministic, Gumbel
from vqvae.bottlenecks.gaussian import Gaussian
from vqvae.bottlenecks.multilevel import GroupedVQ, Hierarchy, ResidualVQ
from vqvae.bottlenecks.vq import VQ

BOTTLENECKS = {
    "vq": VQ,
    "residual": ResidualVQ,
    "grouped": GroupedVQ,
    "hierarchy": Hierarchy,
    "deterministic": Deterministic,
    "categorical": Categorical,
    "gumbel": Gumbel,
    "gaussian": Gaussian,
}
