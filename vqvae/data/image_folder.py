"""The data set made of a folder of image files."""

import functools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from vqvae.data.base import Dataset
from vqvae.data.cache import CachedImages, Contents, ImageOptions, Read, cached, dataset
from vqvae.data.decoding import Resize, Shape, read_image
from vqvae.data.listing import list_images
from vqvae.registry import Size


def folder(*, data_dir: Path, image_size: Size | None, options: ImageOptions = ImageOptions()) -> Dataset:
    """Your own images: every PNG, JPEG, WebP, BMP, GIF and TIFF file below data_dir, also behind links to folders.

    HEIC and AVIF files need a package, which their error names. Hidden files and folders are skipped. Every image gets
    the size image_size (default: 64); resize says how.

    Folders train and test (or val) at the top are the splits. Without them, a hash of its path assigns each image to
    a split, so that new images move no other. If every image lies in a subfolder, of data_dir or of the splits, these
    subfolders are the classes. The first run converts the files into a cache (~/.cache/vqvae) that later runs map into
    memory.
    """
    return dataset(Folder(data_dir), image_size, options)


def cached_images(folder: Path, size: int | tuple[int, int], channels: int, resize: Resize = "crop") -> CachedImages:
    """The images below a folder, see `cached`."""
    return cached(Folder(folder), Shape(Size(size), channels, resize))


class Folder:
    """The image files below a folder, as a source of images. Raises `OptionError` if there are none."""

    kind = "folder"

    def __init__(self, path: Path):
        self.path = path
        files, self.unlisted = list_images(path, "data_dir")
        self.names = [file.relative_to(path).as_posix() for file in files]

    def facts(self) -> Any:
        return [(name, *stamp(self.path / name)) for name in self.names]

    def contents(self) -> Contents:
        return Contents(self.names)

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


def stamp(file: Path) -> tuple[str, int, int]:
    """Differs where the content of a file has changed: its path, size and time of modification."""
    try:
        status = file.stat()
        return str(file.resolve()), status.st_size, status.st_mtime_ns
    except OSError:
        return str(file), 0, 0
