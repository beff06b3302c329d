"""The terminal during training: a bar, a table with a row per epoch, and what else is at work. All fits 80 columns."""

import contextlib
import errno
import time
from collections.abc import Iterator, Mapping

from tqdm import tqdm

from vqvae import distributed
from vqvae.metrics import METRICS, line

WIDTH, NARROWEST = 80, 7  # columns of the terminal, and of a metric in the table
LONGEST = 34  # of the metrics next to the bar
BAR = "{desc} {percentage:3.0f}% {bar} {elapsed}<{remaining}"
FIRST, LAST = 5, 25  # steps between which the speed is measured for the first estimate


def images_bar(total: int, what: str) -> tqdm:
    """A bar that counts images, with images/s and the time left, for what takes longer than a second."""
    return tqdm(
        total=total,
        desc=what,
        unit=" images",
        bar_format="{desc} {percentage:3.0f}% {bar} {n_fmt}/{total_fmt}, {rate_noinv_fmt} {elapsed}<{remaining}",
        delay=1,
        dynamic_ncols=True,
        disable=distributed.hides_bars(),
        leave=False,
    )


class Progress:
    """Progress over `total` steps, of which `done` are done. No bar if `quiet`, or if the output is not a terminal."""

    def __init__(self, total: int, done: int, names: tuple[str, ...], *, split: str = "held-out", quiet: bool):
        self.names = names  # of the metrics to show, the most important first
        self.split = split  # that is evaluated after each epoch
        self.columns: list[str] = []  # of the table, and their widths, once its header is printed
        self.widths: list[int] = []
        self.begun, self.started_at, self.first_time = time.perf_counter(), done, 0.0
        self.bar = tqdm(
            total=total,
            initial=done,
            desc="start",
            bar_format=BAR,
            dynamic_ncols=True,
            disable=True if quiet else None,
            leave=False,
            delay=1e-9,  # drawn with the first step or other work, below the lines that describe the run
        )

    def write(self, text: str) -> None:
        """Print a line above the bar."""
        with unless_closed():
            self.bar.write(text)

    def close(self) -> None:
        with unless_closed():
            self.bar.close()

    def epoch(self, number: int, count: int) -> None:
        """Name the epoch that begins."""
        self.bar.set_description_str(f"epoch {number}/{count}", refresh=False)

    def step(self, done: int) -> None:
        """Count a step. After the first few, print how long the rest will take."""
        with unless_closed():
            self.bar.update()
        taken, rest = done - self.started_at, self.bar.total - done
        if taken == FIRST:
            self.first_time = time.perf_counter()
        elif taken == LAST and rest > LAST and not self.widths:
            seconds = (time.perf_counter() - self.first_time) * rest / (LAST - FIRST)
            self.write(f"time   about {duration(seconds)}, and the evaluation after each epoch")

    def show(self, means: Mapping[str, float]) -> None:
        """Show the most important metrics next to the bar: two, or one if two are too long."""
        present = [name for name in self.names if name in means]
        texts = [line(tuple(present[:count]), means) for count in (2, 1)]
        self.bar.bar_format = f"{BAR}  {texts[0] if len(texts[0]) <= LONGEST else texts[1]}"

    @contextlib.contextmanager
    def working(self, what: str) -> Iterator[None]:
        """Show the name of the work in the block. Its time does not count in the estimate of the time left."""
        if self.bar.disable:
            yield
            return
        before, begun = self.bar.desc, time.perf_counter()
        with unless_closed():
            self.bar.set_description_str(what)
        try:
            yield
        finally:
            self.bar.set_description_str(before, refresh=False)
            pause = time.perf_counter() - begun
            self.bar.start_t += pause
            self.bar.last_print_t += pause

    def row(self, epoch: int, trained: Mapping[str, float], held_out: Mapping[str, float], speed: float) -> None:
        """Print an epoch's row of the table; the first also prints the header."""
        if not self.widths:
            self.columns = columns(self.names, held_out, self.split)
            labels = [METRICS[name].label for name in self.columns]
            both = [f"{split} {label}" for label in labels[:1] for split in ("train", self.split)]
            titles = ["epoch", *both, *labels[1:], "images/s"]
            self.widths = [max(len(title), NARROWEST) if title != "epoch" else 5 for title in titles]
            self.write("  ".join(f"{title:>{width}}" for title, width in zip(titles, self.widths, strict=True)))
        values = [(name, trained) for name in self.columns[:1]] + [(name, held_out) for name in self.columns]
        cells = [METRICS[name].form.format(numbers[name]) if name in numbers else "" for name, numbers in values]
        cells = [str(epoch), *cells, f"{speed:,.0f}"]
        self.write("  ".join(f"{cell:>{width}}" for cell, width in zip(cells, self.widths, strict=True)))

    def finish(self, best_epoch: int | None, monitor: str) -> None:
        """Print how long it took, and which epoch has the lowest value of the metric that is monitored."""
        metric = METRICS.get(monitor)
        label = metric.label if metric and metric.label else monitor.replace("_", " ")
        best = f"; best.pt is epoch {best_epoch}, of the lowest {self.split} {label}" if best_epoch else ""
        self.write(f"{duration(time.perf_counter() - self.begun)}{best}")


@contextlib.contextmanager
def unless_closed() -> Iterator[None]:
    """Do without what the block writes if the terminal was closed. The signal that says so may come later."""
    try:
        yield
    except OSError as problem:
        if problem.errno != errno.EIO:
            raise


def columns(names: tuple[str, ...], held_out: Mapping[str, float], split: str = "held-out") -> list[str]:
    """The metrics with a column in the table: the most important that fit."""
    chosen: list[str] = []
    used = 5 + 10  # the epoch, and images/s
    for name in names:
        if name not in held_out:
            continue
        label = METRICS[name].label
        titles = [f"train {label}", f"{split} {label}"] if not chosen else [label]
        used += sum(2 + max(len(title), NARROWEST) for title in titles)
        if used >= WIDTH:
            break
        chosen.append(name)
    return chosen


def duration(seconds: float) -> str:
    """Seconds in words: `40 s`, `12 min`, `3 h 20 min`."""
    if seconds < 90:
        return f"{max(seconds, 1):.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
