"""Bad command lines of every program, each in a process of its own.

Every second trial takes a line of tests/bad_input.py, which must end with exit code 2 and one printable line that names
flag and value, and leave the folder as it was. The others take a line that works and change it at random: words are
dropped, doubled or damaged, and flags with hostile values are added. Such a line may succeed; otherwise it must end as
above. A trial is lost if there is a traceback or a signal, or if it does not end within a minute.
"""

import contextlib
import importlib.util
import io
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[2]
PATIENCE = 60.0  # seconds

WORKING = [
    "train --limit 60 --batch-size 20 --image-size 16 --max-steps 2 --name new --hidden 8 --codes 16 --device cpu",
    "train --checkpoint logs/run --prior unigram --name new --batch-size 20 --max-steps 2 --device cpu",
    "train --resume logs/run --epochs 2 --device cpu",
    "train --evaluate --checkpoint logs/run --iw-samples 1 --device cpu",
    "train --list bottlenecks",
    "visualize --checkpoint logs/run --plot-dir new --only usage.png --device cpu",
    "encode --checkpoint logs/run --dataset digits --limit 4 --output new.npz --device cpu",
    "encode --checkpoint logs/run --input in --output new.npz --device cpu",
    "decode codes.npz --checkpoint logs/run --output new --device cpu",
]
HOSTILE = [
    "", " ", "-", "--", "0", "-1", "-0", "1.5", "nan", "-inf", "1e400", "1e30", "9" * 25, "9" * 5000, "0x10", "١٢",
    "a\nb", "a\x1b[2Jb", "a\0b", "\udcff", "\u202e", "=", "a=b", "x", "vq", "vq decay", "digits", "logs/run", "file",
    "file/x", "in", "empty", "full", "text.pt", "folder.pt", "codes.npz", "nowhere", "~nosuchuser", "/proc/x", ".",
    "..", "x" * 300, "a/" * 3000, "linear:0:1:1e30", "linear:0:-1", "cosine:nan:1", ",", ":", "%s", "{}", "$HOME",
    "'", '"', "\\",
]  # fmt: skip


def run(trials: int, folder: Path) -> tuple[int, int]:
    table = _table()
    start = Path.cwd()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        prepared = folder / "prepared"
        prepared.mkdir()
        os.chdir(prepared)
        table.prepare()
        before = table.tree()
    rng = random.Random(0)
    listed = table.cases()
    rng.shuffle(listed)
    survived = 0
    for trial in range(trials):
        case = listed[trial // 2 % len(listed)] if trial % 2 == 0 else None
        words = case.words if case else _changed(rng, table)
        work = folder / "work"
        shutil.copytree(prepared, work)
        os.chdir(work)
        code, out, err = _call(table, words, folder)
        same = table.tree() == before
        refused = code == 2 and not out and same and err.startswith("error: ") and err.count("\n") == 1
        refused = refused and err[:-1].isprintable()
        if case:
            fine = refused and case.message.partition(": ")[0] in err
        else:
            fine = refused or (code == 0 and "Traceback" not in err)
        if not fine:
            shown = [ascii(word)[:60] for word in words]
            print(f"lost: {' '.join(shown)}: exit {code}, {'' if same else 'files changed, '}{ascii(err)[-300:]}")
        survived += fine
        os.chdir(start)
        shutil.rmtree(work)
    return survived, trials


def _table() -> ModuleType:
    """tests/bad_input.py, for the version of vqvae that Python finds."""
    os.environ.setdefault("MPLBACKEND", "Agg")
    import torch

    torch.set_num_threads(1)
    spec = importlib.util.spec_from_file_location("bad_input", ROOT / "tests" / "bad_input.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def _changed(rng: random.Random, table: ModuleType) -> list[str]:
    """A line that works, with one to three changes."""
    words = rng.choice(WORKING).split()
    for _ in range(rng.randint(1, 3)):
        place = rng.randrange(1, len(words)) if len(words) > 1 else 0
        match rng.randrange(6):
            case 0:
                del words[place]
            case 1:
                words.insert(place, words[place])
            case 2:
                words[place] = rng.choice(HOSTILE)
            case 3:
                cut = rng.randrange(len(words[place]) + 1)
                words[place] = words[place][:cut] + rng.choice(HOSTILE) + words[place][cut:]
            case _:
                flags = sorted(table.TAKE_A_VALUE.get(words[0], ["epochs"]))
                words += [f"--{rng.choice(flags).replace('_', '-')}", rng.choice(HOSTILE)]
    return words


def _call(table: ModuleType, words: list[str], folder: Path) -> tuple[int, str, str]:
    """Exit code (negative for a signal), stdout and stderr of a command in a process of its own."""
    names = folder / "stdout", folder / "stderr"
    process = os.fork()
    if not process:
        code = 99
        try:
            for number, name in enumerate(names, 1):
                os.dup2(os.open(name, os.O_CREAT | os.O_TRUNC | os.O_WRONLY), number)
            code = table.main(words)
        except SystemExit as end:
            code = int(end.code or 0)
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    deadline = time.monotonic() + PATIENCE
    ended, status = os.waitpid(process, os.WNOHANG)
    while not ended and time.monotonic() < deadline:
        time.sleep(0.005)
        ended, status = os.waitpid(process, os.WNOHANG)
    if not ended:
        os.kill(process, signal.SIGKILL)
        _, status = os.waitpid(process, 0)
    out, err = (name.read_text(errors="replace") for name in names)
    return os.waitstatus_to_exitcode(status), out, err
