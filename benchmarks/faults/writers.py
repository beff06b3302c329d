"""Several processes try to write the same run at the same time.

A trial starts two to four processes within a few milliseconds: they resume one run, start one under the same name, or
start runs without a name. It survives if exactly one of those that want the same folder goes on and the others are
refused in one line with the exit code 2; if those without a name get folders of their own; if every checkpoint can be
read at any time during the trial; and if the files equal those that a single process writes.

A loss is described in a line on stderr.
"""

import random
import shutil
import sys
import time
from pathlib import Path

from stops import SMALL, Child, content, differences

from vqvae import checkpoint
from vqvae.errors import UserError

TRAIN = [*SMALL, "--checkpoint-every", "1"]
RESUME = ["--resume", "../logs/run", "--epochs", "3", "--plot-dir", "../plots"]
REFUSED = ("another process", "already contains a run", "has taken all of its")


def run(trials: int, folder: Path) -> tuple[int, int]:
    draw = random.Random(0)
    for name, epochs in (("begun", "1"), ("straight", "3")):
        (folder / name).mkdir()
        succeed([*TRAIN, "--epochs", epochs, "--name", "run"], folder / name)
    shutil.copytree(folder / "begun", folder / "resumed")
    (folder / "resumed" / "process").mkdir()
    succeed(RESUME, folder / "resumed" / "process")
    expected = {name: content(folder / name / "logs" / "run") for name in ("straight", "resumed")}
    survived = 0
    for number in range(trials):
        here = folder / str(number)
        here.mkdir()
        lost = trial(draw, here, folder / "begun", **expected)
        survived += not lost
        if lost:
            print(f"  trial {number}: {lost}", file=sys.stderr)
        else:
            shutil.rmtree(here)
    return survived, trials


def succeed(words: list[str], here: Path) -> None:
    child = Child(words, here, fork=True)
    if child.wait():
        raise SystemExit(child.output)


def trial(draw: random.Random, here: Path, begun: Path, *, straight: dict, resumed: dict) -> str:
    """A description of what was lost; empty if the trial survived."""
    kind = draw.choice(["resume", "name", "no name"])
    words = {
        "resume": RESUME,
        "name": [*TRAIN, "--epochs", "3", "--log-dir", "../logs", "--plot-dir", "../plots", "--name", "run"],
        "no name": [*TRAIN, "--epochs", "3", "--log-dir", "../logs", "--plot-dir", "../plots"],
    }[kind]
    expected = resumed if kind == "resume" else straight
    if kind == "resume":
        shutil.copytree(begun, here, dirs_exist_ok=True)
    children = []
    for i in range(draw.choice([2, 2, 3, 4])):
        place = here / f"process-{i}"  # for its output
        place.mkdir()
        children.append(Child(words, place, fork=True))
        time.sleep(draw.choice([0, 0, 0, 0.002, 0.02, 0.2]))
    while any(child.alive() for child in children):
        for path in (here / "logs").glob("*/*.pt"):
            try:
                checkpoint.read(path)
            except UserError as problem:
                return f"{kind}: {problem}"
        time.sleep(0.01)
    codes = [child.wait() for child in children]
    outputs = [child.output for child in children]
    on, off = codes.count(0), sum(code == 2 for code in codes)
    wanted = len(codes) if kind == "no name" else 1
    if on != wanted or off != len(codes) - wanted:
        return f"{kind}: exit codes {codes}: {outputs}"
    for code, output in zip(codes, outputs, strict=True):
        if code and (output.count("\n") != 1 or not any(reason in output for reason in REFUSED)):
            return f"{kind}: refused with {output!r}"
    runs = sorted(path for path in (here / "logs").iterdir())
    if len(runs) != wanted or any(lost := differences(expected, content(path)) for path in runs):
        return f"{kind}: {[path.name for path in runs]}, {lost if len(runs) == wanted else ''}"
    return ""
