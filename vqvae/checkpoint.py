"""Checkpoints: dictionaries of plain values and tensors, written atomically and read without executing code."""

import hashlib
import json
import pickle
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from vqvae.autoencoder import SLOTS, Autoencoder, build_autoencoder
from vqvae.config import Config
from vqvae.errors import UserError, one_line
from vqvae.files import whole_file

FORMAT = 2
EARLIER = {1: "0.1"}  # format -> the version of this package that reads it
ABOUT = ("format", "kind", "run", "step", "config", "data")  # describes a model; an exported config.json has these
FIELDS = {*ABOUT, "model", "objective", "epoch", "examples", "usage", "plots"}
EXPORTED = ("config.json", "model.safetensors")  # the files of an exported folder that `read_model` reads


def write(path: Path, content: dict[str, Any]) -> None:
    """Save `content`. A reader of `path` finds the old checkpoint or the new one, never a part of either."""
    with whole_file(path) as file:
        torch.save({"format": FORMAT, **content}, file)


def locate(path: str | Path) -> Path:
    """The checkpoint file at `path`, which may also be the folder of a run."""
    path = Path(path)
    return path / "checkpoint.pt" if path.is_dir() else path


def read(path: str | Path) -> dict[str, Any]:
    """The content of a checkpoint, its tensors on the CPU.

    Raises `UserError` if the file is missing, truncated, no checkpoint of this package, of another format, or a pickle
    of anything but plain values and tensors. Such a pickle is never executed.
    """
    path = locate(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file; a run saves its checkpoint as logs/<run>/checkpoint.pt")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of the pickle protocol of files that are refused anyway
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise UserError(
            f"{path}: not a vqvae checkpoint: it contains objects other than plain values and tensors, which are not "
            "loaded because loading them could execute code"
        ) from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, IndexError, AttributeError) as problem:
        raise UserError(f"{path}: truncated, or not a checkpoint ({one_line(problem)})") from None
    if not isinstance(content, dict) or "format" not in content:
        raise UserError(f"{path}: not a vqvae checkpoint")
    _check_format(content["format"], path)
    if missing := FIELDS - set(content):
        raise UserError(f"{path}: not a vqvae checkpoint; it lacks {', '.join(sorted(missing))}")
    return content


def _check_format(found: Any, path: Path) -> None:
    """Raise `UserError` for another format than this version's, naming the version that reads it."""
    if found == FORMAT:
        return
    if isinstance(found, int) and found in EARLIER:
        version = EARLIER[found]
        raise UserError(
            f"{path}: written by vqvae {version} (format {found}), and this version reads format {FORMAT}; "
            f"install vqvae {version} to read it, or train the model again"
        )
    if isinstance(found, int) and found > FORMAT:
        problem = f"written by a later version of vqvae (format {found}), and this version reads format {FORMAT}"
        raise UserError(f"{path}: {problem}; update vqvae to read it")
    raise UserError(f"{path}: {found!r:.40} is not a format of vqvae; this version reads format {FORMAT}")


def read_model(path: str | Path) -> dict[str, Any]:
    """The entries that describe a model (`ABOUT`) and its weights (`model`), from a checkpoint or an exported folder.

    `path` is a checkpoint, the folder of a run, or an exported folder. A folder with a checkpoint counts as a run's.
    Raises `UserError`, as `read` does.
    """
    path = Path(path)
    settings, weights = path / EXPORTED[0], path / EXPORTED[1]
    if locate(path).is_file() or not weights.is_file():
        return read(path)
    try:
        content = json.loads(settings.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as problem:
        raise UserError(f"{settings}: cannot be read ({one_line(problem)}); export the model again") from None
    if not isinstance(content, dict) or not set(ABOUT) <= set(content):
        raise UserError(f"{settings}: not the config.json of an exported model; export the model again")
    _check_format(content["format"], settings)
    try:
        return content | {"model": load_file(weights)}
    except (OSError, SafetensorError, ValueError) as problem:
        raise UserError(f"{weights}: cannot be read ({one_line(problem)}); export the model again") from None


def load(path: str | Path, device: str | torch.device = "cpu") -> Autoencoder:
    """A trained model in evaluation mode, from a checkpoint, the folder of a run, or an exported folder.

    >>> model = load("logs/vqvae-mnist/checkpoint.pt")
    >>> codes = model.encode(images)    # uint8, or float in [0, 1], [B, C, H, W] -> int64 [B, h, w]
    >>> images = model.decode(codes)    # float in [0, 1], [B, C, H, W]
    """
    return restore(read_model(path), str(path)).to(device)


def restore(content: dict[str, Any], name: str = "checkpoint", *, new_prior: Config | None = None) -> Autoencoder:
    """Build the model that a checkpoint's content describes, load its weights, and set evaluation mode.

    With `new_prior`, the model gets an untrained prior, built from these settings, instead of the checkpoint's. Errors
    begin with `name`.
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
        raise UserError(f"{name}: its settings do not describe a model of vqvae") from None
    weights = content["model"]
    if new_prior:
        weights = {key: value for key, value in weights.items() if not key.startswith("prior.")}
        weights |= {f"prior.{key}": value for key, value in model.prior.state_dict().items()}
    try:
        model.load_state_dict(weights)
    except RuntimeError as problem:
        raise UserError(f"{name}: its weights do not fit the model of its settings ({one_line(problem)})") from None
    return model.eval()


def weights_checksum(model: nn.Module) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of all weights except the prior's.

    These weights determine how the model encodes and decodes: codes of one checksum belong to one codec.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if not name.startswith("prior."):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
