"""Saved models on the test split. test_experiment.py tests the end of runs and the command line."""

import torch

from tests.helpers import make
from vqvae.assessment import drawn, with_earlier


def test_an_evaluation_keeps_metrics_that_only_an_earlier_one_has():
    base = {"protocol": "5 images; vqvae 1, torch 2", "seed": 0, "images": 5, "fingerprint": "a"}
    probed = base | {"protocol": base["protocol"] + "; probe: ...", "mse": 1.0, "probe_accuracy": 0.9, "iw_samples": 0}
    bounded = base | {"mse": 1.0, "iw_samples": 100, "iw_bound": 3.0}
    expected = probed | {"iw_samples": 100, "iw_bound": 3.0}
    assert with_earlier(bounded, probed) == expected
    assert with_earlier(probed, bounded) == expected
    of_an_earlier_version = {key: value for key, value in probed.items() if key != "fingerprint"}
    assert with_earlier(bounded, of_an_earlier_version) == expected
    others = [{"seed": 1}, {"fingerprint": "b"}, {"protocol": "6 images; vqvae 1, torch 2"}]
    for other in (None, {}, {"protocol": 7}, *(probed | change for change in others)):
        assert with_earlier(bounded, other) == bounded


def test_draws_depend_on_one_seed_and_take_the_labels_in_turn():
    model, labels = make(num_classes=3, prior="pixelcnn").eval(), torch.tensor([0, 1, 2, 2])
    batches = list(drawn(model, 5, labels, seed=1, batch_size=3))
    assert [len(batch) for batch in batches] == [3, 2]
    assert torch.equal(torch.cat(batches), torch.cat(list(drawn(model, 5, labels, seed=1, batch_size=3))))
    assert list(drawn(make(), 0, None, seed=1)) == []
    assert [len(batch) for batch in drawn(make().eval(), 2, None, seed=1)] == [2]
