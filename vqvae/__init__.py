"""Train, compare and show vector-quantised and variational autoencoders on images."""

__version__ = "0.1.0"
__all__ = ["load"]


def __getattr__(name: str):
    # `from vqvae import load` works, while `import vqvae.config` (all that --help needs) stays free of torch.
    if name == "load":
        from vqvae.checkpoint import load

        return load
    raise AttributeError(f"module 'vqvae' has no attribute {name!r}")
