"""Gradient estimators: quantization has no gradient, so these functions define one.

Each takes vectors z and their codes' vectors, both `[B, D, ...]`, and returns the latter with a gradient to z.
"""

from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Gradient = Annotated[
    Literal["straight-through", "rotation"],
    "gradient past the codes: copied, or rotated and scaled like z (2410.06424)",
]


def straight_through(z: Tensor, quantized: Tensor) -> Tensor:
    """`quantized` with the gradient of the identity: dL/dz := dL/dquantized (1711.00937, section 3.2)."""
    return quantized.detach() + (z - z.detach())  # exactly `quantized`, which z + (quantized - z) is not


def rotate_to(z: Tensor, quantized: Tensor) -> Tensor:
    """`quantized` with the gradient of the rotation and scaling that map z onto it (2410.06424, section 4.2).

    dL/dz := s R^T dL/dquantized, with s = ||quantized|| / ||z|| and the rotation R = I - 2 w w^T + 2 q u^T, where u
    and q are the unit vectors of z and quantized, and w that of u + q. s and R are constants. The angle between
    gradient and vector is preserved, so vectors with the same code get different gradients.
    """
    f, e = z.detach(), quantized.detach()
    norm = f.norm(dim=1, keepdim=True)
    u, q = F.normalize(f, dim=1), F.normalize(e, dim=1)
    # w is 0 for opposite vectors, and R the reflection I - 2 u u^T. For nearly opposite ones, eps keeps rounding
    # errors from giving w a direction.
    w = F.normalize(u + q, dim=1, eps=1e-6)
    along_w, along_u = ((z * v).sum(dim=1, keepdim=True) for v in (w, u))
    scale = e.norm(dim=1, keepdim=True) / norm.clamp(min=1e-6)
    mapped = scale * (z - 2 * along_w * w + 2 * along_u * q)
    mapped = torch.where(norm > 1e-6, mapped, z)  # the origin has no direction to rotate: straight through
    return e + (mapped - mapped.detach())


GRADIENTS = {"straight-through": straight_through, "rotation": rotate_to}
