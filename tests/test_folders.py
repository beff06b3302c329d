"""Large folders of images: conversion by processes, after a kill and after changes of files; parts of data."""

import errno
import functools
import json
import os
import runpy
import signal
import subprocess
import sys
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import vqvae
from tests.helpers import ROOT, run_train
from vqvae import checkpoint, workers
from vqvae.__main__ import main
from vqvae.data import Dataset, cache, image_folder, load
from vqvae.data.cache_files import cache_folder, caches
from vqvae.data.image_folder import cached_images
from vqvae.decoding import read_image
from vqvae.errors import OptionError

PAIR = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def tree(tmp_path):
    """A folder of two classes with 40 images, each of a different color, and a file that is not an image."""
    for i in range(40):
        write(tmp_path / "tree" / "ab"[i % 2] / f"{i:02}.png", i)
    (tmp_path / "tree" / "a" / "broken.png").write_bytes(b"x")
    return tmp_path / "tree"


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT)}


def write(path: Path, red: int, seconds: int = 10**9) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (red, 0, 0)).save(path)
    os.utime(path, (seconds, seconds))


@pytest.fixture
def opened(monkeypatch):
    """Counts the names of the image files that are read."""
    counts = Counter()

    def read(path, *shape):
        counts[path.name] += 1
        return read_image(path, *shape)

    monkeypatch.setattr(image_folder, "read_image", read)
    return counts


def reds(tree: Path) -> dict[str, int]:
    """The red value of each image in the cache, by its name."""
    found = cached_images(tree, 8, 3)
    assert (found.images == found.images[:, :, :1, :1]).all()
    return dict(zip(found.paths, found.images[:, 0, 0, 0].tolist(), strict=True))


# processes


def test_processes_read_the_images_that_one_reads(tree, tmp_path, monkeypatch):
    alone = cached_images(tree, 8, 3)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    monkeypatch.setattr(cache, "FEW", 0)
    monkeypatch.setattr(cache, "cores", lambda: 2)
    together = cached_images(tree, 8, 3)
    assert torch.equal(together.images, alone.images)
    assert together[1:] == alone[1:]
    assert together.unreadable == {"a/broken.png": "no image in PNG, JPEG, WEBP, BMP, GIF, TIFF"}


def test_a_decoder_that_ends_its_process_has_an_image_that_cannot_be_read():
    good = functools.partial(np.full, 3, 7, np.uint8)
    reads = [good] * 20 + [functools.partial(os._exit, 9)] + [good] * 3
    found = list(workers.read_all(reads, 2))
    assert found[20] == "its decoder ended the process (exit code 9)"
    assert [result for i, result in enumerate(found) if i != 20] == [bytes([7] * 3)] * 23


def test_processes_that_read_images_import_no_torch():
    read = functools.partial(eval, "__import__('numpy').array(['torch' in __import__('sys').modules])")
    assert list(workers.read_all([read] * 2, 2)) == [b"\0"] * 2


def test_processes_end_where_their_images_are_not_wanted_any_more(monkeypatch):
    started, start = [], subprocess.Popen

    def note(*command, **more):
        started.append(start(*command, **more))
        return started[-1]

    monkeypatch.setattr(subprocess, "Popen", note)
    results = workers.read_all([functools.partial(np.zeros, 1)] * 100, 2)
    next(results)
    results.close()
    assert started
    assert all(process.poll() is not None for process in started)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not tell which cores a process may use")
def test_as_many_processes_are_used_as_there_are_cores_for_them(monkeypatch):
    for variable in ("OMP_NUM_THREADS", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)))
    assert workers.cores() == 6
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert workers.cores() == 2
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")  # torchrun's other process waits
    assert workers.cores() == 4
    monkeypatch.setenv("OMP_NUM_THREADS", "9")
    assert workers.cores() == 6


def test_a_script_without_a_main_guard_can_convert_a_folder(tree, tmp_path):
    script = "from vqvae.data import cache, load\ncache.FEW, cache.cores = 0, lambda: 2\n"
    script += f"print(len(load('folder', data_dir={str(tree)!r}, image_size=8).train.images))\n"
    (tmp_path / "script.py").write_text(script)
    found = subprocess.run([sys.executable, "script.py"], env=environment(), capture_output=True, text=True, check=True)
    assert found.stdout == f"{len(load('folder', data_dir=tree, image_size=8).train.images)}\n"


# files that change


def test_only_files_that_are_new_or_changed_are_converted(tree, opened):
    before = reds(tree)
    assert sum(opened.values()) == 41
    opened.clear()
    write(tree / "a" / "new.png", 99)
    assert reds(tree) == before | {"a/new.png": 99}
    assert opened == {"new.png": 1}
    opened.clear()
    write(tree / "a" / "00.png", 77, seconds=10**9 + 60)
    (tree / "b" / "01.png").unlink()
    (tree / "b" / "03.png").rename(tree / "a" / "moved.png")
    changed = before | {"a/new.png": 99, "a/00.png": 77, "a/moved.png": 3}
    assert reds(tree) == {name: red for name, red in changed.items() if name not in ("b/01.png", "b/03.png")}
    assert opened == {"00.png": 1, "moved.png": 1}
    opened.clear()
    (tree / "a" / "broken.png").unlink()
    reds(tree)
    assert not opened
    assert len(caches()) == 1  # the last one replaces the others


def test_another_size_is_another_cache(tree):
    for size in (8, 4, 8):
        cached_images(tree, size, 3)
    assert len(caches()) == 2


@pytest.mark.skipif(sys.platform == "win32", reason="Windows removes no file that is open")
def test_a_cache_that_is_in_use_stays_when_a_file_is_added(tree):
    mapped = cached_images(tree, 8, 3).images
    expected = mapped.clone()
    write(tree / "new.png", 99)
    assert len(reds(tree)) == 41
    assert len(caches()) == 2
    assert torch.equal(mapped, expected)
    del mapped


def test_a_cache_that_may_be_in_use_is_removed_only_on_demand(tree, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(pytest.importorskip("fcntl"), "flock", no_locks)
    cached_images(tree, 8, 3)
    write(tree / "new.png", 99)
    assert len(reds(tree)) == 41
    assert len(caches()) == 2
    assert main(["cache", "--clear"]) == 0
    assert caches() == []


def test_a_start_reads_the_array_only_if_it_was_written_to(tree, monkeypatch):
    cached_images(tree, 8, 3)
    (array,) = cache_folder().glob("*.npy")
    times = array.stat().st_mtime_ns
    read = Counter()
    crc32 = cache.zlib.crc32
    monkeypatch.setattr(cache.zlib, "crc32", lambda data, *start: read.update([len(data)]) or crc32(data, *start))
    cached_images(tree, 8, 3)
    assert read[3 * 8 * 8] == 0
    array.touch()
    cached_images(tree, 8, 3)
    assert read.pop(3 * 8 * 8) >= 41
    assert array.stat().st_mtime_ns == times  # known as whole from now on
    cached_images(tree, 8, 3)
    assert read[3 * 8 * 8] == 0


def test_rescan_finds_changes_that_sizes_and_times_do_not_tell(tree, opened):
    for i in range(3):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(tree / f"{i}.bmp")
        os.utime(tree / f"{i}.bmp", (10**9, 10**9))
    reds(tree)
    Image.new("RGB", (8, 8), (250, 0, 0)).save(tree / "1.bmp")
    os.utime(tree / "1.bmp", (10**9, 10**9))
    assert reds(tree)["1.bmp"] == 1
    opened.clear()
    load("folder", data_dir=tree, image_size=8, rescan=True)
    assert sum(opened.values()) == 44
    assert reds(tree)["1.bmp"] == 250
    with pytest.raises(OptionError, match="rescan.* has no effect on the data set digits, because it has no cache"):
        load("digits", rescan=True)


# unfinished conversions


def interrupted(tree: Path, monkeypatch, after: int) -> None:
    """A conversion that is interrupted after so many images; it notes its progress every four images."""
    left = [after]

    def read(path, *shape):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return read_image(path, *shape)

    with monkeypatch.context() as patch:
        patch.setattr(image_folder, "read_image", read)
        patch.setattr(cache, "NOTED", 4)
        with pytest.raises(KeyboardInterrupt):
            cached_images(tree, 8, 3)


def test_an_interrupted_conversion_goes_on_where_it_was(tree, tmp_path, monkeypatch, opened, capsys):
    interrupted(tree, monkeypatch, after=22)
    assert main(["cache"]) == 0
    line = capsys.readouterr().out.splitlines()[1]
    assert "unfinished: 20 of 41, 3x8x8" in line
    assert line.endswith(f"folder {tree}")
    interrupted(tree, monkeypatch, after=10)
    (unfinished,) = caches()
    assert unfinished.done == 28
    assert reds(tree) == {f"{'ab'[i % 2]}/{i:02}.png": i for i in range(40)}
    assert sum(opened.values()) == 13
    assert [file.suffix for file in sorted(cache_folder().iterdir())] == [".json", ".npy"]


def test_an_unfinished_cache_serves_a_folder_that_changed_since_and_is_removed(tree, monkeypatch, opened):
    interrupted(tree, monkeypatch, after=20)
    write(tree / "new.png", 99)
    assert len(reds(tree)) == 41
    assert sum(opened.values()) == 22
    assert len(caches()) == 1


def test_images_of_an_unfinished_cache_that_a_power_cut_damaged_are_converted_again(tree, monkeypatch, opened):
    interrupted(tree, monkeypatch, after=20)
    (array,) = cache_folder().glob("*.npy.*")
    (journal,) = cache_folder().glob("*.json.*")
    with open(array, "r+b") as file:
        file.seek(-3 * 8 * 8, os.SEEK_END)
        file.write(bytes([1] * 5))
    journal.write_bytes(journal.read_bytes()[:-10] + b"\xff")  # its last line
    assert reds(tree) == {f"{'ab'[i % 2]}/{i:02}.png": i for i in range(40)}
    assert 22 <= sum(opened.values()) <= 23


@pytest.mark.parametrize("row", [-1, 1.5, "1", 10**9, 10**30])
def test_a_journal_of_rows_that_do_not_exist_is_left_out(tree, monkeypatch, opened, row):
    interrupted(tree, monkeypatch, after=20)
    (journal,) = cache_folder().glob("*.json.*")
    about, *notes = map(json.loads, journal.read_text().splitlines())
    assert len(notes) == 20
    changed = [about, *([name, stamp, row, zlib.crc32(b""), None] for name, stamp, *_ in notes)]
    journal.write_text("".join(f"{json.dumps(entry)}\n" for entry in changed))
    assert reds(tree) == {f"{'ab'[i % 2]}/{i:02}.png": i for i in range(40)}
    assert sum(opened.values()) == 41


def test_unfinished_caches_are_removed_on_demand(tree, monkeypatch):
    interrupted(tree, monkeypatch, after=20)
    assert main(["cache", "--clear", str(tree)]) == 0
    assert list(cache_folder().iterdir()) == []


KILLED = """
import os, signal, sys
from vqvae.data import cache, image_folder, load
cache.NOTED, left, read = 4, [int(sys.argv[2])], image_folder.read_image
def counted(*arguments):
    left[0] -= 1
    if not left[0]:
        os.kill(os.getpid(), signal.SIGKILL)
    return read(*arguments)
image_folder.read_image = counted
print(len(load("folder", data_dir=sys.argv[1], image_size=8).train.images))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")
def test_a_killed_conversion_leaves_no_finished_cache_and_is_continued(tree, opened):
    killed = subprocess.run([sys.executable, "-c", KILLED, str(tree), "23"], env=environment(), check=False)
    assert killed.returncode == -signal.SIGKILL
    (unfinished,) = caches()
    assert unfinished.done == 20
    (partial,) = cache_folder().glob("*.npy.*")
    file = partial.stat().st_ino
    assert len(cached_images(tree, 8, 3).images) == 40
    assert sum(opened.values()) == 21
    (array,) = cache_folder().glob("*.npy")
    assert array.stat().st_ino == file  # it is continued, not copied


def test_two_processes_that_convert_one_folder_at_once_both_get_it(tree):
    both = [
        subprocess.Popen([sys.executable, "-c", KILLED, str(tree), "99"], env=environment(), stdout=subprocess.PIPE)
        for _ in range(2)
    ]
    printed = {process.communicate()[0] for process in both}
    assert printed == {f"{len(load('folder', data_dir=tree, image_size=8).train.images)}\n".encode()}
    assert sorted(file.suffix for file in cache_folder().iterdir()) == [".json", ".npy"]


# the order


def test_a_run_in_blocks_is_resumed_bit_for_bit(tmp_path):
    line = ("--dataset", "digits", "--shuffle", "blocks", "--name")
    assert run_train(*line, "whole", "--max-steps", "5") == 0
    assert run_train(*line, "parts", "--max-steps", "2") == 0
    assert run_train("--resume", "logs/parts", "--max-steps", "5", small=False) == 0
    whole, parts = (checkpoint.read(f"logs/{name}") for name in ("whole", "parts"))
    assert whole["config"]["shuffle"] == "blocks"
    for name, value in whole["model"].items():
        assert torch.equal(value, parts["model"][name]), name


# parts


def images_of(data: Dataset) -> dict[str, set[int]]:
    return {name: set(split.images[:, 0, 0, 0].tolist()) for name, split in data.splits.items()}


@pytest.mark.parametrize("validation", [None, 0.2])
@pytest.mark.parametrize("splits", [0, 2, 3])
def test_parts_share_the_training_images_and_have_all_others(tree, splits, validation):
    if splits:
        for folder in ("a", "b"):
            (tree / "train").mkdir(exist_ok=True)
            (tree / folder).rename(tree / "train" / folder)
        for i in range(40, 45):
            write(tree / "test" / "b" / f"{i}.png", i)
    if splits == 3:
        for i in range(46, 52, 2):
            write(tree / "val" / "a" / f"{i}.png", i)
    whole = load("folder", data_dir=tree, image_size=8, validation=validation)
    parts = [load("folder", data_dir=tree, image_size=8, validation=validation, part=(r, 3)) for r in range(3)]
    found, expected = [images_of(part) for part in parts], images_of(whole)
    for name in set(expected) - {"train"}:
        assert all(part[name] == expected[name] for part in found), name
        assert all(torch.equal(getattr(part, name).labels, getattr(whole, name).labels) for part in parts)
    assert sum(len(part["train"]) for part in found) == len(set.union(*(part["train"] for part in found)))
    assert len(expected["train"] - set.union(*(part["train"] for part in found))) <= 2 + 3  # the rest, and the broken
    assert {part.classes for part in parts} == {("a", "b")}
    for part in parts:
        assert torch.equal(part.train.labels, part.train.images[:, 0, 0, 0].long() % 2)
    assert len(caches()) == 4
    assert {tuple(known.part) for known in caches() if known.part} == {(0, 3), (1, 3), (2, 3)}


def test_no_part_has_classes_if_an_image_of_any_part_has_none(tree):
    write(tree / "new.png", 99)
    parts = [load("folder", data_dir=tree, image_size=8, part=(r, 2)) for r in range(2)]
    assert [99 in images_of(part)["train"] | images_of(part)["test"] for part in parts].count(False) == 1
    for part in parts:
        assert part.classes == ()
        assert {*part.train.labels.tolist(), *part.test.labels.tolist()} == {-1}


def test_a_part_replaces_no_cache_of_another(tree):
    for part in ((0, 2), (1, 2), (0, 1), (0, 2)):
        load("folder", data_dir=tree, image_size=8, part=part)
    assert sorted(cache.part or [] for cache in caches()) == [[], [0, 2], [1, 2]]


def test_more_parts_than_training_images_are_refused(tree):
    with pytest.raises(OptionError, match="data_shards=50: leaves no training image of"):
        load("folder", data_dir=tree, image_size=8, part=(0, 50))
    with pytest.raises(OptionError, match="data_shards=2: has no effect on the data set digits"):
        load("digits", part=(0, 2))


def test_parts_need_processes_that_share_them(tree, capsys):
    line = ("--dataset", "folder", "--data-dir", str(tree), "--data-shards", "2")
    assert run_train(*line) == 2
    assert "--data-shards 2: must divide the number of processes, which is 1" in capsys.readouterr().err


LINE = "--dataset folder --data-shards 2 --max-steps 3 --image-size 8 --validation 0.2 --batch-size 8"
LINE += " --hidden 8 --codes 16 --code-dim 4 --device cpu --lr 3e-4 --name parts --data-dir"
PRIOR = (
    "--prior pixelcnn channels=8 blocks=1 head=8 --conditional --checkpoint logs/parts --data-shards 2 --max-steps 3"
)
PRIOR += " --batch-size 7 --device cpu --name prior --data-dir"


def work(folder: str, line: str) -> None:
    """Train with a cache that no other process sees; keep the weights, the examples, and the colors that were seen."""
    from vqvae import training

    rank, seen, take = os.environ["RANK"], [], training.take
    os.environ["XDG_CACHE_HOME"] = str(Path(folder, f"cache{rank}"))

    def noted(tensor, index, device):
        batch = take(tensor, index, device)
        if batch.ndim == 4:
            seen.append(batch[:, 0, 0, 0].tolist())
        return batch

    close = training.Loop.close_epoch

    def closing(self, *arguments):
        found = (seen, self.module.state_dict(), self.step, self.examples.clone(), self.labels)
        torch.save(found, Path(folder, f"{rank}.pt"))
        return close(self, *arguments)

    training.take, training.Loop.close_epoch = noted, closing
    sys.argv = ["train.py", *line.split(), str(Path(folder, "tree"))]
    runpy.run_path(str(ROOT / "train.py"), run_name="__main__")


def test_two_processes_train_on_parts_of_which_each_sees_its_own(tree, tmp_path, monkeypatch):
    def on_both(line: str) -> list[tuple]:
        """The findings of each of two processes, which are to end with the same weights."""
        words = [*PAIR, str(Path(__file__)), str(tmp_path), line]
        found = subprocess.run(words, env=environment(), capture_output=True, text=True, cwd=tmp_path, check=False)
        assert found.returncode == 0, found.stderr
        assert "part 1 of 2 of the training images" in found.stdout
        first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
        assert first[2] == second[2] == 3
        assert all(torch.equal(value, second[1][name]) for name, value in first[1].items())
        return [first, second]

    of_ranks, parts, data = on_both(LINE), [], []
    for rank in range(2):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / f"cache{rank}"))
        (one,) = caches()
        assert one.part == [rank, 2]
        data.append(load("folder", data_dir=tree, image_size=8, validation=0.2, part=(rank, 2)))
        parts.append(images_of(data[-1]))
        assert len(caches()) == 1
    assert not parts[0]["train"] & parts[1]["train"]
    for (seen, *_), part in zip(of_ranks, parts, strict=True):
        assert len([batch for batch in seen if len(batch) == 4]) >= 3
        assert all(set(batch) <= part["train"] for batch in seen)

    count, model = min(len(part.train.images) for part in data), vqvae.load(tmp_path / "logs/parts/checkpoint.pt")
    codes = torch.cat([model.encode(part.train.images[:count]).int() for part in data])
    labels = torch.cat([part.train.labels[:count] for part in data])
    for *_, examples, of_examples in on_both(PRIOR):  # a prior learns from all codes, in batches of any size
        assert torch.equal(examples, codes)
        assert torch.equal(of_examples, labels)


if __name__ == "__main__":
    work(*sys.argv[1:])
