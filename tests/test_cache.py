"""Caches of images: listed, removed, and kept while a process uses them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.helpers import ROOT
from vqvae.__main__ import main
from vqvae.data import cache_files, load
from vqvae.data.cache_files import cache_folder, caches, remove
from vqvae.data.containers import Npz
from vqvae.errors import UserError


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


def make_cache(name: str, size: int | str = 8) -> None:
    np.savez(name, images=np.random.default_rng(len(name)).integers(256, size=(6, 8, 8), dtype=np.uint8))
    load("npz", data_dir=name, image_size=size)


def test_caches_are_listed_with_size_age_images_and_source(capsys, tmp_path):
    make_cache("a.npz")
    make_cache("b.npz", "8x12")
    old, new = caches()
    assert old.size > 6 * 3 * 8 * 8
    assert old.shape == [6, 3, 8, 8]
    assert (new.kind, new.source) == ("npz", str(tmp_path / "b.npz"))
    for file in old.files:
        os.utime(file, (new.changed - 3 * 86400 - 60,) * 2)
    assert main(["cache"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["size", "age", "images", "source"]
    assert lines[1].split() == ["0.0", "MB", "3", "days", "6,", "3x8x8", "crop", "npz", str(tmp_path / "a.npz")]
    assert "new  6, 3x8x12" in lines[2]
    assert lines[3].startswith("2 caches, 0.0 MB, in ")


def test_an_array_looks_older_than_its_cache_so_that_any_later_write_changes_its_time():
    make_cache("a.npz")
    (cache,) = caches()
    index, array = cache.files
    assert index.stat().st_mtime - array.stat().st_mtime > 5
    assert cache.changed == index.stat().st_mtime
    assert cache.done is None
    array.unlink()
    assert caches()[0].done == 0


def test_an_array_of_another_length_is_made_again_whatever_its_time():
    make_cache("a.npz")
    (array,) = cache_folder().glob("*.npy")
    before, raw = array.stat(), array.read_bytes()
    for other in (raw[:-1], raw + b"x"):
        array.write_bytes(other)
        os.utime(array, ns=(before.st_atime_ns, before.st_mtime_ns))
        load("npz", data_dir="a.npz", image_size=8)
        assert array.read_bytes() == raw


def test_a_damaged_array_is_not_taken_for_whole_when_it_is_read_again():
    make_cache("a.npz")
    (array,) = cache_folder().glob("*.npy")
    content = cache_files.read_index(array.with_suffix(".json"))
    raw = bytearray(array.read_bytes())
    raw[-1] ^= 1
    array.write_bytes(raw)
    for _ in range(2):
        assert not cache_files.is_whole(array, content)


def test_a_file_that_a_conversion_renames_meanwhile_is_not_listed(monkeypatch):
    make_cache("a.npz")
    (cache,) = caches()
    for name in ("1" * 24, cache.files[0].stem):
        for ending in ("json", "npy"):
            (cache_folder() / f"{name}.{ending}.123.partial").touch()
    listed = cache_files._cache_files

    def late():
        found = [*listed()]
        for path in cache_folder().glob("*.partial"):
            path.unlink()
        return iter(found)

    monkeypatch.setattr(cache_files, "_cache_files", late)
    assert caches() == [cache]


def test_without_caches_there_is_nothing_to_list_or_remove(capsys):
    assert main(["cache"]) == 0
    assert main(["cache", "--clear"]) == 0
    assert capsys.readouterr().out.startswith("0 caches")


def test_the_caches_of_one_source_are_removed(tmp_path):
    make_cache("a.npz")
    make_cache("a.npz", 12)
    make_cache("b.npz")
    assert main(["cache", "--clear", "a.npz"]) == 0
    (left,) = caches()
    assert left.source == str(tmp_path / "b.npz")
    assert main(["cache", "--clear", str(left.files[0])]) == 0
    assert caches() == []


def test_caches_are_in_the_home_folder_unless_another_one_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
    assert cache_folder() == tmp_path / "cache" / "vqvae"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert cache_folder() == tmp_path / "home" / ".cache" / "vqvae"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == tmp_path / "home" / ".cache" / "vqvae"

    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    with pytest.raises(UserError, match="no place for the cache of images .*; set XDG_CACHE_HOME"):
        cache_folder()


def test_only_caches_are_removed(tmp_path, capsys):
    make_cache("a.npz")
    (cache,) = caches()
    key = cache.files[0].stem
    part = cache_folder() / f"{key}.npy.123.partial"
    part.write_bytes(b"x")
    others = [cache_folder() / name for name in ("notes.txt", "0.npy", f"{key}.npy.bak", f"{key}.pt")]
    for path in others:
        path.write_text("kept")
    (cache_folder() / f"{'0' * 24}.npy").mkdir()
    (tmp_path / "elsewhere").write_text("kept")
    (cache_folder() / f"{'1' * 24}.npy").symlink_to(tmp_path / "elsewhere")
    assert main(["cache", "--clear"]) == 0
    assert "removed 1 cache," in capsys.readouterr().out
    assert not part.exists()
    assert len(list(cache_folder().iterdir())) == len(others) + 2
    assert all(path.read_text() == "kept" for path in [*others, tmp_path / "elsewhere"])
    assert main(["cache", "--clear", str(others[0])]) == 2
    assert "has no cache; see vqvae cache" in capsys.readouterr().err


def test_an_array_that_cannot_be_removed_keeps_its_index(capsys, monkeypatch):
    unlink = Path.unlink

    def refuse(path, missing_ok=False):
        if path.suffix == ".npy":
            raise PermissionError(13, "Permission denied", str(path))
        unlink(path, missing_ok)

    make_cache("a.npz")
    monkeypatch.setattr(cache_files, "WINDOWS", False)
    monkeypatch.setattr(Path, "unlink", refuse)
    assert main(["cache", "--clear"]) == 2
    assert ".npy: cannot be removed (Permission denied); change its permissions\n" in capsys.readouterr().err
    assert caches()[0].kind == "npz"


def test_a_damaged_index_is_listed_by_its_name_and_removed(capsys):
    make_cache("a.npz")
    (cache,) = caches()
    (index,) = (file for file in cache.files if file.suffix == ".json")
    strange: list[dict] = [{"kind": 1, "source": "a", "shape": [1, 1, 8, 8]}]
    strange.append({"kind": "npz", "source": [], "shape": [1, 1, 8, 8]})
    strange += [{"kind": "npz", "source": "a", "shape": shape} for shape in ([1, 2, 3, "x"], [1, 2, 3, None])]
    strange += [{"kind": "npz", "source": "a", "shape": [1, 1, 8, 8], "part": part} for part in ("ab", [0, "x"], 1)]
    strange.append({"kind": "npz", "source": "a", "shape": [1, 1, 8, 8], "resize": 1})
    for content in (b"[" * 10_000, b"\xff", b"{}", *(json.dumps(entry).encode() for entry in strange)):
        index.write_bytes(content)
        assert main(["cache"]) == 0
        assert f"unknown: {index.name}" in capsys.readouterr().out
    assert main(["cache", "--clear"]) == 0
    assert caches() == []


USER = """
import sys
from vqvae.data import load
data = load("npz", data_dir="a.npz", image_size=8)
print("mapped", flush=True)
sys.stdin.read()
print(int(data.train.images.sum()))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows removes no file that is open")
def test_a_cache_that_a_process_uses_stays(capsys):
    make_cache("a.npz")
    make_cache("b.npz")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    user = [sys.executable, "-c", USER]
    with subprocess.Popen(user, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True) as process:
        assert process.stdout.readline() == "mapped\n"
        assert main(["cache", "--clear"]) == 0
        out = capsys.readouterr().out
        assert "removed 1 cache," in out
        assert "in use by a running process, not removed: 1 cache" in out
        (left,) = caches()
        assert Path(left.source).name == "a.npz"
        process.communicate("")
    assert process.returncode == 0
    assert remove(left)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows removes no file that is open")
def test_a_cache_that_is_being_written_stays(monkeypatch):
    make_cache("a.npz")
    images, seen = Npz.images, []

    def clear_meanwhile(self, chosen, shape):
        seen.append([remove(found) for found in caches() if any(".partial" in file.name for file in found.files)])
        yield from images(self, chosen, shape)

    monkeypatch.setattr(Npz, "images", clear_meanwhile)
    make_cache("b.npz")
    assert seen == [[False]]
    assert len(caches()) == 2
