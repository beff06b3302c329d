"""The card of an exported model: metadata, sizes, data, steps and metrics."""

import json
from pathlib import Path

import pytest
import torch

from tests.checkpoints import content, stored
from tests.helpers import make
from tests.test_tokens import run
from vqvae import checkpoint
from vqvae.card import model_card
from vqvae.errors import UserError
from vqvae.export import FORMATS

NUMBERS = {
    "step": 3,
    "images": 200,
    "mse": 0.0123456,
    "mse_se": 0.001,
    "perplexity": 31.5,
    "neg_elbo": None,
    "protocol": "200 images of the test split",
}


def card(evaluation=None, **changes) -> str:
    model = make()
    return model_card(content(model, **changes), model, "Use it.", library="vqvae", evaluation=evaluation)


def test_a_card_begins_with_metadata_that_hubs_read():
    head = card().split("---\n")[1]
    assert head.splitlines() == [
        "license: other", "license_name: not-stated", "library_name: vqvae", "tags:", "- vqvae", "- image-tokenizer",
    ]  # fmt: skip


def test_a_card_says_sizes_data_and_steps():
    data = {"name": "none", "shape": [3, 8, 8], "variance": 0.06, "classes": [], "note": "a note"}
    text = card(data=data | {"examples": {"train": 1234, "test": 56}})
    for row in (
        "| latent | 2x2 codes of 7: 4 tokens, 11 bits |", "| data | none (a note) |", "| examples, train | 1,234 |",
        "| steps | 3 |", "| nets | sonnet hidden=8 |", "| batch size | 128 |",
    ):  # fmt: skip
        assert row in text.splitlines()


def test_a_card_has_the_metrics_and_their_protocol():
    text = card(NUMBERS)
    assert "On 200 held-out examples" in text
    assert (
        "| mse | 0.012346 ± 0.001 | mean squared error of images in [0, 1] |".replace("[", "\\[").replace("]", "\\]")
        in text.splitlines()
    )
    assert "| perplexity | 31.5 | " in text
    assert "| neg" not in text
    assert "\n\nProtocol: 200 images of the test split.\n\n" in text
    assert "Not evaluated." in card()


def test_names_of_strangers_stay_text():
    text = card(run="run", data={"name": "a|b `c`\n# d", "note": "<script>", "classes": []})
    assert "| data | a\\|b \\`c\\`\\\\n\\# d (\\<script\\>) |" in text.splitlines()


def test_an_export_finds_the_evaluation_next_to_the_checkpoint_and_states_the_license(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = stored(Path("run"))
    about = checkpoint.identity_of(checkpoint.read("run"))
    Path("run/evaluation.json").write_text(json.dumps(NUMBERS | about))
    # the programs, which take seconds, are left out
    write = FORMATS["pt2"].write
    short = FORMATS["pt2"]._replace(write=lambda *words: iter([next(iter(write(*words)))]))
    monkeypatch.setitem(FORMATS, "pt2", short)
    assert run("export --checkpoint run --output exported --license mit") == 0
    text = Path("exported/README.md").read_text()
    assert text.startswith("---\nlicense: mit\nlibrary_name")
    assert "| mse | 0.012346" in text
    assert f"`codes` `[B, 2, 2]`, int64 from 0 to {model.discrete.num_codes - 1}" in text
    assert str(tmp_path) not in text
    assert torch.equal(checkpoint.load("exported").state_dict()["encoder.0.weight"], model.encoder[0].weight)


def test_an_evaluation_is_used_only_for_the_weights_that_it_evaluated(tmp_path):
    path, run, saved = tmp_path / "evaluation.json", tmp_path / "checkpoint.pt", content()
    about = checkpoint.identity_of(saved)
    assert checkpoint.read_evaluation(run, saved) is None
    path.write_text(json.dumps(NUMBERS | about))
    assert checkpoint.read_evaluation(run, saved) == NUMBERS | about
    again = content(make())  # made again: another seed, with the same name and step
    assert (again["run"], again["step"]) == (saved["run"], saved["step"])
    assert checkpoint.read_evaluation(run, again) is None
    for key, other in (("step", 2), ("run", "other"), ("weights", None)):
        path.write_text(json.dumps(NUMBERS | about | {key: other}))
        assert checkpoint.read_evaluation(run, saved) is None
    path.write_text(json.dumps(NUMBERS | {"run": saved["run"]}))  # of an earlier version, without a checksum
    assert checkpoint.read_evaluation(run, saved) is None


def test_checkpoint_and_best_have_evaluations_of_their_own(tmp_path):
    last, best, saved = tmp_path / "checkpoint.pt", tmp_path / "best.pt", content()
    about = checkpoint.identity_of(saved)
    (tmp_path / "evaluation.json").write_text(json.dumps(NUMBERS | about))
    assert checkpoint.read_evaluation(last, saved) == checkpoint.read_evaluation(best, saved)  # the last step is best
    of_best = about | {"weights": "others", "step": 1}
    (tmp_path / "evaluation-best.json").write_text(json.dumps(NUMBERS | of_best))
    assert checkpoint.read_evaluation(last, saved) == NUMBERS | about
    (tmp_path / "evaluation.json").write_text(json.dumps(NUMBERS | of_best))
    (tmp_path / "evaluation-best.json").write_text(json.dumps(NUMBERS | about | {"mse": 7}))
    assert checkpoint.read_evaluation(best, saved)["mse"] == 7
    assert checkpoint.read_evaluation(last, saved) is None


def test_the_checksum_of_an_evaluation_covers_the_prior():
    model = make(prior="unigram")
    before = checkpoint.identity_of(content(model))["weights"]
    with torch.no_grad():
        next(model.prior.parameters()).add_(1)
    assert checkpoint.identity_of(content(model))["weights"] != before


@pytest.mark.parametrize("raw", [b"{", b"[1]", b"\xff", b"[" * 100_000])
def test_a_damaged_evaluation_is_one_line(tmp_path, raw):
    path = tmp_path / "evaluation.json"
    path.write_bytes(raw)
    with pytest.raises(UserError, match="evaluate the run again") as caught:
        checkpoint.read_evaluation(tmp_path / "checkpoint.pt", content())
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)
