"""Lookup-free quantisation: every channel becomes its sign, and a code is the number that the signs spell.

B batch, h w code grid, D channels or bits, K = 2^D codes, N = B h w vectors.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqvae.bottlenecks.codebook import Discrete, check_options, entropy, standardise, straight_through, vectors_of
from vqvae.latent import Latent


class LFQ(Discrete):
    """Lookup-free quantisation (MAGVIT-v2, 2310.05737, section 3.1): z = sign(f), straight through, K = 2^bits.

    With p(c|f) = softmax_c(-||f - c||^2 / temperature) over all K corners c, in training the loss is
    entropy_weight * (mean_n H(p(.|f_n)) - diversity * H(mean_n p(.|f_n))) (eq. 5) + beta * mean (f - sg z)^2.
    Both entropies are exact at any number of bits, and no N x K matrix exists (see `entropies`).

    bits             D; a code is the binary number of its positive channels, the first channel its highest bit.
    entropy_weight   of both entropies: the first makes each choice certain, the second the choices varied.
    diversity        how much more the second counts.
    temperature      of p; small ones see only the vectors close to a boundary between codes.
    beta             commitment: how hard the features are pulled to ±1.
    """

    def __init__(
        self,
        *,
        channels: int,
        grid: tuple,
        bits: int = 9,
        entropy_weight: float = 0.1,
        diversity: float = 1.0,
        temperature: float = 1.0,
        beta: float = 0.25,
    ):
        super().__init__()
        check_options(
            "lfq",
            bits=(bits, 1, 24),
            entropy_weight=(entropy_weight, 0, math.inf),
            diversity=(diversity, 0, math.inf),
            temperature=(temperature, 1e-6, math.inf),
            beta=(beta, 0, math.inf),
        )
        self.num_codes, self.code_dim, self.grid = 2**bits, bits, tuple(grid)
        self.entropy_weight, self.diversity = entropy_weight, diversity
        self.temperature, self.beta = temperature, beta
        self.projection = nn.Conv2d(channels, bits, 1)
        self.register_buffer("places", 2 ** torch.arange(bits - 1, -1, -1), persistent=False)

    def vectors(self, codes: Tensor) -> Tensor:
        """`[..., D]` of codes `[...]`."""
        return (codes.unsqueeze(-1) // self.places % 2 * 2 - 1).float()

    def initialise(self, features: Tensor) -> None:
        """Spread features `[B, channels, h, w]` over the codes."""
        standardise(self.projection, features)

    def embed(self, codes: Tensor) -> Tensor:
        return self.vectors(codes).movedim(-1, 1)

    def code_vectors(self) -> Tensor:
        return self.vectors(torch.arange(self.num_codes, device=self.places.device))

    def entropies(self, f: Tensor) -> tuple[Tensor, Tensor]:
        """mean_n H(p(.|f_n)) and H(mean_n p(.|f_n)) in nats, for f `[N, D]`.

        Signs are independent given f, with p(+1|f) = sigmoid(4 f / temperature), so the first is a sum over bits. For
        the second p is split into its high and low bits, p(c|f) = p(high|f) p(low|f): the mean over n is then one
        matrix product of `[2^(D/2), N]` and `[N, 2^(D/2)]`.
        """
        logits = 4 * f / self.temperature
        size = logits.abs()
        certain = (F.softplus(-size) + size * torch.sigmoid(-size)).sum(1).mean()
        middle = f.shape[1] // 2
        mean = _joint(logits[:, :middle]).T @ _joint(logits[:, middle:]) / len(f)
        return certain, entropy(mean.flatten())

    def forward(self, features: Tensor, step: int) -> Latent:
        f = self.projection(features)  # [B, D, h, w]
        positive = f.detach() > 0
        codes = (positive.movedim(1, -1) * self.places).sum(-1)
        signs = positive.to(f.dtype) * 2 - 1
        commitment = F.mse_loss(f, signs)
        loss, stats = self.beta * commitment, {"commitment": commitment.detach()}
        if self.training and self.entropy_weight:
            certain, varied = self.entropies(vectors_of(f))
            loss = loss + self.entropy_weight * (certain - self.diversity * varied)
            stats |= {"choice_entropy": certain.detach(), "usage_entropy": varied.detach()}
        latent = Latent.of_codes(codes)
        return latent._replace(z=straight_through(f, signs), loss=loss, stats=stats)


def _joint(logits: Tensor) -> Tensor:
    """Probabilities `[N, 2^b]` of all settings of b independent bits with logits `[N, b]`, the first the highest."""
    joint = logits.new_ones(len(logits), 1)
    for bit in logits.T.unsqueeze(2):
        joint = torch.stack([joint * torch.sigmoid(-bit), joint * torch.sigmoid(bit)], dim=2).flatten(1)
    return joint
