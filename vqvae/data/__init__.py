"""Data sets by name: splits of uint8 images in memory, or mapped from a cache. A batch is an index into them.

A data set is a function of `data_dir`, `image_size` and options of its own. One with a cache also takes `reading`: how
to use the cache, and which part of the images it is to have. A new data set is a function and a row here.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

from vqvae.data.base import Dataset, Images, fingerprint, scale
from vqvae.data.builtin import digits, gauss2d, photos
from vqvae.data.containers import npz, parquet, webdataset
from vqvae.data.image_folder import folder
from vqvae.data.published import cifar10, fashion_mnist, mnist, mnist_binary, svhn
from vqvae.data.sources import Reading
from vqvae.errors import OptionError, one_line, out_of_memory
from vqvae.registry import Choice, Range, Sides, Size, Slot, arguments, checked, needs, resolve

__all__ = ["DATASETS", "SLOT", "Dataset", "Images", "fingerprint", "load"]

DATASETS: dict[str, Callable[..., Dataset]] = {
    "digits": digits,
    "photos": photos,
    "mnist": mnist,
    "mnist-binary": mnist_binary,
    "fashion-mnist": fashion_mnist,
    "cifar10": cifar10,
    "svhn": svhn,
    "folder": folder,
    "npz": npz,
    "parquet": parquet,
    "webdataset": webdataset,
    "gauss2d": gauss2d,
}
SLOT = Slot("dataset", DATASETS, built_in=("digits", "photos", "gauss2d"))


@checked
def load(
    name: str,
    *,
    data_dir: str | Path = "data",
    image_size: Annotated[int | str | tuple[int, int], Sides(Range(1, 4096))] | None = None,
    limit: Annotated[int, Range(1)] | None = None,
    validation: Annotated[float, Range(above=0, below=1)] | None = None,
    rescan: bool = False,
    part: tuple[int, int] = (0, 1),
    **options: Any,
) -> Dataset:
    """Load a data set by name, with the first `limit` images of each split.

    `validation` is the share of these training images that becomes a validation split, unless the files have one. None
    makes no such split.

    Images of folders, npz, parquet and tar files come from a cache on this machine; `rescan` converts all of them
    again. `part` = (number, count) loads one of `count` parts of the training images, and all held-out images; the
    cache stores only these. `limit` then counts the images of all parts together.

    Images are scaled to `image_size`: pixels a side (64), or height and width ((96, 128) or "96x128"). Their aspect
    changes, except where the data set has the option `resize`.

    Raises `UserError` for an unknown name or option, a value out of range, files that are absent, damaged or cannot be
    downloaded, and images that do not fit into memory.
    """
    choice = resolve(SLOT, Choice(name, options))
    if not needs(SLOT, name, "reading"):
        for option, given, value in (("rescan", rescan, None), ("data_shards", part[1] > 1, part[1])):
            if given:
                problem = f"has no effect on the data set {name}, because it has no cache; leave it out"
                raise OptionError(option, value, problem)
    try:
        folder = Path(data_dir).expanduser()
    except RuntimeError as problem:
        raise OptionError("data_dir", data_dir, f"{one_line(problem)}; name the folder in full") from None
    if not str(data_dir):
        raise OptionError("data_dir", "''", "names no folder; . is the current one")
    try:
        size = None if image_size is None else Size(image_size)
        context = {"data_dir": folder, "image_size": size, "reading": Reading(rescan, *part, validation)}
        context = {key: value for key, value in context.items() if needs(SLOT, name, key)}
        data = DATASETS[name](**context, **arguments(DATASETS[name], choice.options))
        most = {"train": limit and -(-limit // part[1])}
        splits: dict[str, Any] = {
            key: Images(scale(split.images[: most.get(key, limit)], size), split.labels[: most.get(key, limit)])
            for key, split in data.splits.items()
        }
    except (MemoryError, RuntimeError) as problem:
        if not out_of_memory(problem):
            raise
        raise OptionError("dataset", name, "does not fit into memory; use smaller or fewer images") from None
    probabilities = None if data.probabilities is None else data.probabilities[:limit]
    data = data._replace(probabilities=probabilities, **splits)
    return data if validation is None or data.validation is not None else data.with_validation(validation)
