"""Combinations of members and options: each works through to the end, or is refused before training, in one line.

A trial draws data, nets, a bottleneck, a prior, a likelihood and an objective with options at and beyond the edges of
their ranges. It trains for two steps in this process, resumes for a third, evaluates and draws. If the latent consists
of codes, it also encodes, decodes and exports. Some trials train a second stage, or move the run in between.

A trial is lost if there is a traceback, an exit code other than 0 and 2, a warning of another library, or "nan" in a
printed or stored metric, or if a refusal has more than one line on stderr or leaves files.

    python benchmarks/faults/combinations.py --first 100 --trials 50    other trials; prints those that are lost
    python benchmarks/faults/combinations.py --first 123 --trials 1     one of them again
"""

import argparse
import contextlib
import io
import json
import math
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
import typing
import warnings
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("MPLBACKEND", "Agg")
import numpy as np
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from PIL import Image

from vqvae import autoencoder, cli, data, objectives
from vqvae.commands import decode, encode, export, train, visualize
from vqvae.config import FIELDS
from vqvae.errors import OptionError
from vqvae.registry import Option, Range, signature

SLOTS = {"dataset": data.SLOT, **autoencoder.SLOTS, "objective": objectives.SLOT}
SECONDS = 150  # after which a trial counts as lost
DATA = ("digits", "photos", "gauss2d", "folder")
# options that set the size of something: small values, of which some are refused
SIZES = (0, 1, 2, 3, 4, 6, 8)
FEW = {
    "num_codes": (0, 1, 2, 3, 8, 16, 70, 300),
    "bits": (0, 1, 2, 3, 5, 9, 25),
    "levels": ("", "1", "2", "2,2", "3", "8,8", "2,3,4", "5,1", "x", "256", "2,2,2,2,2"),
    "crops": (0, 1, 2, 3, 40),
    "test_crops": (0, 1, 2, 3, 20),
    "train_points": (0, 1, 2, 3, 60),
    "test_points": (0, 1, 2, 3, 30),
    "set": (0, 1, 2, 3),
    "channels": (0, 1, 2, 3, 4, 5),  # of folders too
    "kernel": (1, 2, 3, 5, 7, 31),
    "iaf_startup_steps": (0, 1, 2),
}
SCHEDULES = ("0", "1", "1e-3", "0.5", "1e-30", "3e38", "nan", "-1", "linear:0:1", "linear:1:0:2", "cosine:1:1e-6",
             "linear:0:1e-3:1,cosine:1e-3:0", "quarter-cosine:1:0.1:100", "step:1:2")  # fmt: skip
FOLDERS = ("gray", "two", "classes", "lonely", "black", "odd", "names", "white", "one", "empty", "broken")


class Lost(Exception):
    """Why a trial did not survive."""


# strategies


def values(option: Option) -> st.SearchStrategy[str]:
    """Texts for an option: values up to the edges of its range, and in one case of 20 beyond them."""
    taken, refused = [], []
    for text in map(str, candidates(option)):
        try:
            option.convert(text)
            taken.append(text)
        except OptionError:
            refused.append(text)
    return st.integers(0, 19).flatmap(lambda n: st.sampled_from(refused if refused and n == 0 else taken))


def candidates(option: Option) -> list[Any]:
    kind = option.kind
    found: list[Any]
    if option.name in FEW:
        found = list(FEW[option.name])
    elif typing.get_origin(kind) is typing.Literal:
        found = [*typing.get_args(kind), "other"]
    elif kind is bool:
        found = ["yes", "no", "maybe"]
    elif kind is str:
        found = list(SCHEDULES)
    elif kind is int:
        found = list(SIZES)
    else:
        found = [option.default, option.default, 0, 0.5, 1, 1e-12, 1e4, -1, "nan", "1e39"]
        for rule in option.rules:
            if isinstance(rule, Range):
                bounds = [b for b in (rule.low, rule.high, rule.above, rule.below) if math.isfinite(b)]
                found += bounds * 2 + [math.nextafter(b, way) for b in bounds for way in (-math.inf, math.inf)]
    return found


def sizes_of(options: dict[str, Option], drawn: dict[str, str]) -> dict[str, str]:
    """Small values for the options that would make a model large and that were not drawn."""
    small = {"num_codes": 8, "code_dim": 4, "hidden": 8, "residual_hidden": 4, "blocks": 1, "init": 8, "layers": 1,
             "latents": 4, "features": 8, "channels": 8, "head": 8, "width": 8, "heads": 2, "bits": 4, "levels": "3,4",
             "num_samples": 2, "quantizers": 2, "crops": 40, "test_crops": 10, "train_points": 60, "test_points": 20,
             "kernel": 3}  # fmt: skip
    free = {key for key in options if key not in drawn and isinstance(options[key].default, (int, str))}
    if "holdout" in options:  # channels of a folder
        free -= {"channels"}
    return {key: str(value) for key, value in small.items() if key in free and type(value) is options[key].kind}


@st.composite
def words(draw: Any, slot: str, names: tuple[str, ...]) -> list[str]:
    """A member of a slot with options, as the command line spells it."""
    name = draw(st.sampled_from(names))
    options = signature(SLOTS[slot].table[name]).options
    few = draw(st.sampled_from((0, 0, 1, 1, 2, 4)))
    chosen = draw(st.lists(st.sampled_from(sorted(options)), unique=True, max_size=few)) if options else []
    drawn = {key: draw(values(options[key])) for key in chosen}
    return [name, *(f"{key}={value}" for key, value in (sizes_of(options, drawn) | drawn).items())]


def maybe(draw: Any, chance: int, *choices: Any) -> Any:
    """One of the choices in `chance` of 10 cases, otherwise None."""
    return draw(st.sampled_from(choices)) if draw(st.integers(0, 9)) < chance else None


@st.composite
def cases(draw: Any) -> dict[str, Any]:
    """A trial: command lines, and what is done between them."""
    slots = SLOTS
    dataset = draw(words("dataset", DATA))
    points = dataset[0] == "gauss2d"
    likely = draw(st.integers(0, 7)) > 0  # usually members that may fit each other
    nets = tuple(slots["nets"].table)
    bottlenecks = tuple(slots["bottleneck"].table)
    bottleneck = draw(words("bottleneck", bottlenecks))
    if likely and (points or bottleneck[0] == "gaussian"):
        nets = ("mlp",) if points else ("mlp", "conv-vae")
    priors: tuple[str, ...] = tuple(slots["prior"].table)
    if likely:
        continuous = ("normal", "made-flow")
        priors = continuous if bottleneck[0] == "gaussian" else tuple(p for p in priors if p not in continuous)
    likelihoods: tuple[str, ...] = tuple(slots["likelihood"].table)
    if likely and points:
        likelihoods = ("gaussian",)
    line = ["--dataset", *dataset, "--nets", *draw(words("nets", nets)), "--bottleneck", *bottleneck]
    line += ["--prior", *draw(words("prior", priors)), "--likelihood", *draw(words("likelihood", likelihoods))]
    line += ["--objective", *draw(words("objective", tuple(slots["objective"].table)))]
    folder = draw(st.sampled_from(FOLDERS[:-3] if likely else FOLDERS)) if dataset[0] == "folder" else None
    if folder:
        line += ["--data-dir", f"../images/{folder}"]
    whole = (8, 8, 16, 16, 32, 24)  # sizes that all nets divide
    size = draw(st.sampled_from((*whole, 4, 12, 28) if likely else (*whole, 1, 2, 3, 4, 5, 7, 9, 12, 28)))
    if not points or not likely:
        line += ["--image-size", str(size)]
    limit = draw(st.sampled_from((60, 60, 60, 1, 2, 3, 20)))
    batch = draw(st.sampled_from((20, 20, 16, 8, 7, 1, 2, 3, 64)))
    if likely and folder is None:
        batch = min(batch, limit)
    elif likely:
        batch = 1 if folder == "two" else min(batch, 4)
    line += ["--limit", str(limit), "--batch-size", str(batch)]
    for chance, setting in ((3, "lr"), (2, "weight_decay"), (2, "augment"), (2, "on_nan"), (1, "precision"),
                            (2, "log_every"), (1, "patience")):  # fmt: skip
        if maybe(draw, chance, True):
            line += [f"--{setting.replace('_', '-')}", draw(values(FIELDS[setting]))]
    for chance, flag, choices in (
        (1, "--checkpoint-every", ("1", "2", "1s")),
        (1, "--seed", ("0", "1", "9223372036854775807")),
    ):
        if (value := maybe(draw, chance, *choices)) is not None:
            line += [flag, value]
    labeled = dataset[0] == "digits" or folder in ("classes", "lonely", "names")
    if maybe(draw, 4 if labeled else 1, True) and (labeled or not likely):
        line += ["--conditional"]
    drawing = ["--samples", draw(st.sampled_from(("1", "2", "4", "4", "10")))]
    for chance, flag, choices in (
        (2, "--top-k", ("1", "2", "100000")),
        (2, "--temperature", ("0.1", "1e-12", "999")),
        (1, "--top-p", ("0.5", "1e-9")),
        (1, "--guidance", ("0", "3")),
        (1, "--steps", ("1", "1000")),
        (2, "--seed", ("3", "9223372036854775807")),
        (1, "--class", ("0", "1", "12")),
    ):
        if (value := maybe(draw, chance, *choices)) is not None:
            drawing += [flag, value]
    second = None
    if maybe(draw, 4, True):
        discrete = tuple(p for p in slots["prior"].table if not likely or p not in ("normal", "made-flow", "uniform"))
        second = ["--prior", *draw(words("prior", discrete)), "--batch-size", str(batch)]
        second += ["--conditional"] if maybe(draw, 4, True) else []
    return {
        "train": line,
        "draw": drawing,
        "second": second,
        "name": draw(st.sampled_from(("run", "run", "run", "a+b=c", "_x_", "名前"))),
        "images": folder,
        "moved": maybe(draw, 3, True) is not None,
        "export": draw(st.integers(0, 19)) == 0,
    }


# a trial


class Said(NamedTuple):
    code: int
    out: str
    err: list[str]  # lines, without the package's own warnings
    warned: list[str]


def call(main: Any, line: list[str], *, where: str) -> Said:
    """Run a command in this process, as the program would. Raises `Lost` if it does what no command may do."""
    out, err = io.StringIO(), io.StringIO()
    foreign: list[str] = []
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), warnings.catch_warnings(record=True) as all_:
        warnings.simplefilter("default")
        for kind in (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning):
            warnings.simplefilter("ignore", kind)
        try:
            code = cli.run(main, line)
        except SystemExit as problem:
            raise Lost(f"{where}: SystemExit {problem.code}: {err.getvalue()}") from None
        except Exception as problem:
            places = traceback.extract_tb(problem.__traceback__)[-4:]
            trace = " < ".join(f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in reversed(places))
            raise Lost(f"{where}: {problem!r:.300} in {trace}") from None
    own = [str(w.message) for w in all_ if "vqvae" in Path(w.filename).parts]
    foreign = [f"{w.filename}:{w.lineno}: {w.message}" for w in all_ if "vqvae" not in Path(w.filename).parts]
    if foreign:
        raise Lost(f"{where}: warned: {foreign[0]}")
    if any(text.count("\n") for text in own):
        raise Lost(f"{where}: a warning of several lines: {own}")
    lines = err.getvalue().splitlines()
    if code not in (0, 2):
        raise Lost(f"{where}: exit code {code}: {lines}")
    if code == 2 and (len(lines) != 1 or not lines[0].startswith("error: ")):
        raise Lost(f"{where}: exit code 2 with {len(lines)} lines: {lines}")
    if code == 0 and (spam := [text for text in lines if "not drawn" not in text]):
        raise Lost(f"{where}: printed on stderr: {spam[:3]}")
    if "nan" in out.getvalue().replace("nano", "").split() or " nan" in out.getvalue():
        raise Lost(f"{where}: printed nan: {[t for t in out.getvalue().splitlines() if ' nan' in t][:3]}")
    return Said(code, out.getvalue(), lines, own)


def strict_json(path: Path) -> None:
    def refuse(token: str) -> None:
        raise Lost(f"{path.name} contains {token}")

    if path.is_file():
        for line in path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]:
            json.loads(line, parse_constant=refuse)


def refused(said: Said, where: str, folder: Path) -> bool:
    """Whether a command was refused; raises `Lost` if it left files."""
    if said.code == 0:
        return False
    left = [str(path.relative_to(folder)) for path in folder.rglob("*")] if folder.exists() else []
    if left and "not finite" not in said.err[0]:
        raise Lost(f"{where}: refused, but left {left[:3]}: {said.err[0]}")
    return True


def need(said: Said, where: str) -> None:
    if said.code:
        raise Lost(f"{where}: refused: {said.err[0]}")


def trial(case: dict[str, Any], folder: Path) -> str:
    """Run one case in an empty folder next to `images`. Returns how it ended."""
    name, logs = case["name"], folder / "logs"
    run = f"logs/{name}"
    line = [*case["train"], "--device", "cpu", "--epochs", "3", "--max-steps", "2"]
    said = call(train.main, [*line, "--name", name], where="train")
    if refused(said, "train", logs):
        return said.err[0]
    strict_json(logs / name / "metrics.jsonl")
    said = call(train.main, ["--resume", run, "--max-steps", "3", "--device", "cpu"], where="resume")
    if said.code and not any(text in said.err[0] for text in ("not finite", "has taken all")):
        raise Lost(f"resume: {said.err[0]}")
    if case["moved"]:
        os.makedirs(folder / "elsewhere")
        shutil.move(folder / run, folder / "elsewhere" / "moved")
        shutil.rmtree(folder / "plots")
        run = "elsewhere/moved"
    strict_json(folder / run / "metrics.jsonl")
    need(call(train.main, ["--evaluate", "--checkpoint", run, "--iw-samples", "2", "--device", "cpu"],
              where="evaluate"), "evaluate")  # fmt: skip
    strict_json(folder / run / "evaluation.json")
    look(run, case, "visualize")
    model = autoencoder_of(folder / run)
    if model.discrete is not None:
        tokens(run, case, model)
    if case["export"]:
        need(call(export.main, ["--checkpoint", run, "--output", "exported"], where="export"), "export")
    if case["second"]:
        line = ["--checkpoint", run, *case["second"], "--name", "second", "--device", "cpu", "--max-steps", "2"]
        said = call(train.main, line, where="second stage")
        if not refused(said, "second stage", logs / "second"):
            strict_json(logs / "second" / "metrics.jsonl")
            look("logs/second", case, "visualize the second stage")
            line = ["--evaluate", "--checkpoint", "logs/second", "--iw-samples", "1", "--device", "cpu"]
            need(call(train.main, line, where="evaluate the second stage"), "evaluate the second stage")
            said = call(
                train.main, ["--resume", "logs/second", "--max-steps", "3", "--device", "cpu"], where="resume 2"
            )
            if said.code and not any(text in said.err[0] for text in ("not finite", "has taken all")):
                raise Lost(f"resume the second stage: {said.err[0]}")
    return "worked"


LOOKING_REFUSES = tuple(f"error: --{flag}" for flag in ("top-k", "top-p", "guidance", "steps", "class"))


def look(run: str, case: dict[str, Any], where: str) -> None:
    line = ["--checkpoint", run, "--plot-dir", "drawn", "--device", "cpu", *case["draw"]]
    said = call(visualize.main, line, where=where)
    if said.code and not said.err[0].startswith(LOOKING_REFUSES):
        raise Lost(f"{where}: {said.err[0]}")
    if said.code:
        line = ["--checkpoint", run, "--plot-dir", "drawn", "--device", "cpu"]
        need(call(visualize.main, line, where=where), where)


def autoencoder_of(folder: Path) -> Any:
    import vqvae

    return vqvae.load(folder)


def tokens(run: str, case: dict[str, Any], model: Any) -> None:
    """Encode, and decode; decoding must succeed if the model shows images, and only then."""
    start = case["train"].index("--dataset") + 1
    end = case["train"].index("--nets")
    dataset = case["train"][start:end]
    line = ["--checkpoint", run, "--dataset", *dataset, "--limit", "5", "--output", "codes.npz", "--device", "cpu"]
    if case["images"]:
        line += ["--data-dir", f"../images/{case['images']}"]
    need(call(encode.main, line, where="encode"), "encode")
    said = call(decode.main, ["codes.npz", "--checkpoint", run, "--output", "decoded", "--device", "cpu"],
                where="decode")  # fmt: skip
    if (said.code == 0) != model.shows_images:
        raise Lost(f"decode: exit code {said.code}: {said.err}")


# images


def make_images(folder: Path) -> None:
    """Folders of images, most of them odd."""
    rng = np.random.default_rng(0)

    def image(name: str, *shape: int, mode: str | None = None, **options: Any) -> None:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = Image.fromarray(rng.integers(256, size=shape, dtype=np.uint8))
        (pixels.convert(mode) if mode else pixels).save(path, **options)

    for i in range(24):
        image(f"gray/{i}.png", 9, 9)
        image(f"classes/{'abc'[i % 3]}/{i}.png", 8 + i, 40 - i, 3)
        image(f"lonely/{'a' if i else 'b'}/{i}.png", 8, 8, 3)
    image("one/1.png", 8, 8)
    image("two/1.png", 8, 8)
    image("two/2.png", 300, 1)
    for i in range(8):
        for name, value in (("black", 0), ("white", 255)):
            (folder / name).mkdir(exist_ok=True)
            Image.new("RGB", (10, 10), (value,) * 3).save(folder / name / f"{i}.png")
    for i in range(4):
        image(f"odd/rgba{i}.png", 9, 5, 4)
        image(f"odd/palette{i}.gif", 9, 5, 3, mode="P")
        image(f"odd/bits{i}.bmp", 9, 5, mode="1")
        image(f"odd/cmyk{i}.jpg", 9, 5, 3, mode="CMYK")
        image(f"odd/alpha{i}.png", 9, 5, mode="LA")
        image(f"odd/sub/wide{i}.tiff", 1, 90)
        image(f"odd/tiny{i}.webp", 1, 1, 3)
    deep = Image.fromarray(rng.integers(65536, size=(9, 9)).astype(np.uint16))
    deep.save(folder / "odd" / "deep.png")
    for name in ("a$b", "_hidden", "名前", "a b%20", "x{y}^\\z", "<&>", "très-long-" * 20):
        for i in range(4):
            image(f"names/{name}/{i} 'quoted'.png", 8, 8, 3)
    for name in ("empty", "broken"):
        (folder / name).mkdir()
    (folder / "broken" / "text.png").write_text("no image")
    (folder / "broken" / "nothing.jpg").touch()


def run(trials: int, folder: Path, *, first: int = 0, verbose: bool = False) -> tuple[int, int]:
    """The number of trials that survived, and of all trials."""
    torch.set_num_threads(1)
    folder = folder.resolve()
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
    make_images(folder / "images")
    survived = 0
    for number in range(first, first + trials):
        case, end, lost, started = drawn(number), "", "", time.perf_counter()
        try:
            end = attempt(case, folder)
            survived += 1
        except Lost as problem:
            lost = str(problem)
        if lost or verbose:
            print(f"{number:5} {time.perf_counter() - started:5.1f} s  {f'LOST {lost}' if lost else end}", flush=True)
        if lost:
            print(f"      {json.dumps(case)}", flush=True)
    return survived, trials


def drawn(number: int) -> dict[str, Any]:
    """The case of that number. (The first example of every search is the simplest one.)"""
    found: list[dict[str, Any]] = []

    @seed(number)
    @settings(max_examples=2, phases=[Phase.generate], deadline=None, database=None,
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(cases())
    def keep(case: dict[str, Any]) -> None:
        found.append(case)

    keep()
    return found[-1]


def attempt(case: dict[str, Any], folder: Path) -> str:
    """A trial in a folder of its own, with a limit on its time."""

    def late(*_: Any) -> None:
        raise Lost(f"took more than {SECONDS} s")

    before, handler = os.getcwd(), signal.signal(signal.SIGALRM, late)
    with tempfile.TemporaryDirectory(dir=folder) as work:
        os.chdir(work)
        signal.alarm(SECONDS)
        try:
            return trial(case, Path(work))
        finally:
            signal.alarm(0)
            signal.signal(signal.SIGALRM, handler)
            os.chdir(before)


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--first", type=int, default=0, metavar="N", help="number of the first trial (default: 0)")
    options.add_argument("--trials", type=int, default=20)
    options.add_argument("-v", "--verbose", action="store_true", help="print every trial")
    args = options.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        survived, total = run(args.trials, Path(folder), first=args.first, verbose=args.verbose)
    print(f"survived {survived} of {total}")
    return 0 if survived == total else 1


if __name__ == "__main__":
    sys.exit(main())
