"""A run's folder: its settings, its metrics as lines of JSON and as TensorBoard events, its checkpoints."""

import json
import os
from pathlib import Path
from typing import Any

from torch import Tensor

from vqvae import checkpoint
from vqvae.errors import UserError


def free_name(name: str, *folders: Path) -> str:
    """`name`, or `name-2`, `name-3` ... : the first that none of the folders holds yet."""
    taken, number = name, 1
    while any((folder / taken).exists() for folder in folders):
        number += 1
        taken = f"{name}-{number}"
    return taken


class Run:
    """logs/<run>: config.json, metrics.jsonl, TensorBoard events, checkpoint.pt (the last) and best.pt.

    `facts` are the parts of every checkpoint that do not change: kind, run, config, data, examples, plots.
    A new run refuses a folder that already holds one; a resumed run drops what was logged after its checkpoint.
    """

    def __init__(self, folder: Path, facts: dict[str, Any], *, resume_at: int | None = None):
        self.folder, self.facts = folder, facts
        if resume_at is None:
            claim(folder)
        config = json.dumps(facts["config"], indent=2)
        (folder / "config.json").write_text(config + "\n")
        self._forget_after(resume_at or 0)

        from torch.utils.tensorboard import SummaryWriter

        self.board = SummaryWriter(str(folder), purge_step=resume_at)
        self.board.add_text("config", f"```\n{config}\n```", 0)

    def log(self, kind: str, step: int, epoch: int, numbers: dict[str, float]) -> None:
        """One line of metrics.jsonl, and a TensorBoard scalar `kind/name` for every number."""
        with open(self.folder / "metrics.jsonl", "a") as file:
            file.write(json.dumps({"kind": kind, "step": step, "epoch": epoch, **numbers}) + "\n")
        for name, value in numbers.items():
            self.board.add_scalar(f"{kind}/{name}", value, step)

    def histogram(self, name: str, usage: Tensor, step: int) -> None:
        """Show how often each code was used: one bar of the histogram holds the codes of like usage."""
        self.board.add_histogram(name, usage, step)

    def pictures(self, name: str, picture: Tensor, step: int) -> None:
        """Show a picture `[C, H, W]`."""
        self.board.add_image(name, picture, step)

    def save(self, state: dict[str, Any], name: str = "checkpoint.pt") -> None:
        checkpoint.write(self.folder / name, self.facts | state)

    def close(self, results: dict[str, float] | None = None) -> None:
        """Write out what TensorBoard still holds, with the settings and final results for its HParams tab."""
        if results:
            settings = {}
            for key, value in self.facts["config"].items():
                if isinstance(value, dict):
                    settings |= {key: value["name"]} | {f"{key}.{k}": v for k, v in value["options"].items()}
                elif value is not None:
                    settings[key] = value
            # the results keep their own tags: a shared one would add a point to the curves
            named = {f"result/{name}": value for name, value in results.items()}
            self.board.add_hparams(settings, named, run_name=".")
        self.board.close()

    def _forget_after(self, step: int) -> None:
        path = self.folder / "metrics.jsonl"
        if path.exists():
            rows = [line for line in path.read_text().splitlines() if _step_of(line) <= step]
            partial = path.with_name("metrics.jsonl.partial")
            partial.write_text("".join(line + "\n" for line in rows))
            os.replace(partial, path)


class Bystander:
    """Takes a run's place in every process but the first, and writes nothing."""

    def __init__(self, folder: Path):
        self.folder = folder

    def _nothing(self, *args: Any, **keywords: Any) -> None:
        pass

    log = histogram = pictures = save = close = _nothing


def claim(folder: Path) -> None:
    """Make a run's folder; `UserError` if it holds a run already or cannot be written."""
    if (folder / "config.json").exists() or (folder / "checkpoint.pt").exists():
        raise UserError(
            f"--name {folder.name}: {folder} already holds a run; --resume {folder}, or choose another --name"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as problem:
        raise UserError(f"--log-dir {folder.parent}: cannot write there ({problem.strerror})") from None


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return float("inf")  # a line cut short by a kill
