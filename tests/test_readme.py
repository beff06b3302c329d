"""Every command and every block of Python in the README runs as printed, in order, on small data."""

import re
import runpy
import shlex
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.helpers import ROOT
from tests.test_published import FOLDERS, cifar_batch, idx
from vqvae import __main__, cli
from vqvae.commands import train, visualize

# a run of a minute or more becomes one of seconds
SHORT = ["--limit", "40", "--batch-size", "20", "--device", "cpu"]
SHORT_PRIOR = ["--batch-size", "20", "--max-steps", "2", "--device", "cpu"]
PROGRAMS = ("python", "torchrun", "vqvae")  # not tensorboard, which serves until it is stopped


def blocks() -> list[tuple[str, str]]:
    """The language and the content of each block of code."""
    return re.findall(r"```(\w*)\n(.*?)```", (ROOT / "README.md").read_text(), re.S)


def commands(block: str) -> list[list[str]]:
    """The words of each command in a block, in order; lines that end in a backslash are one."""
    lines = [shlex.split(line, comments=True) for line in block.replace("\\\n", " ").splitlines()]
    return [words for words in lines if words and words[0] in PROGRAMS]


def test_the_readme_prints_commands_of_every_program():
    programs = {" ".join(words[:2]) for language, text in blocks() if not language for words in commands(text)}
    expected = {"python train.py", "python visualize_codes.py", "torchrun --nproc-per-node"}
    expected |= {f"vqvae {name}" for name in ("compare", "encode", "decode", "export")}
    expected |= {"python examples/gpt.py"}
    assert programs == expected


@pytest.fixture
def there(tmp_path, monkeypatch):
    """A folder with small data sets where the commands look for them."""
    rng = np.random.default_rng(0)

    def pixels(*shape: int) -> np.ndarray:
        return rng.integers(256, size=shape, dtype=np.uint8)

    for name in ("mnist", "fashion-mnist"):
        folder = tmp_path / "data" / FOLDERS[name]
        folder.mkdir(parents=True)
        for split in ("train", "t10k"):
            (folder / f"{split}-images-idx3-ubyte").write_bytes(idx(pixels(60, 28, 28)))
            (folder / f"{split}-labels-idx1-ubyte").write_bytes(idx(np.arange(60, dtype=np.uint8) % 10))
    folder = tmp_path / "data" / "cifar-10-batches-py"
    folder.mkdir()
    for batch in (*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"):
        (folder / batch).write_bytes(cifar_batch(pixels(60, 3072), list(range(10)) * 6))
    (tmp_path / "Pictures").mkdir()
    for i in range(60):
        Image.fromarray(pixels(70, 90, 3)).save(tmp_path / "Pictures" / f"{i}.png")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def shortened(words: list[str]) -> int:
    """Run a printed command on few images; returns its exit code."""
    program, *rest = words
    if "onnx" in rest and not find_spec("onnxscript"):
        return 0
    if program == "vqvae":
        rest = [name for word in rest for name in (sorted(map(str, Path().glob(word))) if "*" in word else [word])]
        return __main__.main([*rest, *(["--limit", "20"] if "encode" in rest and "--dataset" in rest else [])])
    if program == "torchrun":  # one process stands for two: tests/test_distributed.py starts them
        rest = rest[rest.index("train.py") :]
    script, *flags = rest
    if script == "examples/gpt.py":
        if not find_spec("transformers"):
            return 0
        runpy.run_path(str(ROOT / script))["main"]([*flags, "--steps", "2"])
        return 0
    flags = ["64" if word == "256" else word for word in flags]  # pixels
    if script == "visualize_codes.py":
        return cli.run(visualize.main, flags)
    if "--prior" in flags and "--checkpoint" in flags:
        return cli.run(train.main, [*flags, *SHORT_PRIOR])
    if {"--list", "--evaluate", "--resume"} & set(flags):
        return cli.run(train.main, flags)
    return cli.run(train.main, [*flags, *SHORT, *([] if "--epochs" in flags else ["--epochs", "1"])])


def test_every_command_and_every_block_of_python_runs_as_printed(there, capsys):
    names: dict = {}  # a block may use what an earlier one imported
    for language, text in blocks():
        if language == "python":
            exec(compile(text, "README.md", "exec"), names)
        for words in commands(text) if not language else ():
            capsys.readouterr()
            assert shortened(words) == 0, f"{shlex.join(words)}: {capsys.readouterr().err}"
    assert list(there.glob("logs/*/events.out.tfevents.*"))
    assert (there / "plots/vqvae-mnist/index.html").is_file()
    assert len(list((there / "decoded").iterdir())) == 20
