"""Saved models on the test split. The end of runs and the command line are in test_experiment.py."""

import torch

from tests.helpers import make
from vqvae.assessment import drawn


def test_draws_are_of_one_seed_and_of_the_labels_in_turn():
    model, labels = make(num_classes=3, prior="pixelcnn").eval(), torch.tensor([0, 1, 2, 2])
    batches = list(drawn(model, 5, labels, seed=1, batch_size=3))
    assert [len(batch) for batch in batches] == [3, 2]
    assert torch.equal(torch.cat(batches), torch.cat(list(drawn(model, 5, labels, seed=1, batch_size=3))))
    assert list(drawn(make(), 0, None, seed=1)) == []
    assert [len(batch) for batch in drawn(make().eval(), 2, None, seed=1)] == [2]
