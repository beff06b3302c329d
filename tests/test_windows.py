"""The package does nothing that Windows refuses. Its rules are emulated, because the tests run elsewhere."""

import errno
import gc
import os
import shutil
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from tests.helpers import SMALL
from vqvae import cli, files, runs, tokens
from vqvae.__main__ import dispatch
from vqvae.data import cache, cache_files, load
from vqvae.errors import UserError
from vqvae.runs import Busy, Lock

fcntl = pytest.importorskip("fcntl")
pytestmark = pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")
ABSENT = "fork getuid geteuid getgid mkfifo pread pwrite statvfs O_NONBLOCK sched_getaffinity"


def open_here() -> set[str]:
    """The files that this process has open or mapped."""
    links = []
    for number in os.listdir("/proc/self/fd"):
        try:
            links.append(os.readlink(f"/proc/self/fd/{number}"))
        except OSError:  # of the listing itself
            continue
    return {*links, *(line.split(maxsplit=5)[-1] for line in Path("/proc/self/maps").read_text().splitlines())}


@pytest.fixture
def windows(monkeypatch):
    """Emulate Windows: open files cannot be renamed or removed, folders cannot be opened, Unix modules are missing."""
    if sys.version_info < (3, 11):
        pytest.skip("pathlib and tempfile of Python 3.10 call functions of os that cannot be replaced")
    real = SimpleNamespace(replace=os.replace, rename=os.rename, unlink=os.unlink, rmdir=os.rmdir, open=os.open)

    def refuse_open(*paths):
        if busy := {os.path.realpath(os.fsdecode(path)) for path in paths} & open_here():
            raise PermissionError(errno.EACCES, "The process cannot access the file", busy.pop())

    def replace(source, target, **keywords):
        refuse_open(source, target)
        real.replace(source, target, **keywords)

    def rename(source, target, **keywords):
        if os.path.lexists(target):
            raise FileExistsError(errno.EEXIST, "Cannot create a file when that file already exists")
        replace(source, target, **keywords)

    def unlink(path, **keywords):
        if "dir_fd" not in keywords:
            refuse_open(path)
        real.unlink(path, **keywords)

    def open_file(path, *arguments, **keywords):
        if "dir_fd" not in keywords and os.path.isdir(path):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return real.open(path, *arguments, **keywords)

    monkeypatch.setattr(os, "replace", replace)
    monkeypatch.setattr(os, "rename", rename)
    monkeypatch.setattr(os, "unlink", unlink)
    monkeypatch.setattr(os, "remove", unlink)
    monkeypatch.setattr(os, "open", open_file)
    monkeypatch.setattr(files, "WINDOWS", True)
    monkeypatch.setattr(cache_files, "WINDOWS", True)
    monkeypatch.setattr(cache_files, "fcntl", None)
    monkeypatch.setattr(files, "PAUSES", (0.01, 0.01, 0.01))
    monkeypatch.setattr(runs, "fcntl", None)
    monkeypatch.setattr(runs, "msvcrt", SimpleNamespace(LK_NBLCK=2, locking=locking))
    monkeypatch.setattr(shutil, "_use_fd_functions", False)  # rmtree's way with folders that can be opened
    for name in ABSENT.split():
        monkeypatch.delattr(os, name, raising=False)
    for name in ("SIGALRM", "SIGKILL", "setitimer"):
        monkeypatch.delattr(signal, name)
    monkeypatch.setitem(sys.modules, "fcntl", None)
    monkeypatch.setitem(sys.modules, "pwd", None)


def locking(file: int, mode: int, count: int) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise PermissionError(errno.EACCES, "Permission denied") from None


def write_images(*names: str) -> None:
    for number, name in enumerate(names):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (number, 9, 9)).save(name)


@pytest.mark.filterwarnings("ignore")
def test_every_command_runs_on_own_images(windows, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_images(*(f"in/{name}/{i}.png" for name in ("cats", "dogs") for i in range(30)))
    Path("in/bad.png").write_bytes(b"x")
    small = " ".join(SMALL)
    for line in (
        f"train {small} --dataset folder --data-dir in --epochs 1 --name run",
        "train --resume logs/run --epochs 2",
        "train --checkpoint logs/run --prior unigram --name prior --epochs 1 --batch-size 20 --device cpu",
        "train --evaluate --checkpoint logs/run --iw-samples 2",
        "visualize --checkpoint logs/run --only original.png training_animation.gif",
        "encode --checkpoint logs/run --input in --output codes.npz",
        "encode --checkpoint logs/run --dataset folder --data-dir in --output more.npz",
        "decode codes.npz --checkpoint logs/run --output out",
    ):
        assert cli.run(dispatch, line.split()) == 0, capsys.readouterr().err
    assert len(list(Path("out").rglob("*.png"))) == 60
    assert not list(tmp_path.rglob("*.partial"))


def test_a_damaged_cache_that_is_mapped_is_one_line(windows, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    write_images("in/a.png", "in/b.png")
    (tmp_path / "in" / "c.png").write_bytes(b"x")
    first = load("folder", data_dir="in", image_size=8)
    (index,) = (tmp_path / "cache").rglob("*.json")
    index.write_text("{}")
    second = load("folder", data_dir="in", image_size=8)  # the array is whole
    assert second.train.fingerprint() == first.train.fingerprint()
    (array,) = (tmp_path / "cache").rglob("*.npy")
    with array.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"x")
        file.seek(-8 * 8 * 3 - 1, os.SEEK_END)
        file.write(b"xx")
    index.write_text("{}")
    with pytest.raises(UserError, match="npy: cannot be written .*; close the programs that have it open"):
        load("folder", data_dir="in", image_size=8)
    del first, second
    gc.collect()
    assert len(load("folder", data_dir="in", image_size=8).train.images) == 1


def test_a_cache_that_a_faster_process_made_and_maps_is_used(windows, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    write_images("in/a.png", "in/b.png")
    convert, faster = cache._convert, []

    def overtaken(*arguments):
        monkeypatch.setattr(cache, "_convert", convert)
        faster.append(load("folder", data_dir="in", image_size=8))
        return convert(*arguments)

    monkeypatch.setattr(cache, "_convert", overtaken)
    data = load("folder", data_dir="in", image_size=8)
    assert data.train.fingerprint() == faster[0].train.fingerprint()
    assert not list(tmp_path.rglob("*.partial"))


def test_a_file_that_another_program_reads_for_a_moment_is_replaced(windows, tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(b"old")
    reader = open(path, "rb")  # noqa: SIM115
    monkeypatch.setattr(files.time, "sleep", lambda seconds: reader.close())
    files.write_text(path, "new")
    assert path.read_bytes() == b"new"
    with open(path, "rb"):
        monkeypatch.setattr(files.time, "sleep", lambda seconds: None)
        with pytest.raises(files.NotWritten, match="close the programs that have it open, or name another place"):
            files.write_text(path, "newer")
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_a_run_has_one_writer_whose_lock_is_removed_with_the_folder(windows, tmp_path):
    with Lock() as lock:
        runs.claim(tmp_path / "logs" / "run", lock)
        with Lock() as other, pytest.raises(Busy, match="another process writes this run"):
            other.take(tmp_path / "logs" / "run")
    assert not list((tmp_path / "logs").iterdir())
    with Lock() as lock:
        runs.claim(tmp_path / "logs" / "run", lock)
        lock.keep()
        with Lock() as other, pytest.raises(Busy, match=f"another process .{os.getpid()} on .* writes this run"):
            other.take(tmp_path / "logs" / "run")
    with Lock() as lock:
        lock.take(tmp_path / "logs" / "run")


def test_events_that_tensorboard_has_open_keep_their_name(windows, tmp_path):
    later = tmp_path / f"{runs.EVENTS}9999999999.host"
    later.touch()
    with open(later, "rb"):
        runs.order_events(tmp_path)
        assert later.exists()
    runs.order_events(tmp_path)
    assert not later.exists()


@pytest.mark.parametrize(
    "name",
    [
        "con.png",
        "a/NUL.png",
        "COM1.tar.png",
        "aux",
        "a:b.png",
        "what?.png",
        "a./b.png",
        "a /b.png",
        'q".png',
        "a\nb.png",
    ],
)
def test_names_that_windows_does_not_allow_are_not_decoded_there(name):
    assert not tokens._possible(name, windows=True)
    assert tokens._possible(name, windows=False)


@pytest.mark.parametrize("name", ["cone.png", "a/b c.png", "com.png", "lpt10.png", "猫.png", "a.b.png", "'$x'.png"])
def test_all_other_names_are_decoded_on_windows(name):
    assert tokens._possible(name, windows=True)


def test_ctrl_c_ends_a_command_with_130(windows, monkeypatch, capsys):
    monkeypatch.setattr(sys, "platform", "win32")
    assert cli.run(lambda argv: signal.raise_signal(signal.SIGINT), []) == 130
    assert capsys.readouterr().err == "interrupted\n"
