"""A run's folder: its settings, its metrics as JSON lines and TensorBoard events, and its checkpoints.

One process at a time writes in it (`Lock`). Nothing on disk changes before `Run.start`, which comes after every check.
"""

import contextlib
import itertools
import json
import math
import os
import shutil
import socket
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from torch import Tensor

from vqvae import checkpoint
from vqvae.errors import OptionError, UserError, naming, printable
from vqvae.files import (
    append,
    cannot_write,
    make_folder,
    remove_parts,
    whole_file,
    write_json,
    write_text,
    writing,
)
from vqvae.metrics import for_json, has_chart

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]
try:
    import msvcrt
except ImportError:  # all others
    msvcrt = None  # type: ignore[assignment]

BEYOND = 2**30  # the byte that is locked on Windows: beyond the text, because what is locked cannot be read
LOCK, LAST, BEST = ".lock", "checkpoint.pt", "best.pt"
LOG = "metrics.jsonl"
WORDS = ("kind", "split")  # entries of its rows that are no numbers
UNREADABLE = "unreadable.txt"
Numbers = Mapping[str, float]
NONE: Numbers = MappingProxyType({})
EVENTS = "events.out.tfevents."  # and the second at which the file was begun, the host, the process, a number


class Busy(UserError):
    """Another process writes in the folder."""


class Lock:
    """The right to write in a run's folder: a lock on its file `.lock`, which ends with the process.

    `take` takes it, the end of the block releases it. If the run did not begin (`keep`), the file and the folders that
    were made for it are removed.
    """

    def __init__(self) -> None:
        self.path: Path | None = None
        self.kept = False
        self._file = -1
        self._made: list[Path] = []

    def __enter__(self) -> "Lock":
        return self

    def take(self, folder: Path, *, made: list[Path] | None = None) -> None:
        """Take the lock of a folder. `made` are empty folders to remove if the run does not begin.

        Raises `Busy` if another process has it. Where the system or its file system has no locks, warns instead.
        """
        self.path, self.kept, self._made = folder / LOCK, False, made or []
        while True:
            new = not self.path.exists()
            try:
                file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
            except OSError as problem:
                raise cannot_write(folder, problem) from None
            if not self._lock(file):
                holder = os.read(file, 100).decode(errors="replace")
                os.close(file)
                other = f"another process ({holder})" if holder else "another process"
                raise Busy(f"{folder}: {other} writes this run; wait until it ends, or stop it")
            if fcntl is None:  # Windows, where nobody can remove a file that is open
                break
            with contextlib.suppress(OSError):
                if os.path.samestat(os.fstat(file), os.stat(self.path)):  # else its holder removed it in between
                    break
            os.close(file)
        self._file = file
        if new:
            self._made = [self.path, *self._made]

    def _lock(self, file: int) -> bool:
        """Whether the file could be locked; also true where nothing can be locked."""
        try:
            _lock_file(file)
        except BlockingIOError:
            return False
        except OSError as problem:
            reason = f"the file system ({problem.strerror})" if fcntl or msvcrt else "this system"
            message = f"{self.path}: {reason} has no locks; make sure that no other process writes this run"
            warnings.warn(message, stacklevel=4)
        return True

    def keep(self) -> None:
        """Mark that the run begins: keep the file and the folders, and write process and host into the file."""
        self.kept = True
        with contextlib.suppress(OSError):
            os.ftruncate(self._file, 0)
            os.lseek(self._file, 0, os.SEEK_SET)
            os.write(self._file, f"{os.getpid()} on {socket.gethostname()}".encode())

    def __exit__(self, *error: object) -> None:
        self.release()

    def release(self) -> None:
        if self._file < 0:
            return
        if fcntl:
            self._remove()  # before another process can take the lock
        os.close(self._file)
        if not fcntl:
            self._remove()  # Windows removes no file that is open
        self._file = -1

    def _remove(self) -> None:
        """Remove what `take` made, if the run did not begin."""
        with contextlib.suppress(OSError):  # a folder that is not empty stays
            for path in () if self.kept else self._made:
                path.rmdir() if path.is_dir() else path.unlink()


def _lock_file(file: int) -> None:
    """Lock an open file. Raises `BlockingIOError` if another process has it, `OSError` where there are no locks."""
    if fcntl:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    elif msvcrt:
        os.lseek(file, BEYOND, os.SEEK_SET)  # it locks from here
        try:
            msvcrt.locking(file, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
        except PermissionError as problem:
            raise BlockingIOError(*problem.args) from None
        finally:
            os.lseek(file, 0, os.SEEK_SET)
    else:
        raise OSError("neither kind of lock")


def refuse_saved(folder: Path) -> None:
    """Raise `OptionError` for a new run's name if its folder contains a checkpoint."""
    if (folder / LAST).exists():
        problem = f"{folder} already contains a run; resume that run, or choose another name"
        raise OptionError("name", folder.name, problem)


def claim(folder: Path, lock: Lock) -> None:
    """Take a folder for a new run: one that does not exist, or whose run was stopped before it saved a checkpoint.

    Raises `OptionError` if it contains a run, if another process writes in it, or if it cannot be written.
    """
    refuse_saved(folder)
    make_folder(folder.parent, "log_dir")
    made = [] if folder.exists() else [folder]
    make_folder(folder, "log_dir")
    with naming("name", folder.name):
        lock.take(folder, made=made)
    refuse_saved(folder)  # another process may have saved a run in between


def claim_free(name: str, logs: Path, plots: Path, lock: Lock) -> Path:
    """Make and take the folder `logs/name`, or `name-2`, `name-3` ..., the first that is new in both folders.

    Processes that are started at once get different names. Both folders may be the same.
    """
    make_folder(logs, "log_dir")
    make_folder(plots, "plot_dir")
    parents = [logs] if logs.samefile(plots) else [logs, plots]
    free, number = name, 1
    while True:
        made: list[Path] = []
        try:
            for folder in [parent / free for parent in parents]:
                folder.mkdir()
                made.insert(0, folder)
            lock.take(logs / free, made=made)
            return logs / free
        except (FileExistsError, Busy):
            for folder in made:
                with contextlib.suppress(OSError):
                    folder.rmdir()
        number += 1
        free = f"{name}-{number}"


class Run:
    """logs/<run>: config.json, metrics.jsonl, TensorBoard events, checkpoint.pt (the last) and best.pt.

    `facts` are the entries that all checkpoints of the run share: kind, run, config, data, examples, plots. Without a
    `lock` that was taken, `start` takes one. TensorBoard's HParams tab shows the settings in `compared`.
    """

    def __init__(
        self,
        folder: Path,
        facts: dict[str, Any],
        lock: Lock | None = None,
        compared: Mapping[str, str | float] = MappingProxyType({}),
    ):
        self.folder, self.facts, self.lock, self.compared = folder, facts, lock, compared
        self.board: Any = None  # TensorBoard's writer, from `start` to `close`
        self.step = 0  # of the last metrics

    def start(self, resumed: dict[str, Any] | None = None, *, at_end: bool = False) -> bool:
        """Open the run's files. A new run replaces those of a run that never saved.

        A run that is resumed from the content of a checkpoint drops the metrics after its step, and a best model of
        steps that it will take again. `at_end`: it was killed at its end, and its evaluations start again, too. Returns
        False if the best model so far is lost.
        """
        if self.lock is None:
            self.lock = Lock()
            if resumed is None:
                claim(self.folder, self.lock)
            else:
                self.lock.take(self.folder)
        self.lock.keep()
        self._clean(new=resumed is None)
        write_json(self.folder / "config.json", self.facts["config"])
        best_is_there = True
        if resumed:
            self.step = resumed["step"]
            self._drop_metrics_after(self.step, at_end)
            best_is_there = self.repair_best(resumed)
            if not best_is_there:
                (self.folder / BEST).unlink(missing_ok=True)  # of steps that are taken again
            order_events(self.folder)

        from torch.utils.tensorboard import SummaryWriter

        with self._events():
            # TensorBoard drops events from purge_step on; those of the step resumed at stay
            self.board = SummaryWriter(str(self.folder), purge_step=self.step + 1 if resumed else None)
            if not resumed:
                self.board.add_text("config", f"```\n{json.dumps(self.facts['config'], indent=2)}\n```", 0)
            self.board.flush()
        return best_is_there

    def log(
        self,
        kind: str,
        step: int,
        epoch: int,
        metrics: Numbers,
        settings: Numbers = NONE,
        *,
        held_out: str = "",
    ) -> None:
        """Append a line to metrics.jsonl with metrics, and settings that change during training, such as the rate.

        `held_out` is the split, validation or test, of the metrics named `held_out_...`. TensorBoard gets `name/train`
        and `name/<split>`, which it shows together, and `schedule/name`. Training metrics averaged over an epoch,
        standard errors and constants have no chart.
        """
        self.step = step
        split = {"split": held_out} if held_out else {}
        row = {"kind": kind, "step": step, "epoch": epoch, **split, **for_json({**metrics, **settings})}
        append(self.folder / LOG, json.dumps(row) + "\n")
        with self._events():
            for name, value in metrics.items():
                if kind == "train":
                    self.board.add_scalar(f"{name}/train", value, step)
                elif name.startswith("held_out_"):
                    if has_chart(short := name.removeprefix("held_out_")):
                        self.board.add_scalar(f"{short}/{held_out or 'held_out'}", value, step)
                elif not name.startswith("train_"):
                    self.board.add_scalar(f"{kind}/{name}", value, step)
            for name, value in settings.items():
                self.board.add_scalar(f"schedule/{name}", value, step)

    def _events(self) -> contextlib.AbstractContextManager[None]:
        """A context in which errors of TensorBoard's writer and its thread become a `UserError` about the events."""
        return writing(self.folder / f"{EVENTS}*")

    def log_images(self, name: str, image: Tensor, step: int) -> None:
        """Log one image `[C, H, W]` in [0, 1], such as a grid of samples."""
        with self._events():
            self.board.add_image(name, image, step)

    def save(self, state: dict[str, Any]) -> None:
        """Write checkpoint.pt: the run's facts and `state`. What was logged before is on disk first."""
        with self._events():
            self.board.flush()
        checkpoint.write(self.folder / LAST, self.facts | state)

    def save_best(self, state: dict[str, Any] | None = None) -> None:
        """Make best.pt a copy of checkpoint.pt, or write the state of an earlier step there."""
        if state is not None:
            checkpoint.write(self.folder / BEST, self.facts | state)
            return
        with whole_file(self.folder / BEST) as file, open(self.folder / LAST, "rb") as last:
            shutil.copyfileobj(last, file)

    def repair_best(self, resumed: dict[str, Any]) -> bool:
        """Write best.pt again if the run was killed after checkpoint.pt and before it; False if the best model is lost.

        It is lost if the run is resumed from an earlier checkpoint than its last.
        """
        if "best_step" not in resumed:
            return True  # a checkpoint of an earlier version
        best = resumed["best_step"]
        with contextlib.suppress(UserError):
            found = checkpoint.read(self.folder / BEST)
            if found["step"] == best and found.get("best") == resumed["best"]:
                return True
        if resumed["step"] == best:
            checkpoint.write(self.folder / BEST, resumed)
        elif best is not None:
            problem = f"is not of step {best}, the best so far; it is replaced after the next epoch"
            warnings.warn(f"{self.folder / BEST}: {problem}", stacklevel=2)
        return resumed["step"] == best

    def close(self, results: dict[str, float] | None = None) -> None:
        """Flush TensorBoard and give the lock back. The final metrics go to the HParams tab."""
        board, self.board = self.board, None
        try:
            if board and results:
                order = sorted(filter(has_chart, results), key=lambda name: (name != "psnr", name != "mse"))
                # tags of their own: under a metric's tag they would add a point to its curve
                named = {f"result/{name}": results[name] for name in order}
                with self._events():
                    board.add_hparams(dict(self.compared), named, run_name=".", global_step=self.step)
        finally:
            try:
                with self._events():
                    if board:
                        board.close()
            finally:
                if self.lock:
                    self.lock.release()

    def _clean(self, *, new: bool) -> None:
        """Remove parts of files that a killed process left, and all files of a run that never saved."""
        for name in (LAST, BEST, "config.json", LOG):
            remove_parts(self.folder, name)
        old = [LOG, BEST, f"{EVENTS}*"] if new else []
        for path in itertools.chain.from_iterable(map(self.folder.glob, old)):
            with contextlib.suppress(OSError):
                path.unlink()

    def _drop_metrics_after(self, step: int, at_end: bool) -> None:
        path = self.folder / LOG
        if path.exists():
            rows = [row for row in read_metrics(path) if row["step"] <= step]
            while at_end and rows and rows[-1]["kind"] == "test":
                rows.pop()
            write_text(path, "".join(f"{json.dumps(row)}\n" for row in rows))


class NullRun(Run):
    """A run that writes nothing, for every process except the first."""

    def __init__(self, folder: Path):
        self.folder = folder

    def start(self, resumed: dict[str, Any] | None = None, *, at_end: bool = False) -> bool:
        return True

    def log(
        self,
        kind: str,
        step: int,
        epoch: int,
        metrics: Numbers,
        settings: Numbers = NONE,
        *,
        held_out: str = "",
    ) -> None:
        pass

    def log_images(self, name: str, image: Tensor, step: int) -> None:
        pass

    def save(self, state: dict[str, Any]) -> None:
        pass

    def save_best(self, state: dict[str, Any] | None = None) -> None:
        pass

    def repair_best(self, resumed: dict[str, Any]) -> bool:
        return True

    def close(self, results: dict[str, float] | None = None) -> None:
        pass


def list_unreadable(folder: Path, unreadable: Mapping[str, str]) -> None:
    """Name the files of the data that cannot be read, with the reasons, in a file of the run, and warn of them."""
    path = folder / UNREADABLE
    if unreadable:
        write_text(path, "".join(f"{printable(f'{name}: {reason}')}\n" for name, reason in unreadable.items()))
        warnings.warn(f"unreadable files left out of the data: {len(unreadable):,}; {path} names them", stacklevel=2)
    else:
        path.unlink(missing_ok=True)  # of an earlier start


def order_events(folder: Path) -> None:
    """Rename event files of this second or later, so that the next one comes last.

    TensorBoard reads them in the order of their names. A run that is resumed within a second of its last start, or on a
    machine whose clock is behind, would else hide its own events, and show those that it drops.
    """
    limit = int(time.time()) - 1
    for path in sorted(folder.glob(f"{EVENTS}*"), reverse=True):
        second, _, rest = path.name.removeprefix(EVENTS).partition(".")
        if not second.isdigit() or int(second) <= limit:
            break
        with contextlib.suppress(PermissionError):  # on Windows, TensorBoard has it open
            path.rename(path.with_name(f"{EVENTS}{limit:010d}.{rest}"))
        limit -= 1


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl: `kind`, `split`, `step`, and numbers by name, without those that are not finite.

    Leaves out damaged lines, with a warning. There is no warning about an unfinished last line, which a killed process
    may leave.
    """
    if not path.is_file():
        return []
    *lines, unfinished = path.read_bytes().split(b"\n")
    rows, odd = [], []
    for number, line in enumerate([*lines, unfinished] if unfinished else lines, 1):
        try:
            row = json.loads(line)
            words = {type(row["kind"]), type(row.get("split", ""))}
            if words != {str} or type(row["step"]) is not int:
                raise ValueError("no row of metrics")
            rows.append({key: value for key, value in row.items() if key in WORDS or _is_finite(value)})
        except (ValueError, TypeError, AttributeError, LookupError, OverflowError, RecursionError):
            odd.append(number)
    if odd and odd != [len(lines) + 1]:
        count = f"line {odd[0]} is" if len(odd) == 1 else f"{len(odd)} lines, the first of them line {odd[0]}, are"
        warnings.warn(f"{path}: {count} damaged, and left out", stacklevel=2)
    return rows


def _is_finite(value: Any) -> bool:
    """Whether a value is a finite number; raises TypeError or OverflowError for what is no number of a metric."""
    return value is not None and math.isfinite(float(value) if isinstance(value, int) else value)
