#!/usr/bin/env python3
"""Measure a large folder of images: converted, started again, changed, killed, and read in two orders. Linux only.

  python benchmarks/folders.py                  100,000 JPEGs of 64 to 256 pixels a side, which need 3 GB of disk
  python benchmarks/folders.py --images 2000    a quick look

JPEGs and caches are in a temporary folder, which is removed at the end. There are 2,000 different JPEGs, copied under
many names. Every line is measured in a process of its own; CPU seconds are summed over all processes that it starts.
Memory is the largest sum of the resident memory of these processes; "own" leaves out files that they map, such as
libraries.
"""

import argparse
import io
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from memory import memory_of

ROOT = Path(__file__).parent.parent
IN_A_FOLDER, DIFFERENT = 1000, 2000
SIDES = (64, 256)
BATCH = 128
INTERVAL = 0.2  # seconds between looks at the memory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=100_000, metavar="N", help="JPEGs (default: 100,000)")
    parser.add_argument("--size", type=int, default=64, metavar="PIXELS", help="side of the converted images")
    parser.add_argument("--dir", help="where the temporary folder is made")
    parser.add_argument("--work", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        print(json.dumps(WORK[options.work[0]](Path(options.work[1]), options.size)))
        return
    with tempfile.TemporaryDirectory(dir=options.dir) as place:
        for line in lines(Path(place), options):
            print(line, flush=True)


def lines(place: Path, options: argparse.Namespace) -> Iterator[str]:
    cores, count, images = len(os.sched_getaffinity(0)), options.images, place / "images"
    begun = time.perf_counter()
    generate(images, count)
    size = sum(file.stat().st_size for file in images.rglob("*.jpg")) / count
    yield f"{count:,} JPEGs of {size / 1e3:.1f} kB written in {time.perf_counter() - begun:.0f} s; {cores} cores"

    def work(what: str, folder: Path = images, threads: int = cores) -> dict[str, Any]:
        return watched(command(what, folder, options.size), place, threads)

    def took(found: dict[str, Any], count: int = 0) -> str:
        speed = f", {count / found['seconds']:,.0f} images/s" if count else ""
        return f"{found['seconds']:.2f} s{speed}; {found['cpu']:.1f} CPU s; memory {memory(found)}"

    part = images / "0000"
    yield f"{IN_A_FOLDER:,} by 1 process     {took(work('load', part, 1), min(count, IN_A_FOLDER))}"
    shutil.rmtree(place / "vqvae")
    first = work("load")
    yield f"all by {cores} processes     {took(first, count)}"
    yield f"second start         {took(work('load'))}"
    found = work("facts")
    yield f"  then a run reads   fingerprint {found['fingerprint']:.1f} s, variance {found['variance']:.1f} s"
    shutil.copy(next(part.iterdir()), images / "new.jpg")
    yield f"one file added       {took(work('load'))}; caches {len(caches(place))}"
    (images / "new.jpg").unlink()
    yield f"and removed          {took(work('load'))}; caches {len(caches(place))}"
    shutil.rmtree(place / "vqvae")
    done = kill(command("load", images, options.size), place, count // 2)
    found = work("load")
    yield f"killed after {done:,}; resumed {took(found, count - done)}; the same images: {found['sum'] == first['sum']}"
    for order in ("full", "blocks"):
        found = work(order)
        yield (
            f"cold epoch, {order:6}   {found['seconds']:.1f} s, {count / found['seconds']:,.0f} images/s, "
            f"{found['read'] / 1e9:.2f} GB read in {found['places']:,} places"
        )


def generate(folder: Path, count: int) -> None:
    """Images of smooth random colors with some noise, in folders of a thousand."""
    for number in range(-(-count // IN_A_FOLDER)):
        (folder / f"{number:04}").mkdir(parents=True)
    with multiprocessing.get_context("spawn").Pool(len(os.sched_getaffinity(0))) as pool:
        drawn = pool.map(draw, range(min(count, DIFFERENT)), chunksize=50)
    for i in range(count):
        (folder / f"{i // IN_A_FOLDER:04}" / f"{i:07}.jpg").write_bytes(drawn[i % len(drawn)])


def draw(i: int) -> bytes:
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(i)
    size = tuple(int(side) for side in rng.integers(SIDES[0], SIDES[1] + 1, size=2))
    image = Image.fromarray(rng.integers(256, size=(6, 6, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)
    pixels = np.asarray(image).astype(np.int16) + rng.integers(-8, 9, size=(size[1], size[0], 1))
    out = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(out, "JPEG", quality=85)
    return out.getvalue()


def command(what: str, images: Path, size: int) -> list[str]:
    return [sys.executable, __file__, "--size", str(size), "--work", what, str(images)]


def environment(place: Path, threads: int) -> dict[str, str]:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return os.environ | {"XDG_CACHE_HOME": str(place), "OMP_NUM_THREADS": str(threads), "PYTHONPATH": path}


def watched(command: list[str], place: Path, threads: int) -> dict[str, Any]:
    """The output of a process, and the peak memory of it and its children together."""
    with subprocess.Popen(command, env=environment(place, threads), stdout=subprocess.PIPE, text=True) as process:
        resident = own = 0
        while process.poll() is None:
            sizes = [memory_of(pid, "VmRSS", "RssAnon") for pid in family(process.pid)]
            resident, own = max(resident, sum(r for r, _ in sizes)), max(own, sum(o for _, o in sizes))
            time.sleep(INTERVAL)
        if process.returncode or process.stdout is None:
            sys.exit(f"{command} failed")
        return json.loads(process.stdout.read()) | {"resident": resident, "own": own}


def family(pid: int) -> list[int]:
    """A process and all its descendants."""
    try:
        tasks = Path(f"/proc/{pid}/task").iterdir()
        children = [int(child) for task in tasks for child in (task / "children").read_text().split()]
    except OSError:
        return []
    return [pid, *(below for child in children for below in family(child))]


def memory(found: dict[str, Any]) -> str:
    return f"{found['resident'] / 1e6:,.0f} MB, own {found['own'] / 1e6:,.0f} MB"


def kill(command: list[str], place: Path, count: int) -> int:
    """Kill a conversion after `count` images; returns how many it has noted."""
    with subprocess.Popen(command, env=environment(place, len(os.sched_getaffinity(0)))) as process:
        while (done := noted(place)) < count and process.poll() is None:
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
    return noted(place) or done


def noted(place: Path) -> int:
    journals = (place / "vqvae").glob("*.json.*.partial")
    return sum(journal.read_bytes().count(b"\n") - 1 for journal in journals)


def caches(place: Path) -> list[Path]:
    return sorted((place / "vqvae").glob("*.npy"))


# the work of a process


def load(images: Path, size: int) -> dict[str, Any]:
    from vqvae import data

    begun = time.perf_counter()
    dataset = data.load("folder", data_dir=images, image_size=size)
    seconds = time.perf_counter() - begun
    some = slice(None, None, max(1, len(dataset.train.images) // 2000))
    times = os.times()
    cpu = times.user + times.system + times.children_user + times.children_system
    return {"seconds": seconds, "cpu": cpu, "sum": int(dataset.train.images[some].long().sum())}


def facts(images: Path, size: int) -> dict[str, Any]:
    """Seconds to read what a run needs of all images, or of half of them, before its first step."""
    from vqvae import data
    from vqvae.data.batches import pixel_variance

    dataset, times = data.load("folder", data_dir=images, image_size=size), [time.perf_counter()]
    for work in (dataset.fingerprint, lambda: pixel_variance(dataset.train.images)):
        work()
        times.append(time.perf_counter())
    return {"fingerprint": times[1] - times[0], "variance": times[2] - times[1]}


def read(shuffle: str, size: int) -> dict[str, Any]:
    """Seconds to read the batches of an epoch from a cache of which the system has no page in memory."""
    import torch

    from vqvae.data.batches import batch_indices, block_of, read_ahead
    from vqvae.data.cache_files import caches

    (array,) = (file for file in caches()[0].files if file.suffix == ".npy")
    with open(array, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    import numpy as np

    rows = torch.from_numpy(np.load(array, mmap_mode="c"))
    block = block_of(rows, shuffle)  # type: ignore[arg-type]
    order = batch_indices(len(rows), BATCH, seed=0, epoch=0, block=block)
    before, begun = read_bytes(), time.perf_counter()
    for index in read_ahead(order, rows, block):
        rows.index_select(0, index)
    seconds = time.perf_counter() - begun
    places = len(rows) if block is None else -(-len(rows) // block)
    return {"seconds": seconds, "read": read_bytes() - before, "places": places}


def read_bytes() -> int:
    return int(Path("/proc/self/io").read_text().split("read_bytes: ")[1].split()[0])


WORK = {
    "load": load,
    "facts": facts,
    "full": lambda images, size: read("full", size),
    "blocks": lambda images, size: read("blocks", size),
}


if __name__ == "__main__":
    main()
