"""The contestants in the benchmarks of speed: our training step and quantizer, and those of two peers in the same nets.

plain   the usual PyTorch VQ-VAE: distances with both norms, one-hot matrix products for the codes and for the EMA,
        NCHW, Adam with PyTorch's defaults
vqp     the EMA quantizer of vector-quantize-pytorch, otherwise as plain
"""

import importlib.util
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqvae.autoencoder import SLOTS, build_autoencoder
from vqvae.bottlenecks.vq import VQ, VQOptions
from vqvae.errors import UserError
from vqvae.nets import Sonnet
from vqvae.objectives import ElboObjective
from vqvae.optimizer import OPTIMIZERS
from vqvae.registry import Choice
from vqvae.schedules import Schedule
from vqvae.stage_one import AutoencoderTraining
from vqvae.training import Plan

SHAPE, VARIANCE, BATCH = (3, 32, 32), 0.063, 128  # CIFAR-10's images, the variance of its pixels, images per step
DIM = 64  # code dimension


class PlainQuantizer(nn.Module):
    """The EMA quantizer found in most PyTorch repositories (`[B, D, h, w]`, decay 0.99, commitment 0.25)."""

    def __init__(self, num_codes: int):
        super().__init__()
        self.register_buffer("codebook", torch.randn(num_codes, DIM))
        self.register_buffer("counts", torch.zeros(num_codes))
        self.register_buffer("totals", self.codebook.clone())

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        rows = z.permute(0, 2, 3, 1).contiguous()  # [B, h, w, D]
        flat = rows.view(-1, DIM)
        norms = flat.square().sum(dim=1, keepdim=True) + self.codebook.square().sum(dim=1)
        distances = norms - 2 * flat @ self.codebook.t()
        one_hot = torch.zeros_like(distances).scatter_(1, distances.argmin(dim=1, keepdim=True), 1)
        quantized = (one_hot @ self.codebook).view_as(rows)
        if self.training:
            self._update(flat.detach(), one_hot.detach())
        loss = 0.25 * F.mse_loss(rows, quantized.detach())
        quantized = rows + (quantized - rows).detach()
        return quantized.permute(0, 3, 1, 2).contiguous(), loss

    @torch.no_grad()
    def _update(self, flat: Tensor, one_hot: Tensor) -> None:
        self.counts.mul_(0.99).add_(one_hot.sum(dim=0), alpha=0.01)
        self.totals.mul_(0.99).add_(one_hot.t() @ flat, alpha=0.01)
        n = self.counts.sum()
        smoothed = (self.counts + 1e-5) / (n + len(self.counts) * 1e-5) * n
        self.codebook.copy_(self.totals / smoothed.unsqueeze(1))


class PeerQuantizer(nn.Module):
    """The quantizer of vector-quantize-pytorch with the same settings."""

    def __init__(self, num_codes: int):
        super().__init__()
        from vector_quantize_pytorch import VectorQuantize

        self.inner = VectorQuantize(
            DIM, num_codes, decay=0.99, commitment_weight=0.25, accept_image_fmap=True, rotation_trick=False
        )

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        quantized, _, loss = self.inner(z)
        return quantized, loss.sum()


def plain_decoder(nets: Sonnet) -> nn.Module:
    """Our decoder, with PyTorch's own transposed convolution as its last layer."""
    decoder = nets.decoder(DIM, SHAPE[0])
    last = decoder[-1]
    decoder[-1] = nn.ConvTranspose2d(last.in_channels, last.out_channels, 4, stride=2, padding=1)
    decoder[-1].load_state_dict(last.state_dict())
    return decoder


class Peer(nn.Module):
    """Our nets with a peer's quantizer and Sonnet's loss: images `[B, C, H, W]` (uint8) to a scalar."""

    def __init__(self, quantizer: nn.Module, variance: float = VARIANCE):
        super().__init__()
        nets = Sonnet(image_shape=SHAPE)
        self.encoder = nn.Sequential(nets.encoder(), nn.Conv2d(nets.channels, DIM, 1))
        self.quantizer, self.decoder, self.variance = quantizer, plain_decoder(nets), variance

    def forward(self, images: Tensor) -> Tensor:
        x = images.float() / 255 - 0.5
        quantized, loss = self.quantizer(self.encoder(x))
        return F.mse_loss(self.decoder(quantized), x) / self.variance + loss

    def reconstruct(self, images: Tensor) -> Tensor:
        """Decoded images `[B, C, H, W]`, in [0, 1] like those of our model."""
        quantized, _ = self.quantizer(self.encoder(images.float() / 255 - 0.5))
        return (self.decoder(quantized) + 0.5).clamp(0, 1)


def ours(device: torch.device) -> AutoencoderTraining:
    """The default model of train.py for CIFAR-10, without the k-means start."""
    words = {"nets": "sonnet", "bottleneck": "vq init=normal", "prior": "uniform", "likelihood": "mse"}
    choices = {slot: Choice.parse(slot, words[slot].split()) for slot in SLOTS}
    model = build_autoencoder(choices, image_shape=SHAPE, data_variance=VARIANCE)
    return AutoencoderTraining(model, ElboObjective(total_steps=1)).to(device)


def our_quantizer(num_codes: int) -> VQ:
    options = VQOptions(num_codes=num_codes, code_dim=DIM, init="normal")
    return VQ(channels=DIM, grid=(8, 8), options=options, projection=False)


QUANTIZERS: dict[str, Callable[[int], nn.Module]] = {
    "ours": our_quantizer,
    "plain": PlainQuantizer,
    "vqp": PeerQuantizer,
}


def plan_of(device: torch.device, **settings) -> Plan:
    rest = {"weight_decay": 0.0, "seed": 0, "precision": "fp32", "log_every": 50, "checkpoint_every": (50, None)}
    return Plan(epochs=1, batch_size=BATCH, lr=Schedule.parse("3e-4"), device=device, **(rest | settings))


def our_step(module: AutoencoderTraining, images: Tensor, plan: Plan) -> Callable[[], None]:
    optimizer = OPTIMIZERS[plan.optimizer](module.parameter_groups(plan.weight_decay), plan.device)

    def step() -> None:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=plan.precision == "bf16"):
            loss = module(images, None, 0).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def peer_update(model: nn.Module, precision: str = "fp32") -> Callable[[Tensor], None]:
    """A function that takes a training step on images `[B, C, H, W]` (uint8), with Adam at 3e-4."""
    adam = torch.optim.Adam(model.parameters(), lr=3e-4)

    def update(images: Tensor) -> None:
        adam.zero_grad()
        with torch.autocast(images.device.type, torch.bfloat16, enabled=precision == "bf16"):
            loss = model(images)
        loss.backward()
        adam.step()

    return update


def training_step(
    name: str, device: torch.device, precision: str = "fp32", *, backend: str | None = None, batch: int = BATCH
) -> Callable[[], None]:
    """A training step of one of `QUANTIZERS` on noise; `backend` compiles the nets, and peers as a whole.

    All use Adam, except `muon`, which is our step with Muon, our default.
    """
    images = torch.randint(256, (batch, *SHAPE), dtype=torch.uint8, device=device)
    if name not in ("ours", "muon"):
        model = Peer(QUANTIZERS[name](512)).to(device)
        if backend:
            model.compile(backend=backend)
        return partial(peer_update(model, precision), images)
    module = ours(device)
    if backend:
        module.model.encoder.compile(backend=backend)
        module.model.decoder.compile(backend=backend)
    optimizer = "muon" if name == "muon" else "adamw"
    return our_step(module, images, plan_of(device, precision=precision, optimizer=optimizer))


def need_peers() -> None:
    """Raise `UserError` unless the peers are installed."""
    if importlib.util.find_spec("vector_quantize_pytorch") is None:
        raise UserError("a peer is not installed: pip install vector-quantize-pytorch")
