"""Checkpoints: dictionaries of plain values and tensors, written atomically and read without executing code.

A checkpoint is a ZIP archive that torch.save writes. Its comment is the SHA-256 of all bytes before the comment.
Files may come from strangers, so every entry is checked (entries.py) before a model is built.
"""

import hashlib
import io
import itertools
import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors.torch import load as load_safetensors
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from vqvae import foreign, objectives
from vqvae.archives import Forbidden, read_torch
from vqvae.autoencoder import SLOTS, Autoencoder, build_autoencoder
from vqvae.config import Config
from vqvae.entries import check_description, check_state, prefixed
from vqvae.errors import UserError, one_line, shown
from vqvae.files import open_file, read_json, size_of, whole_file
from vqvae.metrics import EVALUATION, EVALUATION_OF_BEST
from vqvae.registry import build, resolve

FORMAT = 2
EARLIER = {1: "0.1"}  # format -> the version of this package that reads it
ABOUT = ("format", "kind", "run", "step", "config", "data")  # describes a model; an exported config.json has these
FIELDS = {*ABOUT, "model", "objective", "epoch", "examples", "usage", "plots"}
EXPORTED = ("config.json", "model.safetensors")  # the files of an exported folder that `read_model` reads
SEAL = b"sha256:"  # before the 64 hexadecimal digits at the end of a checkpoint
UNKNOWN = "0" * 64  # stands for a checksum while it is computed
LARGEST_JSON = 2**24  # bytes


def write(path: Path, content: dict[str, Any]) -> None:
    """Save `content`. A reader of `path` finds the old checkpoint or the new one, never a part of either.

    Raises `UserError` if the file cannot be written, such as on a full disk.
    """
    with whole_file(path) as file:
        buffer = io.BytesIO()  # in memory, because torch aborts the process where a file cannot be written
        torch.save({"format": FORMAT, **content}, buffer)
        archive = buffer.getbuffer()
        archive[-2:] = (len(SEAL) + 64).to_bytes(2, "little")  # the archive ends in the length of its comment
        file.write(archive)
        file.write(SEAL + hashlib.sha256(archive).hexdigest().encode())


def locate(path: str | Path) -> Path:
    """The checkpoint file at `path`, which may also be the folder of a run."""
    path = Path(path)
    return path / "checkpoint.pt" if os.path.isdir(path) else path


def read(path: str | Path) -> dict[str, Any]:
    """The content of a checkpoint, its tensors on the CPU.

    Raises `UserError` if the file is missing, damaged, no checkpoint of this package, of another format, or a pickle of
    anything but plain values and tensors. Nothing in the file is executed.
    """
    path = locate(path)
    try:
        with open_file(path) as file:
            sealed = _sealed(file, path)
            content = read_torch(file)
    except UserError:
        raise
    except FileNotFoundError:
        if any(path.parent.glob("*.safetensors")):
            raise UserError(f"{path.parent}: an exported model; this needs the checkpoint.pt of its run") from None
        raise UserError(f"{path}: no such file; a run saves its checkpoint as logs/<run>/checkpoint.pt") from None
    except Forbidden:
        raise UserError(
            f"{path}: not a vqvae checkpoint: it contains objects other than plain values and tensors, which are not "
            "loaded because loading them could execute code; name a checkpoint that vqvae wrote"
        ) from None
    except OSError as problem:
        reason = f"cannot be read ({one_line(problem)}); name a checkpoint, or the folder of a run"
        raise UserError(f"{path}: {reason}") from None
    except Exception as problem:  # damaged archives raise anything
        raise UserError(f"{path}: truncated, or not a checkpoint ({one_line(problem)}); use another copy") from None
    if not isinstance(content, dict) or "format" not in content:
        raise UserError(f"{path}: not a vqvae checkpoint; name one that vqvae wrote")
    _check_format(content["format"], path)
    if not sealed:
        raise UserError(f"{path}: damaged, or not written by vqvae: it does not end in its checksum; use another copy")
    if missing := FIELDS - set(content):
        raise UserError(f"{path}: not a vqvae checkpoint; it lacks {', '.join(sorted(missing))}; use another copy")
    with prefixed(path):
        content |= check_description(content)
        check_state(content)
    return content


def _sealed(file: BinaryIO, path: Path) -> bool:
    """Whether a file ends in a checksum. Raises `UserError` if that is not the checksum of the rest."""
    left = size_of(file) - len(SEAL) - 64
    file.seek(max(left, 0))
    end = file.read()
    if left < 0 or not end.startswith(SEAL):
        return False
    file.seek(0)
    digest = hashlib.sha256()
    while left and (block := file.read(min(left, 1 << 20))):
        digest.update(block)
        left -= len(block)
    if end != SEAL + digest.hexdigest().encode():
        raise UserError(f"{path}: damaged: its content does not match its checksum; use another copy")
    return True


def _check_format(found: Any, path: Path) -> None:
    """Raise `UserError` for another format than this version's, naming the version that reads it."""
    if type(found) is int and found == FORMAT:
        return
    if type(found) is int and found in EARLIER:
        version = EARLIER[found]
        raise UserError(
            f"{path}: written by vqvae {version} (format {found}), and this version reads format {FORMAT}; "
            f"install vqvae {version} to read it, or train the model again"
        )
    if type(found) is int and found > FORMAT:
        later = f"written by a later version of vqvae (format {shown(found, 20)})"
        raise UserError(f"{path}: {later}, and this version reads format {FORMAT}; update vqvae to read it")
    words = repr(found)[:40] if isinstance(found, str | int) else f"a {type(found).__name__}"
    raise UserError(f"{path}: {words} is not a format of vqvae; this version reads format {FORMAT}")


def read_model(path: str | Path) -> dict[str, Any]:
    """The entries that describe a model (`ABOUT`) and its weights (`model`), from a checkpoint or an exported folder.

    `path` is a checkpoint, the folder of a run, an exported folder, or the folder of a `VQModel` of diffusers (see
    foreign.py). A folder with a checkpoint counts as a run's. Raises `UserError`, as `read` does.
    """
    path = Path(path)
    settings, weights = path / EXPORTED[0], path / EXPORTED[1]
    if os.path.lexists(path / "checkpoint.pt"):
        return read(path)
    if not os.path.lexists(weights):
        return _read_foreign(path) if foreign.is_folder(path) else read(path)
    content, checksum = _read_settings(settings)
    try:
        with open_file(weights) as file:
            raw = file.read()
        if hashlib.sha256(raw).hexdigest() != checksum:
            raise ValueError("it does not match the checksum in config.json")
        content["model"] = load_safetensors(raw)
    except Exception as problem:  # safetensors raises many types for damaged files
        raise UserError(f"{weights}: cannot be read ({one_line(problem)}); export the model again") from None
    return content


def _read_foreign(path: Path) -> dict[str, Any]:
    content = {"format": FORMAT, **foreign.read(path)}
    with prefixed(path / foreign.SETTINGS):
        return content | check_description(content)


def _read_settings(path: Path) -> tuple[dict[str, Any], Any]:
    """The entries of an exported config.json, and the checksum of the weights."""
    try:
        with open_file(path) as file:
            text = file.read(LARGEST_JSON).decode()
        content = json.loads(text)
    except (OSError, ValueError, RecursionError) as problem:
        raise UserError(f"{path}: cannot be read ({one_line(problem)}); export the model again") from None
    if not isinstance(content, dict) or not set(ABOUT) <= set(content):
        raise UserError(f"{path}: not the config.json of an exported model; export the model again")
    _check_format(content["format"], path)
    found = content.get("sha256")
    if not isinstance(found, str) or len(found) != len(UNKNOWN) or seal(text, found) != text:
        raise UserError(f"{path}: damaged, or changed: it does not match its checksum; export the model again")
    with prefixed(path):
        return {key: content[key] for key in ABOUT} | check_description(content), content.get("weights_sha256")


def seal(text: str, stand_in: str = UNKNOWN) -> str:
    """The text with the SHA-256 of itself in place of the last `stand_in`; it is computed with zeros there."""
    before, _, after = text.rpartition(stand_in)
    return before + hashlib.sha256(f"{before}{UNKNOWN}{after}".encode()).hexdigest() + after


def weights_checksum(model: nn.Module) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of all weights except the prior's.

    These weights determine how the model encodes and decodes: codes of one checksum belong to one codec.
    """
    return _checksum({name: value for name, value in model.state_dict().items() if not name.startswith("prior.")})


def _checksum(weights: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        digest.update(name.encode())
        raw = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)  # numpy has no bfloat16
        digest.update(raw.numpy().tobytes())
    return digest.hexdigest()[:16]


def identity_of(content: Mapping[str, Any]) -> dict[str, Any]:
    """The identity of a model, which its evaluations store: the run, the step, and a checksum of all weights."""
    return {"run": content["run"], "step": content["step"], "weights": _checksum(content["model"])}


def evaluation_of(path: Path) -> Path:
    """The file for the metrics of a checkpoint on the test split."""
    return path.with_name(EVALUATION_OF_BEST if path.stem == "best" else EVALUATION)


def read_evaluation(path: Path, content: Mapping[str, Any]) -> dict[str, Any] | None:
    """The stored metrics of this checkpoint's model; None if there are none, or only those of another model.

    The weights are compared, because a repeated run has the name and the step of the earlier run. If the last step is
    the best one, checkpoint.pt and best.pt are the same model. Raises `UserError` for a damaged file.
    """
    files = dict.fromkeys((evaluation_of(path), path.with_name(EVALUATION)))
    return next((found for file in files if (found := _read_evaluation(file, content))), None)


def _read_evaluation(path: Path, content: Mapping[str, Any]) -> dict[str, Any] | None:
    try:
        found = read_json(path, LARGEST_JSON)
        if not isinstance(found, dict):
            raise ValueError("not a table of metrics")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, RecursionError) as problem:
        raise UserError(f"{path}: cannot be read ({one_line(problem, 80)}); evaluate the run again") from None
    return found if identity_of(content).items() <= found.items() else None


# a model from its description


def load(path: str | Path, device: str | torch.device = "cpu") -> Autoencoder:
    """A trained model in evaluation mode, from a checkpoint, the folder of a run, or an exported folder.

    The folder of a `VQModel` of diffusers is one too.

    >>> model = load("logs/vqvae-mnist/checkpoint.pt")
    >>> codes = model.encode(images)    # uint8, or float in [0, 1], [B, C, H, W] -> int64 [B, h, w]
    >>> images = model.decode(codes)    # float in [0, 1], [B, C, H, W]
    """
    return restore(read_model(path), str(path)).to(device)


def restore(content: dict[str, Any], name: str = "checkpoint") -> Autoencoder:
    """Build the model that a checkpoint's content describes, load its weights, and set evaluation mode.

    Errors begin with `name`.
    """
    try:
        config = Config.from_dict(content["config"])
        with _Budget(content["model"].values()) as budget:
            budget.check(config)
            model = _build(content, config, len(content["data"]["classes"]))
    except UserError as problem:
        raise UserError(f"{name}: {problem}") from None
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, RuntimeError, MemoryError):
        raise UserError(f"{name}: its settings do not describe a model of vqvae") from None
    _check_fit(model, content["model"], name)
    usage = content.get("usage")
    if usage is not None and usage.shape != _usage_shape(model):
        raise UserError(f"{name}: its usage does not count the model's codes")
    model.load_state_dict(content["model"])
    return model.eval()


def with_new_prior(content: dict[str, Any], name: str, config: Config, num_classes: int) -> Autoencoder:
    """The model that a checkpoint's content describes, with an untrained prior of these settings, in evaluation mode.

    A conditional prior is for `num_classes`. Errors about the checkpoint begin with `name`.
    """
    verify(content, name)
    model = _build(content, config, num_classes)
    old = {key: value for key, value in content["model"].items() if not key.startswith("prior.")}
    model.load_state_dict(old | {f"prior.{key}": value for key, value in model.prior.state_dict().items()})
    return model.eval()


def transfer(content: Mapping[str, Any], model: Autoencoder, name: str) -> None:
    """Load the weights in a checkpoint's content into `model`, except its prior.

    Weights that `model` does not have, such as further levels of codes, are left out. Raises `UserError`, which begins
    with `name`, if the checkpoint lacks weights or their sizes differ.
    """
    prior = {key: value for key, value in model.state_dict().items() if key.startswith("prior.")}
    weights = {key: content["model"][key] for key in model.state_dict() if key in content["model"]} | prior
    _check_fit(model, weights, name)
    model.load_state_dict(weights)


def _usage_shape(model: Autoencoder) -> tuple[int, ...]:
    """The shape `[levels, K]` of the counts of a model's codes; () without codes."""
    codes = model.discrete
    return () if codes is None else (len(codes.level_names), codes.num_codes)


def verify(content: dict[str, Any], name: str) -> None:
    """Raise `UserError`, which begins with `name`, unless a checkpoint's weights fit the settings in it.

    Draws no random numbers, so that what is built later starts from the same weights as without the check.
    """
    with torch.random.fork_rng(devices=[]):
        restore(content, name)
        if "objective" in content:
            try:
                choice = Config.from_dict(content["config"]).objective
                objective = build(objectives.SLOT, choice, {"total_steps": 1})
            except UserError as problem:
                raise UserError(f"{name}: {problem}") from None
            _check_fit(objective, content["objective"], name)
        if "trained" in content:
            parts = (
                (f"{part}.{key}", weight) for part in ("model", "objective") for key, weight in content[part].items()
            )
            _check_same(dict(parts), content["trained"], name)


def _build(content: Mapping[str, Any], config: Config, num_classes: int) -> Autoencoder:
    data = content["data"]
    channels, height, width = data["shape"]
    return build_autoencoder(
        {slot: getattr(config, slot) for slot in SLOTS},
        image_shape=(channels, height, width),
        data_variance=data["variance"],
        num_classes=num_classes if config.conditional else 0,
    )


def _check_fit(module: nn.Module, weights: Mapping[str, Tensor], name: str) -> None:
    """Raise `UserError`, which begins with `name`, unless the weights have the module's names, shapes and types."""
    _check_same(module.state_dict(), weights, name)


def _check_same(expected: Mapping[str, Tensor], weights: Mapping[str, Tensor], name: str) -> None:
    for key in [*expected, *weights]:
        wanted, found = _kind(expected.get(key)), _kind(weights.get(key))
        if wanted != found:
            problem = f"{shown(key)} should be {wanted} and is {found}"
            raise UserError(f"{name}: its weights do not fit the model of its settings ({problem})")


def _kind(weight: Tensor | None) -> str:
    return "absent" if weight is None else f"{str(weight.dtype).removeprefix('torch.')} {list(weight.shape)}"


class _Budget(TorchFunctionMode):
    """A context in which building a model larger than its weights raises `UserError` before memory is allocated.

    Tensors that are not stored, such as masks, may have `SLACK` elements in addition.
    """

    FACTORIES = frozenset({torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn, torch.arange})
    SLACK = 2**22

    def __init__(self, weights: Iterable[Tensor]):
        super().__init__()
        sizes = [weight.numel() for weight in weights]
        self.elements, self.tensors = sum(sizes) + self.SLACK, 4 * len(sizes) + 100
        self.left = self.elements

    def check(self, config: Config) -> None:
        """Raise `UserError` for a whole number among the members' options that exceeds the number of elements."""
        for name, slot in SLOTS.items():
            choice = resolve(slot, getattr(config, name))
            for key, value in choice.options.items():
                self._need(type(value) is not int or value <= self.elements, f"{choice.name} {key}={value}")

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function in self.FACTORIES:
            sizes = args or (kwargs["size"],)
            sizes = [size for size in (sizes[0] if isinstance(sizes[0], tuple | list) else sizes) if type(size) is int]
            self.left -= max(sizes, default=0) if function is torch.arange else math.prod(sizes)
            self.tensors -= 1
            self._need(self.left >= 0 and self.tensors >= 0)
        else:
            shapes = [value.shape for value in args if isinstance(value, Tensor)]
            longest = [max(sizes) for sizes in itertools.zip_longest(*map(reversed, shapes), fillvalue=1)]
            self._need(len(shapes) < 2 or math.prod(longest) <= self.elements)  # the size that they are broadcast to
        return function(*args, **kwargs)

    @staticmethod
    def _need(good: bool, what: str = "its settings") -> None:
        if not good:
            raise UserError(f"{what} describe a larger model than its weights")
