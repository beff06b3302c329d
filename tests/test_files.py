"""An output is whole or absent, and nothing that exists is lost."""

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.helpers import ROOT, files_up_to
from vqvae import cli
from vqvae.errors import OptionError, UserError
from vqvae.files import (
    NotWritten,
    append,
    cannot_write,
    claim_empty,
    emptied_if_not_written,
    failed_line,
    make_folder,
    whole_file,
    write_json,
    write_text,
)


def test_a_file_appears_with_its_folders_when_it_is_complete(tmp_path):
    path = tmp_path / "new" / "newer" / "codes.bin"
    with whole_file(path) as file:
        file.write(b"one")
        assert not path.exists()
    assert path.read_bytes() == b"one"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.skipif(os.name == "nt", reason="Windows opens no folders")
def test_a_file_is_on_the_disk_before_it_takes_its_name_and_the_name_afterwards(tmp_path, monkeypatch):
    events, replace = [], os.replace

    def fsync(handle: int) -> None:
        about = os.fstat(handle)
        events.append("the folder" if stat.S_ISDIR(about.st_mode) else f"{about.st_size} bytes")

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", lambda *paths: (events.append("the name"), replace(*paths)))
    with whole_file(tmp_path / "codes.bin") as file:
        file.write(b"12345")
    assert events == ["5 bytes", "the name", "the folder"]


@pytest.mark.parametrize("problem", [ValueError("stop"), KeyboardInterrupt()])
def test_an_interrupted_file_leaves_the_old_one_and_nothing_else(tmp_path, problem):
    path = tmp_path / "codes.bin"
    path.write_bytes(b"old")
    with pytest.raises(type(problem)), whole_file(path) as file:  # noqa: PT012, the error leaves the block half-way
        file.write(b"half")
        raise problem
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", ["file/codes.bin", "x" * 300])
def test_a_name_that_cannot_be_written_is_refused_before_the_work(tmp_path, name):
    (tmp_path / "file").touch()
    worked = False
    with pytest.raises(UserError, match="cannot be written .*; name another place"), whole_file(tmp_path / name):
        worked = True
    assert not worked


def test_a_folder_of_that_name_is_refused_and_kept(tmp_path):
    path = tmp_path / "codes.bin"
    (path / "inside").mkdir(parents=True)
    with pytest.raises(UserError, match="codes.bin: cannot be written"):
        write_text(path, "text")
    assert list(tmp_path.iterdir()) == [path]
    assert list(path.iterdir()) == [path / "inside"]


def test_text_is_written_as_utf_8(tmp_path):
    write_text(tmp_path / "text.txt", "±1\n")
    assert (tmp_path / "text.txt").read_bytes() == b"\xc2\xb11\n"


def test_json_is_indented_and_ends_with_a_newline(tmp_path):
    write_json(tmp_path / "table.json", {"a": [1, 2.5, None], "b": "±"})
    text = (tmp_path / "table.json").read_text()
    assert json.loads(text) == {"a": [1, 2.5, None], "b": "±"}
    assert text.startswith('{\n  "a"')
    assert text.endswith("}\n")


def test_a_folder_is_made_and_left_empty(tmp_path):
    folder = tmp_path / "a" / "b"
    assert make_folder(folder, "log_dir") == folder
    assert make_folder(folder, "log_dir") == folder
    assert list(folder.iterdir()) == []


def test_a_folder_that_cannot_be_made_names_the_option_that_chose_it(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OptionError) as caught:
        make_folder(tmp_path / "file" / "logs", "log_dir")
    assert caught.value.option == "log_dir"
    assert caught.value.value == tmp_path / "file" / "logs"
    assert caught.value.problem.startswith("cannot write there (")


def test_only_an_empty_folder_is_claimed(tmp_path):
    assert claim_empty(tmp_path / "new").is_dir()
    assert claim_empty(tmp_path / "new").is_dir()
    (tmp_path / "new" / "file").touch()
    with pytest.raises(UserError, match="new: is not empty, and nothing is overwritten; name a new folder"):
        claim_empty(tmp_path / "new")
    with pytest.raises(UserError, match="file: cannot be written"):
        claim_empty(tmp_path / "new" / "file")


def test_the_reason_why_nothing_is_written_is_one_line(tmp_path):
    assert str(cannot_write(tmp_path, OSError("full\ndisk"))) == (
        f"{tmp_path}: cannot be written (full disk); name another place"
    )


FULL = pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")


@pytest.mark.parametrize("size", [0, 1000, 9000])
def test_a_file_that_finds_no_room_leaves_the_old_one_and_nothing_else(tmp_path, size):
    path = tmp_path / "codes.npz"
    path.write_bytes(b"old")
    with files_up_to(size), pytest.raises(NotWritten) as caught, whole_file(path) as file:
        np.savez(file, codes=np.zeros(10_000))
    assert str(caught.value) == (f"{path}: cannot be written (File too large); free some space, or name another place")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("size", [0, 500, 5000, 30_000])
def test_torch_says_that_a_checkpoint_finds_no_room(tmp_path, size):
    with files_up_to(size), pytest.raises(NotWritten, match="File too large"), whole_file(tmp_path / "a.pt") as file:
        torch.save({"weights": torch.zeros(10_000)}, file)
    assert list(tmp_path.iterdir()) == []


def test_an_error_of_another_file_is_not_an_error_of_writing(tmp_path):
    with pytest.raises(FileNotFoundError) as caught, whole_file(tmp_path / "codes.bin"):
        (tmp_path / "missing").read_text()
    assert caught.value.filename == str(tmp_path / "missing")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_that_name_is_refused_before_the_work(tmp_path):
    worked = False
    with pytest.raises(NotWritten, match="cannot be written .Is a directory."), whole_file(tmp_path):
        worked = True
    assert not worked


def test_a_line_is_appended_whole_or_not_at_all(tmp_path):
    path = tmp_path / "metrics.jsonl"
    append(path, "one\n")
    with files_up_to(7), pytest.raises(NotWritten, match="metrics.jsonl: cannot be written"):
        append(path, "two and more\n")
    assert path.read_text() == "one\n"
    append(path, "±\n")
    assert path.read_bytes() == b"one\n\xc2\xb1\n"


@pytest.mark.parametrize("problem", [KeyboardInterrupt(), OSError(28, "full"), NotWritten("full")])
def test_a_folder_is_empty_again_if_a_file_in_it_cannot_be_written(tmp_path, problem):
    with pytest.raises(type(problem)), emptied_if_not_written(tmp_path):  # noqa: PT012, the error leaves the block
        (tmp_path / "folder").mkdir()
        (tmp_path / "folder" / "file").touch()
        (tmp_path / "file").touch()
        raise problem
    assert list(tmp_path.iterdir()) == []


def test_a_folder_keeps_its_files_if_the_model_is_refused(tmp_path):
    with pytest.raises(UserError), emptied_if_not_written(tmp_path):  # noqa: PT012
        (tmp_path / "file").touch()
        raise UserError("no such model")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("problem", "line"),
    [
        (OSError(28, "No space", "a"), "a: cannot be written (No space); free some space, or name another place"),
        (OSError(30, "Read-only", "a"), "a: cannot be written (Read-only); name another place"),
        (OSError(13, "Permission denied", b"a"), "a: cannot be read or written (Permission denied)"),
        (OSError(18, "Cross-device", "a", None, "b"), "a -> b: cannot be read or written (Cross-device)"),
        (OSError("odd"), "the output or a file: cannot be read or written (odd)"),
    ],
)
def test_an_error_of_the_system_names_file_and_reason(problem, line):
    assert failed_line(problem) == line


def test_a_command_prints_an_error_of_the_system_in_one_line(capsys, tmp_path):
    def main(argv):
        return len((tmp_path / "missing").read_text())

    assert cli.run(main, []) == 2
    found = f"error: {tmp_path / 'missing'}: cannot be read or written (No such file or directory)\n"
    assert capsys.readouterr().err == found


def command(*words, **keywords):
    """Run `vqvae` in a process of its own."""
    return subprocess.Popen([sys.executable, "-m", "vqvae", *words], cwd=ROOT, stderr=subprocess.PIPE, **keywords)


@FULL
@pytest.mark.parametrize("words", [["--version"], ["--help"], ["train", "--help"], ["train", "--list", "presets"]])
def test_an_output_on_a_full_disk_is_one_line(words):
    with open("/dev/full", "w") as full, command(*words, stdout=full) as process:
        found = process.communicate()[1].decode()
    assert process.returncode == 2
    assert found.startswith("error: the output")
    assert found.count("\n") == 1


def test_a_closed_pipe_ends_a_command_quietly():
    with command("train", "--help", stdout=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141
