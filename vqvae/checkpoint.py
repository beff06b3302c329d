"""Checkpoints: plain dictionaries of numbers and tensors, written atomically, read without running what they hold."""

import os
import pickle
from pathlib import Path
from typing import Any

import torch

from vqvae.autoencoder import SLOTS, Autoencoder, build_autoencoder
from vqvae.config import Config
from vqvae.errors import UserError

FORMAT = 1
FIELDS = {"format", "kind", "run", "config", "data", "model", "step", "epoch", "examples", "usage", "plots"}


def write(path: Path, content: dict[str, Any]) -> None:
    """Save so that `path` always holds a whole checkpoint: a temporary file, flushed to disk, then renamed."""
    partial = path.with_name(path.name + ".partial")
    with open(partial, "wb") as file:
        torch.save({"format": FORMAT, **content}, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def read(path: str | Path) -> dict[str, Any]:
    """The content of a checkpoint, its tensors on the CPU.

    Raises `UserError` in one line for a file that is missing, truncated, not a checkpoint of this program, of another
    version, or a pickle that holds anything but plain values and tensors (which is never executed).
    """
    path = Path(path)
    if path.is_dir():
        path = path / "checkpoint.pt"
    if not path.is_file():
        raise UserError(f"--checkpoint {path}: no such file; a run keeps its own at logs/<run>/checkpoint.pt")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise UserError(
            f"--checkpoint {path}: not a checkpoint of this program: it holds objects other than plain values and "
            "tensors, which are not loaded because loading them could run code"
        ) from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, IndexError, AttributeError) as problem:
        reason = str(problem).split("\n")[0]
        raise UserError(f"--checkpoint {path}: truncated, or not a checkpoint at all ({reason})") from None
    if not isinstance(content, dict) or not FIELDS <= set(content):
        raise UserError(f"--checkpoint {path}: not a checkpoint of this program")
    if content["format"] != FORMAT:
        raise UserError(f"--checkpoint {path}: format {content['format']}, but this version reads format {FORMAT}")
    return content


def load(path: str | Path, device: str = "cpu") -> Autoencoder:
    """The trained model of a checkpoint, ready to use (in evaluation mode).

    >>> model = load("logs/vqvae-mnist/checkpoint.pt")
    >>> codes = model.encode(images)        # uint8, or float in [0, 1], [B, C, H, W] -> int64 [B, h, w]
    >>> pictures = model.decode(codes)      # float in [0, 1], [B, C, H, W]
    """
    return restore(read(path), str(path)).to(device).eval()


def restore(content: dict[str, Any], name: str = "") -> Autoencoder:
    """The model that a checkpoint's content describes, with its weights."""
    config = Config.from_dict(content["config"])
    model = build_autoencoder(
        {slot: getattr(config, slot) for slot in SLOTS},
        image_shape=tuple(content["data"]["shape"]),
        data_variance=content["data"]["variance"],
    )
    try:
        model.load_state_dict(content["model"])
    except RuntimeError as problem:
        reason = " ".join(str(problem).split())[:200]
        raise UserError(f"--checkpoint {name}: its weights are those of another model ({reason})") from None
    return model
