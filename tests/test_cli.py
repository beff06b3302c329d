"""Every command explains itself, and every error is one line with an exit code."""

import io
import subprocess
import sys
import warnings
from typing import Annotated, Literal

import pytest

from tests.helpers import ROOT, run_train
from vqvae import __main__ as program
from vqvae import cli, run_data
from vqvae.commands import train
from vqvae.errors import OptionError, UserError
from vqvae.registry import Passes, Range, Slot

COMMANDS = ("train", "visualize", "compare", "encode", "decode", "export")
HEAVY = {"torch", "numpy", "matplotlib", "sklearn", "scipy", "tensorboard", "torchvision", "PIL", "imageio"}


@pytest.fixture(autouse=True)
def format_of_warnings(monkeypatch):
    """`cli.run` changes how warnings are printed; this restores it."""
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)


@pytest.fixture
def no_data(monkeypatch):
    """Fails a test that reads data."""

    def read(*_, **__):
        pytest.fail("data were read")

    monkeypatch.setattr(run_data, "load", read)


def outcome(problem: BaseException):
    """A command that ends with an exception."""

    def main(argv: list[str]) -> int:
        raise problem

    return main


# errors and exit codes


@pytest.mark.parametrize(
    ("problem", "code", "line"),
    [
        (UserError("a.pt: no such file"), 2, "error: a.pt: no such file\n"),
        (UserError("a.pt: a\nb \x1b[31m red"), 2, "error: a.pt: a\\nb \\x1b[31m red\n"),
        (OptionError("batch_size", 9, "is large"), 2, "error: --batch-size 9: is large\n"),
        (OptionError("decay", 2, "x", owner="vq", slot="bottleneck"), 2, "error: --bottleneck vq decay=2: x\n"),
        (OptionError("name", "a\nb", "must be a name"), 2, "error: --name a\\nb: must be a name\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (
            RuntimeError("[enforce fail at a.cpp:1] DefaultCPUAllocator: can't allocate memory: you tried 9 bytes"),
            2,
            "error: not enough memory (DefaultCPUAllocator: can't allocate memory: you tried 9 bytes); use a smaller "
            "batch, image or model\n",
        ),
        (MemoryError(), 2, "error: not enough memory (MemoryError); use a smaller batch, image or model\n"),
    ],
)
def test_an_error_is_one_line_and_an_exit_code(capsys, problem, code, line):
    assert cli.run(outcome(problem), []) == code
    out, err = capsys.readouterr()
    assert (out, err) == ("", line)


@pytest.mark.parametrize("problem", [ZeroDivisionError(), RuntimeError("mat1 and mat2 shapes cannot be multiplied")])
def test_a_mistake_in_the_program_keeps_its_traceback(problem):
    with pytest.raises(type(problem)):
        cli.run(outcome(problem), [])


def test_a_command_gets_the_words_and_gives_the_exit_code(monkeypatch):
    assert cli.run(lambda argv: len(argv), ["a", "b"]) == 2
    monkeypatch.setattr(sys, "argv", ["train.py", "a", "b", "c"])
    assert cli.run(lambda argv: len(argv)) == 3


def test_a_warning_is_one_line_too():
    cli.run(lambda argv: 0, [])
    assert warnings.formatwarning("slow\n\x1b[1m", UserWarning, "a.py", 1) == "warning: slow\\n\\x1b[1m\n"


def parse(*words: str):
    parser = cli.parser("a program", "examples\n  a program")
    parser.add_argument("--count", type=cli.value("count", int, Range(1)))
    parser.add_argument("--top-k", type=cli.value("top_k", float, Range(0, below=5)))
    parser.add_argument("--kind", type=cli.value("kind", Literal["a", "b"]))
    parser.add_argument("--words", nargs="+")
    parser.add_argument("--quiet", action="store_true")
    return parser.parse_args(words)


def test_a_value_is_converted_and_checked():
    options = parse("--count", "1e1", "--top-k", "2", "--count", "1e1", "--words=a", "b=-1")
    assert (options.count, options.top_k, options.words, type(options.count)) == (10, 2.0, ["a", "b=-1"], int)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--count 0", "error: --count 0: must be at least 1"),
        ("--count 1.5", "error: --count 1.5: must be a whole number"),
        ("--top-k nan", "error: --top-k nan: must be a finite number, from 0 to below 5"),
        ("--top-k much", "error: --top-k much: must be a number"),
        ("--count", "error: --count: expected one argument; see --help"),
        ("--kind c", "error: --kind c: must be one of a, b"),
        ("--count -1e-3", "error: --count -1e-3: must be a whole number"),
        ("--count -1", "error: --count -1: must be at least 1"),
        ("--count=", "error: --count '': is empty; give a value, or leave it out"),
        ("--words=", "error: --words '': is empty; give a value, or leave it out"),
        ("--count --kind a", "error: --count: expected one argument; see --help"),
        ("--count 1 --count 2", "error: --count 2: is given twice, also as --count 1; keep one"),
        ("--words a b --words a", "error: --words a: is given twice, also as --words a b; keep one"),
        ("--coun 3", "error: --coun: no such flag (did you mean '--count'?); see --help"),  # no abbreviations
        ("-count 3", "error: -count: no such flag (did you mean '--count'?); see --help"),
        ("—count=3", "error: —count=3: belongs to no flag (did you mean '--count'?); see --help"),
        ("count=3", "error: count=3: belongs to no flag (did you mean '--count'?); see --help"),
        ("a", "error: a: belongs to no flag; see --help"),
        ("--kind a b", "error: --kind a b: takes one value; quote a value that contains spaces"),
        ("--quiet yes", "error: --quiet yes: takes no value"),
    ],
)
def test_a_bad_argument_is_named_without_the_usage(capsys, words, message):
    assert cli.run(lambda argv: parse(*argv) and 0, words.split()) == 2
    err = capsys.readouterr().err
    assert err.startswith(message)
    assert err.count("\n") == 1


# --list


class Kite:
    """A kite.

    It flies.

        lift = wind * area
    """

    def __init__(
        self,
        *,
        wind: float,
        area: Annotated[float, Range(above=0), "square meters " + "of cloth " * 11] = 1.5,
        tails: Annotated[int, Range(1, 9), Passes(lambda n: n % 2 == 1, "odd"), "tails"] = 1,
        shape: Annotated[Literal["delta", "box"], "its shape"] = "delta",
        lit: Annotated[bool, "whether it glows"] = False,
    ): ...


class Stone:
    """A stone."""


def test_a_description_shows_type_range_default_and_explanation_of_each_option():
    assert cli.describe(Slot("toy", {"kite": Kite, "stone": Stone})) == "\n".join([
        "--toy kite",
        "    A kite.",
        "",
        "    It flies.",
        "",
        "        lift = wind * area",
        "",
        f"      area=1.5     number above 0: square meters {'of cloth ' * 7}of",
        "                   cloth of cloth of cloth of cloth",
        "      tails=1      integer from 1 to 9, odd: tails",
        "      shape=delta  delta | box: its shape",
        "      lit=no       yes | no: whether it glows",
        "",
        "--toy stone",
        "    A stone.",
    ])  # fmt: skip


@pytest.mark.parametrize(
    ("what", "shown"),
    [
        ("data", "--dataset digits\n    Handwritten digits of scikit-learn"),
        ("nets", "--nets sonnet\n    Nets of the Sonnet example"),
        ("bottlenecks", "decay=0.99 number from 0 to below 1: decay of the running means"),
        ("priors", "kernel=7 integer at least 3, odd: side of the masked convolutions"),
        ("likelihoods", "alpha=0.1 number from 1e-06 to below 1: twice the margin of p from 0 and 1"),
        ("objectives", "kl_weight=1 text (a number or a schedule, at least 0): weight of log q(z|x) - log p(z)"),
        ("presets", "--preset sonnet-cifar10\n    github.com/google-deepmind/sonnet"),
    ],
)
def test_lists_show_members_options_and_sources(what, shown, capsys):
    assert run_train("--list", what, small=False) == 0
    out = capsys.readouterr().out
    assert " ".join(shown.split()) in " ".join(out.split())
    assert all(len(line) <= 120 for line in out.splitlines()) or what == "presets"


def test_an_unknown_list_is_answered_with_similar_names(capsys):
    assert run_train("--list", "bottleneks", small=False) == 2
    assert (
        "error: --list bottleneks: no such list (did you mean 'bottlenecks'?); known: data" in capsys.readouterr().err
    )


# help


@pytest.mark.parametrize("command", ["train.py", "visualize_codes.py", *(f"-m vqvae {name}" for name in COMMANDS)])
def test_help_teaches_by_examples_and_imports_no_heavy_library(command):
    call = [sys.executable, "-X", "importtime", *command.split(), "--help"]
    done = subprocess.run(call, cwd=ROOT, capture_output=True, text=True, check=True)
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "vqvae.cli" in imported
    assert not imported & HEAVY
    help = done.stdout.splitlines()
    assert help[0].startswith("usage: ")
    start = next(i for i, line in enumerate(help) if line in ("example", "examples"))
    assert command.removeprefix("-m ") in help[start + 1]
    assert all(len(line) <= 120 for line in help)
    if command == "train.py":
        assert train.__doc__ in done.stdout


def test_models_load_and_train_without_the_libraries_of_other_work():
    """Importing torch._dynamo takes two seconds."""
    others = {"torch._dynamo", "sklearn", "scipy", "matplotlib", "tensorboard", "torchvision"}
    step = "o = adamw([{'params': [torch.nn.Parameter(torch.zeros(1))]}], torch.device('cpu')); o.zero_grad(); o.step()"
    code = (
        "import sys, torch, vqvae.experiment, vqvae.tokens; from vqvae.optimizer import adamw; "
        f"{step}; o.load_state_dict(o.state_dict()); print({others} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


@pytest.mark.parametrize(
    ("called", "command"),
    [
        ("/usr/bin/vqvae", "vqvae train"),
        ("/site-packages/vqvae/__main__.py", "python -m vqvae train"),
        ("train.py", "python train.py"),
        ("/site-packages/pytest/__main__.py", "python train.py"),
    ],
)
def test_messages_name_the_command_as_the_user_called_it(called, command, monkeypatch):
    monkeypatch.setattr(sys, "argv", [called])
    assert cli.program("train") == command


def test_the_program_lists_its_commands(capsys):
    assert program.main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(f"\n  {command} " in out and f"\n  vqvae {command} " in out for command in COMMANDS)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "no command; known: train, visualize, compare, encode, decode, export, cache"),
        (["expor"], "expor: no such command (did you mean 'export'?)"),
    ],
)
def test_an_unknown_command_is_answered_with_the_known_ones(words, message, capsys):
    assert program.main(words) == 2
    assert capsys.readouterr().err.startswith(f"error: {message}")


# bad options of `train`


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--dataset mnits", "--dataset mnits: no such name (did you mean 'mnist'"),
        ("--dataset folder holdout=1", "--dataset folder holdout=1: must be above 0 and below 1"),
        ("--dataset folder channels=2", "--dataset folder channels=2: must be 1 (gray) or 3 (color)"),
        ("--dataset photos crops=0", "--dataset photos crops=0: must be from 1 to 1000000"),
        ("--dataset mnist-binary binarization=x", "--dataset mnist-binary binarization=x: must be one of threshold"),
        ("--nets sonet", "--nets sonet: no such name (did you mean 'sonnet'"),
        ("--nets sonnet hidden=1", "--nets sonnet hidden=1: must be at least 2"),
        ("--nets mlp layers=0", "--nets mlp layers=0: must be at least 1"),
        ("--bottleneck vq decay=2", "--bottleneck vq decay=2: must be from 0 to below 1"),
        ("--bottleneck vq decai=0.9", "--bottleneck vq decai=0.9: unknown option (did you mean 'decay'?)"),
        ("--bottleneck fsq levels=8,1", "--bottleneck fsq levels=8,1: must be whole numbers from 2 up"),
        ("--bottleneck lfq bits=25", "--bottleneck lfq bits=25: must be from 1 to 24"),
        ("--bottleneck grouped groups=3", "--bottleneck grouped groups=3: code_dim=64 must be a multiple of groups=3"),
        ("--bottleneck gumbel temperature=0", "--bottleneck gumbel temperature=0: must be above 0"),
        ("--prior transformer width=6", "--prior transformer width=6: must be a multiple of heads=4"),
        ("--prior pixelcnn kernel=4", "--prior pixelcnn kernel=4: must be odd"),
        ("--likelihood logit-laplace eps=0.5", "--likelihood logit-laplace eps=0.5: must be from 1e-06 to below 0.5"),
        ("--likelihood mse pixels=center", "--likelihood mse pixels=center: must be one of centered, symmetric"),
        ("--objective elbo free_bits=-1", "--objective elbo free_bits=-1: must be at least 0"),
        (
            "--objective probabilistic stop_training_encoder_after_startup=yes",
            "--objective probabilistic stop_training_encoder_after_startup=yes: needs iaf_startup_steps above 0",
        ),
        ("--codes 0", "--codes 0: must be from 1"),
        ("--lr fast", "--lr fast: must be a number"),
        ("--epochs", "--epochs: expected one argument"),
        ("--iw-samples 3", "--iw-samples 3: has no effect without --evaluate"),
        ("--evaluate", "--evaluate: name the model with --checkpoint"),
    ],
)
def test_a_bad_option_is_refused_before_data_are_read(tmp_path, monkeypatch, no_data, capsys, line, message):
    monkeypatch.chdir(tmp_path)
    data = [] if "--dataset" in line else ["--dataset", "cifar10"]
    assert run_train(*data, "--data-dir", "none", *line.split(), small=False) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: {message}")
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_terminal_without_unicode_shows_escapes(monkeypatch):
    streams = {name: io.TextIOWrapper(io.BytesIO(), encoding="ascii") for name in ("stdout", "stderr")}
    for name, stream in streams.items():
        monkeypatch.setattr(sys, name, stream)

    def main(argv):
        print("猫 ± \udcff")
        warnings.warn("é", stacklevel=2)
        raise UserError("ü: no such file")

    with warnings.catch_warnings():
        warnings.simplefilter("default")
        monkeypatch.setattr(warnings, "showwarning", lambda message, *_: sys.stderr.write(f"{message}\n"))
        assert cli.run(main, []) == 2
    for stream in streams.values():
        stream.flush()
    assert streams["stdout"].buffer.getvalue() == b"\\u732b \\xb1 \\udcff\n"
    assert streams["stderr"].buffer.getvalue() == b"\\xe9\nerror: \\xfc: no such file\n"
