"""The bottlenecks: features to a latent, one class each. This table names them."""

from vqvae.bottlenecks.categorical import Categorical, Deterministic, Gumbel
from vqvae.bottlenecks.fsq import FSQ
from vqvae.bottlenecks.gaussian import Gaussian
from vqvae.bottlenecks.lfq import LFQ
from vqvae.bottlenecks.multilevel import GroupedVQ, Hierarchy, ResidualVQ
from vqvae.bottlenecks.multiscale import MultiScale
from vqvae.bottlenecks.stochastic import Stochastic
from vqvae.bottlenecks.vq import VQ, CosineVQ, SimVQ
from vqvae.contracts import Bottleneck

BOTTLENECKS: dict[str, type[Bottleneck]] = {
    "vq": VQ,
    "cosine": CosineVQ,
    "simvq": SimVQ,
    "fsq": FSQ,
    "lfq": LFQ,
    "residual": ResidualVQ,
    "grouped": GroupedVQ,
    "hierarchy": Hierarchy,
    "multiscale": MultiScale,
    "deterministic": Deterministic,
    "categorical": Categorical,
    "gumbel": Gumbel,
    "stochastic": Stochastic,
    "gaussian": Gaussian,
}
