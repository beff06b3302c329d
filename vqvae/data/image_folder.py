"""The data set made of a folder of image files."""

import functools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from vqvae.data.base import Dataset
from vqvae.data.cache import CachedImages, Contents, cached
from vqvae.data.listing import list_images
from vqvae.data.sources import ImageOptions, Reading, dataset
from vqvae.decoding import Read, Resize, Shape, read_image
from vqvae.registry import Size


def folder(
    *, data_dir: Path, image_size: Size | None, reading: Reading, options: ImageOptions = ImageOptions()
) -> Dataset:
    """Your own images: every PNG, JPEG, WebP, BMP, GIF and TIFF file below data_dir, also behind links to folders.

    HEIC and AVIF files need a package, which their error names. Hidden files and folders are skipped. Every image gets
    the size image_size (default: 64); resize says how.

    Folders train and test (or val) at the top are the splits. Without them, a hash of its path assigns each image to
    a split, so that new images do not move others. If every image lies in a subfolder, of data_dir or of the splits,
    these subfolders are the classes. The first run converts the files into a cache (~/.cache/vqvae) that later runs map
    into memory; after that, only new and changed files are converted.
    """
    return dataset(Folder(data_dir), image_size, options, reading)


def cached_images(folder: Path, size: int | tuple[int, int], channels: int, resize: Resize = "crop") -> CachedImages:
    """The images below a folder, see `cached`."""
    return cached(Folder(folder), Shape(Size(size), channels, resize))


class Folder:
    """The image files below a folder, as a source of images. Raises `OptionError` if there are none."""

    kind = "folder"

    def __init__(self, path: Path):
        self.path = path
        self.names, self.unlisted, self.stamps = list_images(path, "data_dir")

    def facts(self) -> Any:
        return [os.path.realpath(self.path), self.names, self.stamps]

    def contents(self) -> Contents:
        return Contents(self.names, stamps=self.stamps)

    def images(self, chosen: Sequence[int], shape: Shape) -> Iterator[tuple[int, Read]]:
        for i in chosen:
            yield i, functools.partial(read_image, self.path / self.names[i], *shape)

    def access(self, name: str) -> list[int]:
        file = self.path / name
        try:
            status = file.stat()
        except OSError:
            return []
        return [status.st_mode, status.st_uid, status.st_gid, status.st_ctime_ns, os.access(file, os.R_OK)]
