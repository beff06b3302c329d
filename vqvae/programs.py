"""The encoder and the decoder of a model as programs: files of torch.export (`.pt2`) and ONNX (`.onnx`).

B batch, C channels, H W pixels, D latent dimension; `grid` is the bottleneck's code grid, (h, w).
"""

import contextlib
import copy
import importlib
import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from vqvae.autoencoder import Autoencoder
from vqvae.errors import OptionError, UserError, one_line
from vqvae.files import whole_file

TOLERANCE = 1e-4  # sums in another order differ by less, a wrong program by more
INTERFACE = "interface.json"  # the extra file, or metadata, of a program that describes it
BATCH = "B"  # the name of the free axis


class Encoder(nn.Module):
    """Images `[B, C, H, W]` uint8 to codes `[B, *grid]` int64, or to a continuous latent's mean `[B, D, 1, 1]`."""

    def __init__(self, model: Autoencoder):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model.encode(images) if self.model.discrete is not None else self.model.posterior_mean(images)


class Decoder(nn.Module):
    """Codes or means, as `Encoder` returns them, to images `[B, C, H, W]`, floats in [0, 1]."""

    def __init__(self, model: Autoencoder):
        super().__init__()
        self.model = model

    def forward(self, latent: Tensor) -> Tensor:
        return self.model.decode(latent) if self.model.discrete is not None else self.model.decode_latents(latent)


HALVES = {"encoder": Encoder, "decoder": Decoder}
Interface = Mapping[str, Any]


def interfaces(model: Autoencoder) -> dict[str, Interface]:
    """The input and output of each half: for its `input` and its `output`, name, shape, dtype and range.

    A range is the smallest and the largest value, or None where any number may occur. `B` in a shape is any batch size.
    """
    points = not model.shows_images
    image: dict[str, Any] = {"shape": [BATCH, *model.image_shape]}
    images = image | {"dtype": "float32" if points else "uint8", "range": None if points else [0, 255]}
    shown = image | {"dtype": "float32", "range": None if points else [0, 1]}
    if model.discrete is not None:
        shape, codes = [BATCH, *model.discrete.grid], [0, model.discrete.num_codes - 1]
        latent: dict[str, Any] = {"name": "codes", "shape": shape, "dtype": "int64", "range": codes}
    else:
        shape = [BATCH, model.bottleneck.code_dim, *model.bottleneck.grid]
        latent = {"name": "latent", "shape": shape, "dtype": "float32", "range": None}
    return {
        "encoder": {"input": {"name": "images", **images}, "output": latent},
        "decoder": {"input": latent, "output": {"name": "images", **shown}},
    }


# formats of programs


class Kind(NamedTuple):
    """A format of programs."""

    save: Callable[[ExportedProgram, Interface], bytes]
    load: Callable[[Path], Callable[[Tensor], Tensor]]
    batches: tuple[int, ...] = ()  # batch sizes with which a program is checked, in addition to all examples
    needs: tuple[str, ...] = ()  # modules that it needs, from the extra of the same name


def _save_pt2(program: ExportedProgram, interface: Interface) -> bytes:
    buffer = io.BytesIO()
    torch.export.save(program, buffer, extra_files={INTERFACE: json.dumps(interface)})
    return buffer.getvalue()


def _load_pt2(path: Path) -> Callable[[Tensor], Tensor]:
    return torch.export.load(path).module()


def _save_onnx(program: ExportedProgram, interface: Interface) -> bytes:
    import onnx

    names = [[interface[end]["name"]] for end in ("input", "output")]
    if names[0] == names[1]:
        names[1] = [f"{names[1][0]}_out"]
    with _silent():
        converted = torch.onnx.export(program, dynamo=True, input_names=names[0], output_names=names[1], verbose=False)
    proto: onnx.ModelProto = converted.model_proto  # type: ignore[union-attr]
    free = proto.graph.input[0].type.tensor_type.shape.dim[0].dim_param
    for value in (*proto.graph.input, *proto.graph.output, *proto.graph.value_info):
        del value.metadata_props[:]  # torch's names, for its own use
        for axis in value.type.tensor_type.shape.dim:
            if axis.dim_param == free:
                axis.dim_param = BATCH
    for node in proto.graph.node:
        del node.metadata_props[:]
    onnx.helper.set_model_props(proto, {INTERFACE: json.dumps(interface)})
    onnx.checker.check_model(proto)
    return proto.SerializeToString()


def _load_onnx(path: Path) -> Callable[[Tensor], Tensor]:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda inputs: torch.from_numpy(session.run(None, {name: inputs.numpy()})[0])


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Keep what the ONNX exporter says of its own parts off the terminal."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            logger.setLevel(level)


KINDS = {
    "pt2": Kind(_save_pt2, _load_pt2),
    "onnx": Kind(_save_onnx, _load_onnx, batches=(1, 2), needs=("onnx", "onnxscript", "onnxruntime")),
}


def need(kind: str) -> None:
    """Raise `OptionError` if the libraries of a format of programs are not installed."""
    try:
        for name in KINDS[kind].needs:
            importlib.import_module(name)
    except ImportError as problem:
        reason = f"needs {problem.name or 'its libraries'}, which is not installed; pip install 'vqvae[{kind}]'"
        raise OptionError("format", kind, reason) from None


def write_program(half: nn.Module, example: Tensor, path: Path, interface: Interface) -> None:
    """Save an encoder or decoder as a program for any batch size, with only the weights that it uses.

    The ending of `path` chooses the format. `interface` describes the program, in its extra file `interface.json`, or
    its metadata of that name. Raises `UserError` if torch cannot make the program.
    """
    try:
        raw = KINDS[path.suffix[1:]].save(_trace(half, example), interface)
    except Exception as problem:  # torch raises many types for what it cannot trace
        reason = one_line(problem)
        raise UserError(
            f"{path}: cannot be made from this model ({reason}); its weights are in {path.parent}"
        ) from None
    with whole_file(path) as file:
        file.write(raw)


def _trace(half: nn.Module, example: Tensor) -> ExportedProgram:
    # a program keeps the strides of its weights and may require those of its example, so make both contiguous
    half = copy.deepcopy(half).requires_grad_(False).to(memory_format=torch.contiguous_format)
    example = example.clone(memory_format=torch.contiguous_format)
    with torch.no_grad():  # only strict mode keeps the batch size free through len()
        program = torch.export.export(half, (example,), dynamic_shapes=({0: Dim("batch")},), strict=True)
    used = {*program.graph_signature.parameters, *program.graph_signature.buffers}
    for name in set(program.state_dict) - used:
        del program.state_dict[name]
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # contains source lines and paths of this machine
    return program


@torch.no_grad()
def agreement(half: nn.Module, path: Path, inputs: Tensor) -> str:
    """Compare the program in a file with the module it was made from, and describe the difference.

    A program that disagrees is deleted, and raises `UserError`.
    """
    kind = KINDS[path.suffix[1:]]
    program = kind.load(path)
    sizes = sorted({*(size for size in kind.batches if size < len(inputs)), len(inputs)})
    expected, found = half(inputs), torch.cat([program(inputs[:size]) for size in sizes])
    expected = torch.cat([expected[:size] for size in sizes])
    if expected.is_floating_point():
        agrees = torch.allclose(expected, found, rtol=TOLERANCE, atol=TOLERANCE)
        text = f"differs from the model by at most {float((expected - found).abs().max()):.1g}"
    else:
        same = int((expected == found).sum())
        agrees = expected.numel() - same <= max(1, expected.numel() // 100)  # a vector may be as near to two codes
        text = f"gives {same:,} of {expected.numel():,} codes as the model does"
    if not agrees:
        path.unlink()
        raise UserError(f"{path}: {text}; deleted, because it is not the model. Its weights are in {path.parent}")
    batches = f", in batches of {', '.join(map(str, sizes))}" if len(sizes) > 1 else ""
    return f"{text}, on {len(inputs)} random examples{batches}"


def examples(model: Autoencoder, count: int) -> Tensor:
    """Random examples `[count, C, H, W]`: uint8 pixels, or float points of the plane."""
    generator = torch.Generator().manual_seed(0)
    if model.shows_images:
        return torch.randint(256, (count, *model.image_shape), generator=generator, dtype=torch.uint8)
    return torch.randn(count, *model.image_shape, generator=generator)
