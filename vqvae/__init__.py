"""Train, compare and visualize vector-quantized and variational autoencoders on images."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vqvae.checkpoint import load

__version__ = "0.2.0"
__all__ = ["load"]


def __getattr__(name: str) -> Any:
    # Imported on first use: `import vqvae.config`, which --help needs, must not import torch.
    if name == "load":
        from vqvae.checkpoint import load

        return load
    raise AttributeError(f"module 'vqvae' has no attribute {name!r}")
