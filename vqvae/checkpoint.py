"""Checkpoints: plain dictionaries of numbers and tensors, written atomically, read without running what they hold."""

import json
import os
import pickle
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from vqvae.autoencoder import SLOTS, Autoencoder, build_autoencoder
from vqvae.config import Config
from vqvae.errors import UserError

FORMAT = 1
ABOUT = ("format", "kind", "run", "step", "config", "data")  # all of a model but its weights
FIELDS = {*ABOUT, "model", "epoch", "examples", "usage", "plots"}
EXPORTED = ("config.json", "model.safetensors")  # an exported model's folder holds ABOUT and the weights


def write(path: Path, content: dict[str, Any]) -> None:
    """Save so that `path` always holds a whole checkpoint: a temporary file, flushed to disk, then renamed."""
    partial = path.with_name(path.name + ".partial")
    with open(partial, "wb") as file:
        torch.save({"format": FORMAT, **content}, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def locate(path: str | Path) -> Path:
    """The checkpoint's file, named by itself or by its run's folder."""
    path = Path(path)
    return path / "checkpoint.pt" if path.is_dir() else path


def read(path: str | Path) -> dict[str, Any]:
    """The content of a checkpoint, its tensors on the CPU.

    Raises `UserError` in one line for a file that is missing, truncated, not a checkpoint of this program, of another
    version, or a pickle that holds anything but plain values and tensors (which is never executed).
    """
    path = locate(path)
    if not path.is_file():
        raise UserError(f"--checkpoint {path}: no such file; a run keeps its own at logs/<run>/checkpoint.pt")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the pickle protocol of files that are refused anyway
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise UserError(
            f"--checkpoint {path}: not a checkpoint of this program: it holds objects other than plain values and "
            "tensors, which are not loaded because loading them could run code"
        ) from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, IndexError, AttributeError) as problem:
        reason = str(problem).split("\n")[0]
        raise UserError(f"--checkpoint {path}: truncated, or not a checkpoint at all ({reason})") from None
    if not isinstance(content, dict) or not set(content) >= FIELDS:
        raise UserError(f"--checkpoint {path}: not a checkpoint of this program")
    _check_format(content, path)
    return content


def _check_format(content: dict[str, Any], path: Path) -> None:
    if content["format"] != FORMAT:
        raise UserError(f"--checkpoint {path}: format {content['format']!r}, but this version reads format {FORMAT}")


def _reason(problem: Exception) -> str:
    return " ".join(str(problem).split())[:120] or type(problem).__name__


def read_model(path: str | Path) -> dict[str, Any]:
    """What makes a model: `config`, `data` and `model` (weights) of a checkpoint, of a run's or an exported folder.

    A folder that holds a checkpoint is a run's. Raises `UserError` in one line, as `read` does.
    """
    path = Path(path)
    settings, weights = path / EXPORTED[0], path / EXPORTED[1]
    if locate(path).is_file() or not weights.is_file():
        return read(path)
    try:
        content = json.loads(settings.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as problem:
        raise UserError(
            f"--checkpoint {settings}: cannot be read ({_reason(problem)}); export the model again"
        ) from None
    if not isinstance(content, dict) or not set(ABOUT) <= set(content):
        raise UserError(f"--checkpoint {settings}: not the settings of an exported model")
    _check_format(content, settings)
    try:
        return content | {"model": load_file(weights)}
    except (OSError, SafetensorError, ValueError) as problem:
        raise UserError(
            f"--checkpoint {weights}: cannot be read ({_reason(problem)}); export the model again"
        ) from None


def load(path: str | Path, device: str = "cpu") -> Autoencoder:
    """The trained model of a checkpoint, of a run's folder or of an exported one, ready to use (in evaluation mode).

    >>> model = load("logs/vqvae-mnist/checkpoint.pt")
    >>> codes = model.encode(images)        # uint8, or float in [0, 1], [B, C, H, W] -> int64 [B, h, w]
    >>> pictures = model.decode(codes)      # float in [0, 1], [B, C, H, W]
    """
    return restore(read_model(path), str(path)).to(device)


def restore(content: dict[str, Any], name: str = "", *, new_prior: Config | None = None) -> Autoencoder:
    """The model that a checkpoint's content describes, with its weights, in evaluation mode.

    With `new_prior`, the prior is the untrained one of those settings instead of the checkpoint's.
    """
    try:
        config = new_prior or Config.from_dict(content["config"])
        model = build_autoencoder(
            {slot: getattr(config, slot) for slot in SLOTS},
            image_shape=tuple(content["data"]["shape"]),
            data_variance=content["data"]["variance"],
            num_classes=len(content["data"]["classes"]) if config.conditional else 0,
        )
    except UserError:
        raise  # it names the setting
    except (AttributeError, KeyError, IndexError, TypeError, ValueError, RuntimeError):
        raise UserError(f"--checkpoint {name}: its settings are not those of a model of this program") from None
    weights = content["model"]
    if new_prior:
        weights = {key: value for key, value in weights.items() if not key.startswith("prior.")}
        weights |= {f"prior.{key}": value for key, value in model.prior.state_dict().items()}
    try:
        model.load_state_dict(weights)
    except RuntimeError as problem:
        reason = " ".join(str(problem).split())[:200]
        raise UserError(f"--checkpoint {name}: its weights are those of another model ({reason})") from None
    return model.eval()
