"""An output is whole or absent, and nothing that exists is lost."""

import json

import pytest

from vqvae.errors import OptionError, UserError
from vqvae.files import cannot_write, claim_empty, make_folder, whole_file, write_json, write_text


def test_a_file_appears_with_its_folder_when_it_is_complete(tmp_path):
    path = tmp_path / "new" / "codes.bin"
    with whole_file(path) as file:
        file.write(b"one")
        assert not path.exists()
    assert path.read_bytes() == b"one"
    assert list(path.parent.iterdir()) == [path]


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
    assert caught.value.flagged.startswith(f"--log-dir {tmp_path / 'file' / 'logs'}: cannot write there (")


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
