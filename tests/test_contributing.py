"""The documentation stays true: the example of CONTRIBUTING.md trains, links lead to files, commands are accepted."""

import re
import shlex
from pathlib import Path

import pytest
import torch

from vqvae import experiment, load
from vqvae.bottlenecks import BOTTLENECKS
from vqvae.commands import train
from vqvae.config import Fresh, Resumed, StageTwo, configure
from vqvae.registry import Choice, Slot, resolve

ROOT = Path(__file__).parent.parent
DOCUMENTS = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/results.md", "docs/faq.md"]


@pytest.fixture
def example(monkeypatch):
    """The names that the example of CONTRIBUTING.md defines, with its bottleneck in the table for one test."""
    monkeypatch.setitem(BOTTLENECKS, "sign", None)  # undone after the test
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.S)
    names = {"__name__": "contributing"}
    exec(block, names)
    return names


def test_the_example_trains_and_loads(example, tmp_path, monkeypatch):
    example["test_sign_trains"](tmp_path, monkeypatch)
    model = load(tmp_path / "logs/run")
    codes = model.encode(torch.rand(3, 1, 16, 16))
    assert codes.shape == (3, 4, 4)
    assert codes.max() < 64
    assert model.decode(codes).shape == (3, 1, 16, 16)


def test_the_examples_codes_are_its_vectors(example):
    bottleneck = example["Sign"](channels=5, grid=(2, 2), bits=3)
    codes = torch.arange(8).view(2, 2, 2)
    assert torch.equal(bottleneck.embed(codes).movedim(1, -1).flatten(0, 2), bottleneck.code_vectors())
    latent = bottleneck.quantize(torch.randn(4, 5, 2, 2))
    assert torch.allclose(latent.z, bottleneck.embed(latent.codes), atol=1e-5)


def test_the_registry_checks_the_examples_options(example):
    with pytest.raises(ValueError, match="bits=30: must be from 1 to 24"):
        resolve(Slot("bottleneck", BOTTLENECKS), Choice("sign", {"bits": "30"}))
    with pytest.raises(ValueError, match="beta=-1: must be at least 0"):
        example["Sign"](channels=5, grid=(2, 2), beta=-1)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_and_file_names_lead_to_files(document):
    path = ROOT / document
    text = path.read_text()
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
        assert target.startswith("https:") or (path.parent / target).exists(), target
    for name in re.findall(r"`((?:vqvae|tests|benchmarks|docs|results)/[\w/.]*)`", text):
        assert (ROOT / name).exists(), name


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_within_a_document_lead_to_headings(document):
    text = (ROOT / document).read_text()
    for file, anchor in re.findall(r"\]\(([\w./]*)#([^)]+)\)", text):
        headings = re.findall(r"^#+ (.*)$", ((ROOT / document).parent / file).read_text() if file else text, re.M)
        assert anchor in [re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings], anchor


def test_the_readme_is_short_and_its_tree_names_every_module():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 200
    tree = text.split("## Architecture")[1]
    named = set(re.findall(r"[\w.]+\.py", tree))
    modules = {p.name for p in (ROOT / "vqvae").rglob("*.py") if p.parent.name != "commands"} - {"__init__.py"}
    assert named == modules | {"train.py", "visualize_codes.py", "fingerprint.py", "faults.py"}


def commands() -> list[list[str]]:
    """The words after `train.py` of every training command in the documents."""
    texts = [(ROOT / document).read_text().replace("\\\n", " ") for document in DOCUMENTS]
    blocks = [block for text in texts for block in re.findall(r"^```\n(.*?)^```", text, re.S | re.M)]
    lines = [line for block in blocks for line in block.splitlines() if "train.py" in line]
    return [shlex.split(line.split("train.py", 1)[1], comments=True) for line in lines]


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_every_training_command_in_the_documents_is_valid(words, monkeypatch):
    content = {"config": configure({}, Fresh(), experiment.SLOTS).to_dict()}

    def only_configure(given, resume=None, **more):
        trained = StageTwo("", content) if "checkpoint" in given else Fresh()
        configure(given, Resumed(Path(), content) if resume else trained, experiment.SLOTS)

    monkeypatch.setattr(experiment, "train", only_configure)
    monkeypatch.setattr(experiment, "evaluate_checkpoint", lambda given, asked, output, **more: 0)
    train.main(words)
