"""Priors: log p(z) in nats, and samples of z. `PRIORS` maps names to classes."""

from vqvae.contracts import Prior
from vqvae.priors.continuous import MadeFlow, Normal
from vqvae.priors.masked import Masked
from vqvae.priors.pixelcnn import GatedPixelCNN, PixelCNN
from vqvae.priors.simple import Uniform, Unigram
from vqvae.priors.transformer import Transformer

PRIORS: dict[str, type[Prior]] = {
    "uniform": Uniform,
    "unigram": Unigram,
    "pixelcnn": PixelCNN,
    "gated-pixelcnn": GatedPixelCNN,
    "transformer": Transformer,
    "masked": Masked,
    "normal": Normal,
    "made-flow": MadeFlow,
}
