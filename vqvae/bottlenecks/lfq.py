"""Lookup-free quantization: every channel becomes its sign, and the signs are the bits of the code.

B batch, h w code grid, N = B h w vectors, D channels or bits, K = 2^D codes.
"""

from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor

from vqvae import shares
from vqvae.bottlenecks.base import FixedCodes, Projection, entropy, vectors_of
from vqvae.bottlenecks.gradients import straight_through
from vqvae.contracts import Latent
from vqvae.registry import Range, checked


class LFQ(FixedCodes):
    """Lookup-free quantization (MAGVIT-v2, 2310.05737, section 3.1): z = sign(f), straight through.

    A code is a binary number whose ones are the positive channels, the first channel the most significant.
    Loss: beta * mean (f - sg z)^2, in training + entropy_weight * (mean_n H(p(.|f_n)) - diversity * H(mean_n p(.|f_n)))
    (eq. 5), with p(c|f) = softmax_c(-||f - c||^2 / temperature) over all K corners c. The first entropy makes each
    choice certain, the second makes the choices varied. Both are exact for any D and need no N x K matrix.
    """

    @checked
    def __init__(
        self,
        *,
        channels: int,
        grid: tuple[int, int],
        bits: Annotated[int, Range(1, 24), "channels D of the 2^D codes"] = 9,
        entropy_weight: Annotated[float, Range(0), "weight of both entropies"] = 0.1,
        diversity: Annotated[float, Range(0), "weight of the second entropy relative to the first"] = 1.0,
        temperature: Annotated[float, Range(1e-6), "softmax temperature; a small one ignores far boundaries"] = 1.0,
        beta: Annotated[float, Range(0), "weight of the commitment loss"] = 0.25,
    ):
        super().__init__()
        self.num_codes, self.code_dim, self.grid = 2**bits, bits, grid
        self.entropy_weight, self.diversity = entropy_weight, diversity
        self.temperature, self.beta = temperature, beta
        self.projection = Projection(channels, bits)
        self.register_buffer("places", 2 ** torch.arange(bits - 1, -1, -1), persistent=False)

    def vectors(self, codes: Tensor) -> Tensor:
        return (codes.unsqueeze(-1) // self.places % 2 * 2 - 1).float()

    def entropies(self, f: Tensor) -> tuple[Tensor, Tensor]:
        """mean_n H(p(.|f_n)) and H(mean_n p(.|f_n)) in nats, for f `[N, D]`.

        Given f the bits are independent, with p(+1|f) = sigmoid(4 f / temperature). So the first entropy is a sum
        over bits. For the second, p(c|f) = p(high bits|f) p(low bits|f), so the mean over n is one matrix product
        `[2^(D/2), N] @ [N, 2^(D/2)]`. It is over the vectors of the whole batch, which processes may share.
        """
        logits = 4 * f / self.temperature
        size = logits.abs()
        certain = (F.softplus(-size) + size * torch.sigmoid(-size)).sum(1).mean()
        middle = f.shape[1] // 2
        mean = _joint(logits[:, :middle]).T @ _joint(logits[:, middle:]) / len(f)
        return certain, entropy(shares.mean_over(mean.flatten(), len(f)))

    def quantize(self, features: Tensor) -> Latent:
        return self._signs(features, entropy_weight=0.0)

    def forward(self, features: Tensor, step: int) -> Latent:
        return self._signs(features, self.entropy_weight if self.training else 0.0)

    def _signs(self, features: Tensor, entropy_weight: float) -> Latent:
        f = self.projection(features)  # [B, D, h, w]
        positive = f.detach() > 0
        codes = (positive.movedim(1, -1) * self.places).sum(-1)
        signs = positive.to(f.dtype) * 2 - 1
        commitment = F.mse_loss(f, signs)
        loss, stats = self.beta * commitment, {"commitment": commitment.detach()}
        if entropy_weight:
            certain, varied = self.entropies(vectors_of(f))
            loss = loss + entropy_weight * (certain - self.diversity * varied)
            stats |= {"choice_entropy": certain.detach(), "usage_entropy": varied.detach()}
        return Latent.of_codes(codes, straight_through(f, signs), loss=loss, stats=stats)


def _joint(logits: Tensor) -> Tensor:
    """Probabilities `[N, 2^b]` of all values of b independent bits, the first the most significant; logits `[N, b]`."""
    joint = logits.new_ones(len(logits), 1)
    for bit in logits.T.unsqueeze(2):
        joint = torch.stack([joint * torch.sigmoid(-bit), joint * torch.sigmoid(bit)], dim=2).flatten(1)
    return joint
