"""Priors: log p(z) in nats, and samples of z. One class each; the table below names them."""

from vqvae.priors.simple import Uniform

PRIORS = {
    "uniform": Uniform,
}
