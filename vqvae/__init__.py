"""Train, compare and visualize vector-quantized and variational autoencoders on images."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vqvae.checkpoint import load
    from vqvae.layers import FSQ, LFQ, VQ, Quantizer, ResidualVQ, SimVQ

__version__ = "0.2.0"
__all__ = ["load", "Quantizer", "VQ", "ResidualVQ", "SimVQ", "FSQ", "LFQ"]


def __getattr__(name: str) -> Any:
    # Imported on first use: `import vqvae.config`, which --help needs, must not import torch.
    if name in __all__:
        from vqvae import checkpoint, layers

        return getattr(checkpoint if name == "load" else layers, name)
    raise AttributeError(f"module 'vqvae' has no attribute {name!r}")
