"""Every member works in float64, and with empty batches."""

import pytest
import torch

from tests.helpers import choose, fitting, images, make, training
from vqvae.autoencoder import Autoencoder, unit_range
from vqvae.bottlenecks import BOTTLENECKS
from vqvae.layers import LAYERS, Quantizer
from vqvae.likelihoods import LIKELIHOODS
from vqvae.priors import PRIORS

CONTINUOUS = ("normal", "made-flow")
MEMBERS = {
    **{f"bottleneck {name}": fitting(name) for name in BOTTLENECKS},
    "codebook by gradient": {"bottleneck": choose("bottleneck", "vq", codebook="gradient")},
    "diversity": {"bottleneck": choose("bottleneck", "vq", diversity=0.1)},
    "rotation": {"bottleneck": choose("bottleneck", "vq", gradient="rotation")},
    "flows": {"bottleneck": choose("bottleneck", "gumbel", iaf_flows=1), "prior": "transformer"},
    "linear posterior": {"bottleneck": choose("bottleneck", "gumbel", posterior="linear")},
    **{f"prior {name}": {"prior": name} for name in PRIORS if name not in CONTINUOUS},
    **{f"prior {name}": fitting("gaussian") | {"prior": name} for name in CONTINUOUS},
    **{f"likelihood {name}": {"likelihood": name} for name in LIKELIHOODS},
}
every_member = pytest.mark.parametrize("name", MEMBERS)


def binary(n: int) -> torch.Tensor:
    return (images(n) > 127).to(torch.uint8) * 255  # which every likelihood takes


@every_member
def test_a_model_in_float64_trains_in_float64(name):
    module = training(**MEMBERS[name])
    module.initialize(lambda n: binary(8))
    module.double().train()
    for step in range(2):
        loss = module(binary(4), torch.zeros(4, dtype=torch.int64), step).loss
        loss.backward()
    assert loss.dtype == torch.float64
    assert loss.isfinite()
    for key, value in module.state_dict().items():
        assert value.dtype in (torch.float64, torch.int64, torch.bool), key
        assert value.isfinite().all(), key


@every_member
def test_without_images_there_are_no_codes_no_reconstructions_and_no_bound(name):
    model: Autoencoder = make(**MEMBERS[name]).eval()
    nothing, labels = images(0), torch.zeros(0, dtype=torch.int64)
    assert model.reconstruct(nothing).shape == (0, 3, 8, 8)
    assert model.sample(0).shape == (0, 3, 8, 8)
    latent = model.quantize(unit_range(nothing))
    assert model.prior.log_prob(latent, labels).shape == (0,)
    if model.discrete is not None:
        codes = model.encode(nothing)
        assert codes.shape == (0, *model.discrete.grid)
        assert model.decode(codes).shape == (0, 3, 8, 8)
    for mode in (True, False):
        with pytest.raises(ValueError, match="the batch is empty"):
            model.train(mode).elbo(unit_range(nothing), labels)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("shape", [(2, 8, 3, 3), (2, 5, 8)])
def test_a_layer_in_float64_trains_and_takes_no_examples_in_evaluation_only(name, shape):
    layer = Quantizer(name, 8).double()
    for _ in range(30):  # long enough for codes to be judged and revived
        out = layer(torch.randn(shape, dtype=torch.float64))
    assert out.z.dtype == out.loss.dtype == torch.float64
    nothing = torch.zeros((0, *shape[1:]), dtype=torch.float64)
    with pytest.raises(ValueError, match="at least one vector"):
        layer(nothing)
    codes = layer.eval()(nothing).codes
    assert layer.decode(codes).shape == nothing.shape
    with pytest.raises(ValueError, match="at least one vector"):
        layer(torch.zeros((2, 8, 0, 3) if len(shape) == 4 else (2, 0, 8), dtype=torch.float64))
