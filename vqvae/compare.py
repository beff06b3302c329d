"""Several runs in one table: their data, rate, held-out metrics, size and training time.

Imports no torch before it reads a run: `--help` prints `COLUMNS`.
"""

import contextlib
import itertools
import json
import math
import os
import textwrap
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from vqvae.errors import UserError, printable
from vqvae.metrics import EVALUATION, TABLE, for_json

Format = Literal["text", "markdown", "json"]
WIDTH = 100  # columns of the table as text
# spaces between columns, and least widths of the columns that are wrapped: the first row with which the table fits
FITTING = ((2, {"run": 12, "data": 8}), (1, {"run": 12, "data": 8}), (1, {"run": 6, "data": 6}))


def _count(count: int) -> str:
    for limit, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= limit:
            return f"{count / limit:.1f}{letter}"
    return str(count)


def _duration(seconds: float) -> str:
    minutes = seconds / 60
    return f"{seconds:.0f} s" if seconds < 100 else f"{minutes:.0f} min" if minutes < 100 else f"{minutes / 60:,.1f} h"


class Column(NamedTuple):
    """A column of the table. A metric has its standard error in the run's value `<name>_se`."""

    name: str
    heading: str
    explanation: str
    show: Callable[[Any], str] = str
    largest_first: bool = False  # when the runs are sorted by it
    optional: bool = False  # left out where no run has a value


COLUMNS = (
    Column("run", "run", "name of the run's folder"),
    Column("data", "data", "data set"),
    Column("tokens", "tokens", "codes of an image", "{:,}".format),
    Column("bits", "bits", "bits of an image's codes: tokens x log2 K", "{:,.0f}".format),
    Column("prior_bits", "prior bits", "bits of an image's codes under the run's trained prior", "{:,.1f}".format,
           optional=True),
    *(
        Column(m.name, m.heading, m.explanation, m.form.format, m.largest_first, optional=bool(m.asked))
        for m in TABLE if m.heading
    ),
    Column("parameters", "params", "weights that gradients train; an EMA codebook is not among them", _count),
    Column("seconds", "time", "time of the training steps, without evaluations", _duration),
)  # fmt: skip
COMPARED = [key for metric in TABLE if metric.heading for key in (metric.name, f"{metric.name}_se")]


class Row(NamedTuple):
    """A run, with its settings and metrics."""

    values: dict[str, Any]  # by column, with standard errors as `<name>_se`; None where unknown
    held_out: dict[str, Any]  # name, shape, count and fingerprint of the held-out images; None where unknown
    trained_on: dict[str, Any]  # count and fingerprint of the training images
    source: str | None  # the file that the metrics come from
    step: int  # of the metrics


def compare(paths: Sequence[str]) -> list[Row]:
    """Read runs from their folders, checkpoints, or exported folders (without metrics), one row each.

    Leaves out runs that cannot be read, with a warning each. Warns if the data differ. Folders with only TensorBoard's
    files, such as logs/vqvae_mnist of the repository, are left out silently. Raises `UserError` if no run can be read.
    """
    rows = []
    for path in paths:
        try:
            rows.append(read_run(path))
        except UserError as problem:
            if len(paths) == 1:
                raise
            if not _has_only_events(path):
                warnings.warn(f"{problem}; left out", stacklevel=2)
    if not rows:
        raise UserError("no run can be compared; name folders such as logs/<run>")
    names = [row.values["run"] for row in rows]
    for row in rows:
        if names.count(row.values["run"]) > 1:
            row.values["run"] = row.values["path"]
    if difference := differing_data(rows):
        warnings.warn(difference, stacklevel=2)
    return rows


def _has_only_events(path: str) -> bool:
    names = list[str]()
    with contextlib.suppress(OSError):  # no folder, or one that cannot be read
        names = os.listdir(path)
    return bool(names) and all(name.startswith("events.out.tfevents.") for name in names)


def read_run(path: str) -> Row:
    """The row of one run. Raises `UserError` for a path without a model."""
    from vqvae import checkpoint

    content = checkpoint.read_model(path)
    model = checkpoint.restore(content, path)
    about, file = content["data"], checkpoint.locate(path)
    folder = file.parent
    source, step, found, seconds, split = None, content["step"], dict[str, Any](), None, "test"
    if "epoch" in content:
        source, step, found, seconds, split = _metrics(file, content)
    else:
        folder = Path(path)
        warnings.warn(f"{path}: an exported model has no metrics; name the run's folder", stacklevel=3)
    values: dict[str, Any] = {"run": Path(os.path.abspath(folder)).name, "path": path, "data": about["name"]}
    values |= {key: found[key] for key in found if key in (*COMPARED, "protocol")}
    if model.discrete is not None:
        values |= {"tokens": model.discrete.tokens, "bits": model.discrete.bits}
        if content["config"]["prior"]["name"] != "uniform":
            nats = {key: found[key] for key in ("prior_nats", "prior_nats_se") if key in found}
            values |= {key.replace("nats", "bits"): value / math.log(2) for key, value in nats.items()}
    values |= {"parameters": sum(p.numel() for p in model.parameters()), "seconds": seconds}
    train, evaluated = (
        {key: about.get(group, {}).get(name) for key, group in (("count", "examples"), ("fingerprint", "fingerprint"))}
        for name in ("train", split)
    )
    count = evaluated["count"]
    if "fingerprint" in found or found.get("images", count) != count:  # perhaps of other images than those of training
        evaluated = {"count": found.get("images", count), "fingerprint": found.get("fingerprint")}
    held_out = {"name": about["name"], "shape": "x".join(map(str, about["shape"])), **evaluated}
    return Row(values, held_out, train, source, step)


def _metrics(path: Path, content: Mapping[str, Any]) -> tuple[str | None, int, dict[str, Any], float | None, str]:
    """The file with a checkpoint's metrics, their step, the metrics, the seconds of training, and the metrics' split.

    Those of the test split are preferred.
    """
    from vqvae.checkpoint import read_evaluation
    from vqvae.runs import LOG, read_metrics

    step, batch_size = content["step"], content["config"]["batch_size"]
    epochs = [row for row in read_metrics(path.with_name(LOG)) if row["kind"] == "epoch" and row["step"] <= step]
    try:
        found = read_evaluation(path, content)
    except UserError as problem:
        warnings.warn(str(problem), stacklevel=4)
        found = None
    if found:
        numbers = _numbers(found, "") | {"protocol": printable(str(found.get("protocol", "")))}
        if "fingerprint" in found:  # evaluations of an earlier version have none
            numbers["fingerprint"] = str(found["fingerprint"])
        return EVALUATION, step, numbers, training_seconds(epochs, step, batch_size), "test"
    if epochs:
        last = epochs[-1]["step"]
        split = epochs[-1].get("split", "test")  # an earlier version evaluated no other
        return LOG, last, _numbers(epochs[-1], "held_out_"), training_seconds(epochs, last, batch_size), split
    return None, step, {}, None, "test"


def _numbers(found: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """The entries whose names begin with a prefix and whose values are finite numbers, without the prefix."""
    numbers = {key: value for key, value in found.items() if type(value) in (int, float) and math.isfinite(value)}
    return {key.removeprefix(prefix): value for key, value in numbers.items() if key.startswith(prefix)}


def training_seconds(epochs: Iterable[Mapping[str, Any]], step: int, batch_size: int) -> float | None:
    """The time of the first `step` training steps, from the speeds that a run logged at the end of its epochs.

    It counts every step once, however often the run was interrupted. None where no speed is known.
    """
    seconds, before, speed = 0.0, 0, None
    for row in epochs:
        speed = row.get("images_per_s")
        if not speed or speed < 0:
            return None
        seconds += (row["step"] - before) * batch_size / speed
        before = row["step"]
    return seconds + (step - before) * batch_size / speed if speed else None


def differing_data(rows: Sequence[Row]) -> str | None:
    """The differences between the runs' data in one line, or None."""

    def differing(kind: Literal["held_out", "trained_on"], key: str) -> str | None:
        found = {value: None for row in rows if (value := getattr(row, kind)[key]) is not None}
        shown = (f"{value:,}" if isinstance(value, int) else str(value) for value in found)
        return ", ".join(shown) if len(found) > 1 else None

    parts = {"data sets": "name", "image sizes": "shape", "held-out images": "count"}
    found = [f"{label} {values}" for label, key in parts.items() if (values := differing("held_out", key))]
    if not found and differing("held_out", "fingerprint"):
        found = ["different held-out images"]
    if found:
        return f"the metrics are not comparable, because the runs' data differ: {'; '.join(found)}"
    if counts := differing("trained_on", "count"):
        return f"the runs were trained on different numbers of images: {counts}; their held-out images are the same"
    if differing("trained_on", "fingerprint"):
        return "the runs were trained on different images; their held-out images are the same"
    return None


def sort(rows: list[Row], name: str) -> list[Row]:
    """The rows in the order of a column, best or smallest first; those without a value come last."""
    column = next(column for column in COLUMNS if column.name == name)
    known = [row for row in rows if row.values.get(name) is not None]
    known.sort(key=lambda row: row.values[name], reverse=column.largest_first)
    return known + [row for row in rows if row.values.get(name) is None]


# the table in its formats


def table(rows: Sequence[Row], form: Format) -> str:
    """The rows as a table, as Markdown, or as a JSON list of objects."""
    if form == "json":
        blank = dict.fromkeys((*(c.name for c in COLUMNS), *COMPARED, "prior_bits_se", "protocol"))
        entries = (
            blank | row.values | {"step": row.step, "source": row.source, "held_out": row.held_out} for row in rows
        )
        return json.dumps([for_json(entry) for entry in entries], indent=2)
    columns = [c for c in COLUMNS if not c.optional or any(row.values.get(c.name) is not None for row in rows)]
    lines = _markdown(rows, columns) if form == "markdown" else _text(rows, columns)
    notes = []
    if any(f"{c.name}_se" in row.values for c in columns for row in rows):
        notes.append("±: standard error over held-out images.")
    if any(row.source not in (EVALUATION, None) for row in rows):
        notes.append(f"*: metrics of the last epoch, because there is no {EVALUATION} of the checkpoint's weights.")
    protocols: dict[str, list[str]] = {}
    for row in rows:
        if protocol := row.values.get("protocol"):
            protocols.setdefault(protocol, []).append(printable(row.values["run"]))
    for protocol, runs in protocols.items():
        of_some = f" of {', '.join(runs)}" if len(protocols) > 1 else ""
        notes += textwrap.wrap(f"Protocol{of_some}: {protocol}.", WIDTH if form == "text" else 10**6)
    return "\n".join([*lines, *([""] if notes else []), *notes])


def _cell(row: Row, column: Column) -> tuple[str, str]:
    """A value and its standard error as text."""
    value, error = row.values.get(column.name), row.values.get(f"{column.name}_se")
    if column.name == "run":
        return printable(str(value)) + ("" if row.source in (EVALUATION, None) else " *"), ""
    return ("-" if value is None else column.show(value)), ("" if error is None else f"±{column.show(error)}")


def _markdown(rows: Sequence[Row], columns: Sequence[Column]) -> list[str]:
    def line(cells: Iterable[str]) -> str:
        return f"| {' | '.join(cells)} |"

    def joined(value: str, error: str) -> str:
        return f"{value} {error.replace('±', '± ')}".strip().replace("|", r"\|").replace("*", r"\*")

    return [
        line(c.heading for c in columns),
        "|---" * len(columns) + "|",
        *(line(joined(*_cell(row, c)) for c in columns) for row in rows),
    ]


def _text(rows: Sequence[Row], columns: Sequence[Column]) -> list[str]:
    """The table in WIDTH characters: standard errors are below the values, and long names are wrapped."""
    cells = [{c.name: [part for part in _cell(row, c) if part] for c in columns} for row in rows]
    heads = {c.name: c.heading.split() for c in columns}
    grid = [heads, *cells]
    needed = {c.name: max(len(line) for row in grid for line in row[c.name]) for c in columns}
    for gap, shortest in FITTING:
        widths, room = dict(needed), WIDTH - gap * (len(columns) - 1)
        for name, least in shortest.items():
            excess = max(0, sum(widths.values()) - room)
            widths[name] = max(min(least, widths[name]), widths[name] - excess)
        if sum(widths.values()) <= room:
            break
    lines = []
    for row in grid:
        broken = {name: [piece for line in row[name] for piece in _broken(line, widths[name])] for name in row}
        for parts in itertools.zip_longest(*broken.values(), fillvalue=""):
            aligned = (
                part.ljust(widths[name]) if name in shortest else part.rjust(widths[name])
                for name, part in zip(row, parts, strict=True)
            )
            lines.append((" " * gap).join(aligned).rstrip())
    return lines


def _broken(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, width) or [""]
