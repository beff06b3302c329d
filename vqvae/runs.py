"""A run's folder: its settings, its metrics as JSON lines and TensorBoard events, and its checkpoints."""

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from vqvae import checkpoint
from vqvae.errors import OptionError
from vqvae.files import make_folder, write_json, write_text


def free_name(name: str, *folders: Path) -> str:
    """`name`, or the first of `name-2`, `name-3` ... that exists in none of the folders."""
    free, number = name, 1
    while any((folder / free).exists() for folder in folders):
        number += 1
        free = f"{name}-{number}"
    return free


def claim(folder: Path) -> None:
    """Make a run's folder. Raises `OptionError` if it contains a run or cannot be written."""
    if (folder / "config.json").exists() or (folder / "checkpoint.pt").exists():
        problem = f"{folder} already contains a run; resume that run, or choose another name"
        raise OptionError("", "name", folder.name, problem)
    make_folder(folder.parent, "log_dir")
    make_folder(folder, "log_dir")


class Run:
    """logs/<run>: config.json, metrics.jsonl, TensorBoard events, checkpoint.pt (the last) and best.pt.

    `facts` are the entries that all checkpoints of the run share: kind, run, config, data, examples, plots. A new run
    refuses a folder that contains one. A resumed run deletes the metrics logged after step `resume_at`.
    """

    def __init__(self, folder: Path, facts: dict[str, Any], *, resume_at: int | None = None):
        self.folder, self.facts = folder, facts
        if resume_at is None:
            claim(folder)
        write_json(folder / "config.json", facts["config"])
        self._delete_metrics_after(resume_at or 0)

        from torch.utils.tensorboard import SummaryWriter

        # TensorBoard drops events from purge_step on; those of the step resumed at stay
        self.board = SummaryWriter(str(folder), purge_step=None if resume_at is None else resume_at + 1)
        self.board.add_text("config", f"```\n{json.dumps(facts['config'], indent=2)}\n```", 0)

    def log(self, kind: str, step: int, epoch: int, metrics: dict[str, float]) -> None:
        """Append a line to metrics.jsonl, and log each metric as TensorBoard scalar `kind/name`."""
        with open(self.folder / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps({"kind": kind, "step": step, "epoch": epoch, **metrics}) + "\n")
        for name, value in metrics.items():
            self.board.add_scalar(f"{kind}/{name}", value, step)

    def histogram(self, name: str, values: Tensor, step: int) -> None:
        """Log a histogram of `values` (any shape), such as how often each code was used."""
        self.board.add_histogram(name, values, step)

    def log_images(self, name: str, image: Tensor, step: int) -> None:
        """Log one image `[C, H, W]` in [0, 1], such as a grid of samples."""
        self.board.add_image(name, image, step)

    def save(self, state: dict[str, Any], name: str = "checkpoint.pt") -> None:
        """Write a checkpoint of the run's facts and `state`."""
        checkpoint.write(self.folder / name, self.facts | state)

    def close(self, results: dict[str, float] | None = None) -> None:
        """Flush TensorBoard. Final results go to its HParams tab, together with the settings."""
        if results:
            settings: dict[str, Any] = {}
            for key, value in self.facts["config"].items():
                if isinstance(value, dict):
                    settings |= {key: value["name"]} | {f"{key}.{k}": v for k, v in value["options"].items()}
                elif value is not None:
                    settings[key] = value
            # tags of their own: under a metric's tag they would add a point to its curve
            named = {f"result/{name}": value for name, value in results.items()}
            self.board.add_hparams(settings, named, run_name=".")
        self.board.close()

    def _delete_metrics_after(self, step: int) -> None:
        path = self.folder / "metrics.jsonl"
        if path.exists():
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
            write_text(path, "".join(f"{line}\n" for line in lines if _step_of(line) <= step))


class NullRun(Run):
    """A run that writes nothing, for every process except the first."""

    def __init__(self, folder: Path):
        self.folder = folder

    def log(self, kind: str, step: int, epoch: int, metrics: dict[str, float]) -> None:
        pass

    def histogram(self, name: str, values: Tensor, step: int) -> None:
        pass

    def log_images(self, name: str, image: Tensor, step: int) -> None:
        pass

    def save(self, state: dict[str, Any], name: str = "checkpoint.pt") -> None:
        pass

    def close(self, results: dict[str, float] | None = None) -> None:
        pass


def _step_of(line: str) -> float:
    """The step of a line of metrics.jsonl; infinity for a line that a killed process left incomplete."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")
