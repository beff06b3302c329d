#!/usr/bin/env python3
"""The rate of each convolution of Sonnet's nets on this CPU, next to that of matrix products, as a Markdown table.

  python benchmarks/layers.py                     CIFAR-10's size, batch 128
  python benchmarks/layers.py --batch-size 32

Convolutions are in fp32, with channels last (NHWC, as we train) and first (NCHW). All but the last one are PyTorch's.
They take turns; times are medians. Backward computes the gradients that training needs, so none for the input of the
first layer.
"""

import argparse
import copy
from collections.abc import Callable
from functools import partial

import torch
from contest import interleaved, seconds
from hardware import describe
from peers import BATCH, DIM, SHAPE
from runs import table
from speed import SIDE, product
from torch import Tensor, nn

from vqvae.devices import keep_memory
from vqvae.nets import Sonnet

FORMATS = {"NHWC": torch.channels_last, "NCHW": torch.contiguous_format}
Layer = tuple[nn.Module, Tensor]  # a convolution and its input


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=BATCH, help=f"images (default: {BATCH})")
    options = parser.parse_args()
    keep_memory()
    torch.manual_seed(0)
    cpu = torch.device("cpu")
    took = interleaved({kind: partial(seconds, product(kind, torch.float32, cpu)) for kind in ("mm", "convolution")})
    print(describe())
    rates = ", ".join(f"{kind} {2 * SIDE**3 / duration / 1e9:.0f}" for kind, duration in took.items())
    print(f"products of {SIDE} x {SIDE} matrices, GFLOP/s: {rates}\n")
    rows = [measured(layer, x) for layer, x in distinct(layers(options.batch_size))]
    print("\n".join(table(("layer", "MFLOP / image", "forward, GFLOP/s: NHWC, NCHW", "backward: NHWC, NCHW"), rows)))


def layers(batch: int) -> list[Layer]:
    """The convolutions of the encoder, of the projection to codes, and of the decoder."""
    nets, found = Sonnet(image_shape=SHAPE), []
    decoder = nets.decoder(DIM, SHAPE[0])
    whole = nn.Sequential(nets.encoder(), nn.Conv2d(nets.channels, DIM, 1), decoder)
    for module in whole.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            module.register_forward_hook(lambda layer, inputs, _: found.append((layer, inputs[0].detach())))
    with torch.no_grad():
        whole(torch.randn(batch, *SHAPE))
    for layer, _ in found:
        layer._forward_hooks.clear()
    return found


def distinct(found: list[Layer]) -> list[Layer]:
    """The layers, but only one of those that have the same sizes."""
    return list({name(layer): (layer, x) for layer, x in reversed(found)}.values())[::-1]


def name(layer: nn.Module) -> str:
    kind = "transposed " if isinstance(layer, nn.ConvTranspose2d) else ""
    stride = " stride 2" if layer.stride == (2, 2) else ""
    width = layer.kernel_size[0]
    return f"{kind}{width}x{width}{stride}, {layer.in_channels} to {layer.out_channels}"


def pixels(layer: nn.Module, x: Tensor) -> int:
    """How many times a convolution applies each of its weights to an image."""
    return (x if isinstance(layer, nn.ConvTranspose2d) else layer(x[:1]))[0, 0].numel()


def measured(layer: nn.Module, x: Tensor) -> tuple[str, ...]:
    """A row of the table."""
    flops = 2 * layer.weight.numel() * pixels(layer, x)  # of an image
    turns: dict[str, Callable[[], float]] = {}
    for order, memory in FORMATS.items():
        forward, backward = passes(layer, x, memory)
        turns |= {f"forward {order}": partial(seconds, forward), f"backward {order}": partial(seconds, backward)}
    took = interleaved(turns, rounds=15)
    gradients = 1 if layer.in_channels == SHAPE[0] else 2
    rates = {turn: flops * len(x) / duration / 1e9 for turn, duration in took.items()}
    cells = [
        ", ".join(f"{rates[f'{way} {order}'] * count:.0f}" for order in FORMATS)
        for way, count in (("forward", 1), ("backward", gradients))
    ]
    return name(layer), f"{flops / 1e6:.1f}", *cells


def passes(layer: nn.Module, x: Tensor, memory: torch.memory_format) -> tuple[Callable[[], None], Callable[[], None]]:
    """The forward and the backward pass of a convolution in a memory format."""
    layer = copy.deepcopy(layer).to(memory_format=memory)
    x = x.contiguous(memory_format=memory).requires_grad_(layer.in_channels != SHAPE[0])
    output = layer(x)
    gradient = torch.randn_like(output)
    wanted = [*layer.parameters(), x] if x.requires_grad else [*layer.parameters()]

    @torch.no_grad()
    def forward() -> None:
        layer(x)

    def backward() -> None:
        torch.autograd.grad(output, wanted, gradient, retain_graph=True)

    return forward, backward


if __name__ == "__main__":
    main()
