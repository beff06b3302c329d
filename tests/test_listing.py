"""Which files are images, and how their folders arrange them: links, hidden files, splits, classes."""

import os
from pathlib import Path

import pytest

from vqvae.data.listing import Layout, in_order, list_images
from vqvae.errors import OptionError


def make(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def found(folder: Path) -> list[str]:
    return list_images(folder, "data_dir").names


def test_linked_folders_are_followed(tmp_path):
    make(tmp_path / "elsewhere", "1.png", "deep/2.png")
    make(tmp_path / "tree", "cats/3.png")
    (tmp_path / "tree" / "dogs").symlink_to(tmp_path / "elsewhere")
    assert found(tmp_path / "tree") == ["cats/3.png", "dogs/1.png", "dogs/deep/2.png"]
    (tmp_path / "all").symlink_to(tmp_path / "tree")
    assert found(tmp_path / "all") == found(tmp_path / "tree")


def test_links_to_a_folder_above_them_do_not_lead_in_circles(tmp_path):
    tree = tmp_path / "tree"
    make(tmp_path, "outside.png", "elsewhere/1.png", "beside/2.png")
    make(tree, "a/3.png")
    (tree / "a" / "here").symlink_to(".")
    (tree / "a" / "up").symlink_to("..")
    (tree / "a" / "out").symlink_to("../..")
    (tree / "a" / "self").symlink_to("self")
    (tree / "b").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "up").symlink_to("..")
    (tmp_path / "elsewhere" / "back").symlink_to(tree)
    assert found(tree) == ["a/3.png", "b/1.png"]


def test_each_folder_is_entered_once_and_by_its_own_name(tmp_path):
    tree = tmp_path / "tree"
    make(tmp_path, "elsewhere/1.png")
    make(tree, "z/2.png")
    (tree / "a").symlink_to("z")
    (tree / "b").symlink_to(tmp_path / "elsewhere")
    (tree / "c").symlink_to(tmp_path / "elsewhere")
    assert found(tree) == ["b/1.png", "z/2.png"]


def test_only_files_that_links_lead_to_are_told_apart_by_where_they_are(tmp_path):
    make(tmp_path / "tree", "1.png", "a/2.png", "a/b/c/3.png")
    make(tmp_path / "elsewhere", "d/4.png")
    before = list_images(tmp_path / "tree", "data_dir").stamps
    (tmp_path / "tree").rename(tmp_path / "moved")
    assert list_images(tmp_path / "moved", "data_dir").stamps == before
    (tmp_path / "moved" / "e").symlink_to(tmp_path / "elsewhere")
    *same, linked = list_images(tmp_path / "moved", "data_dir").stamps
    assert sorted(same) == sorted(before)
    assert linked.endswith(f" {tmp_path / 'elsewhere' / 'd' / '4.png'}")


def test_hidden_files_and_folders_are_skipped(tmp_path):
    tree = tmp_path / ".images"  # the folder itself may be hidden
    make(tree, "a.png", "._a.png", ".b.png", ".thumbnails/c.png", ".ipynb_checkpoints/d-checkpoint.png")
    make(tree, "__MACOSX/._e.png", "__MACOSX/e.png", "@eaDir/f.png", "sub/.hidden/g.png", "sub/h.PNG", "notes.txt")
    assert found(tree) == ["a.png", "sub/h.PNG"]


def test_links_that_lead_nowhere_are_listed_because_they_are_unreadable_images(tmp_path):
    make(tmp_path, "a.png")
    (tmp_path / "gone.png").symlink_to("nowhere.png")
    (tmp_path / "self.png").symlink_to("self.png")
    (tmp_path / "gone").symlink_to("nowhere")
    assert found(tmp_path) == ["a.png", "gone.png", "self.png"]


def test_folders_that_cannot_be_listed_are_named(tmp_path, monkeypatch):
    make(tmp_path, "a.png", "closed/b.png")
    listed = os.scandir

    def refuse(path):
        if Path(path).name == "closed":
            raise PermissionError(13, "Permission denied")
        return listed(path)

    monkeypatch.setattr(os, "scandir", refuse)
    listing = list_images(tmp_path, "data_dir")
    assert listing.names == ["a.png"]
    assert listing.unlisted == {"closed/": "Permission denied"}
    (tmp_path / "a.png").unlink()
    with pytest.raises(OptionError, match="no image files .*, and folders that cannot be listed: 1"):
        list_images(tmp_path, "data_dir")
    with pytest.raises(OptionError, match="cannot be listed .Permission denied"):
        list_images(tmp_path / "closed", "data_dir")


def test_an_error_names_the_option_that_chose_the_folder(tmp_path):
    for name, problem in (("absent", "no such folder"), ("x" * 300, "cannot be listed .File name too long")):
        with pytest.raises(OptionError, match=problem) as caught:
            list_images(tmp_path / name, "input")
        assert caught.value.flagged.startswith("--input ")


@pytest.mark.parametrize(
    ("names", "labels", "splits"),
    [
        (["1.png", "2.png"], [None, None], [None, None]),
        (["a/1.png", "a/2.png"], [None, None], [None, None]),
        (["a/1.png", "b/c/2.png"], ["a", "b"], [None, None]),
        (["train/1.png", "car/2.png"], ["train", "car"], [None, None]),  # the vehicle
        (["train/a/1.png", "TEST/b/2.png"], ["a", "b"], ["train", "test"]),
        (["train/a/1.png", "val/a/2.png", "test/a/3.png"], ["a"] * 3, ["train", "validation", "test"]),
        (["x/train/a/1.png", "x/val/b/2.png"], ["a", "b"], ["train", "test"]),
        (["train/a/1.png", "train/b/2.png"], ["a", "b"], [None, None]),
        (["test/a/1.png", "val/b/2.png"], ["a", "b"], [None, None]),
        (["a/train/1.png", "b/test/2.png"], ["a", "b"], [None, None]),
    ],
)
def test_folders_are_splits_at_the_top_and_classes_below(names, labels, splits):
    layout = Layout.of(names)
    assert [layout.label(name) for name in names] == labels
    assert [layout.split(name) for name in names] == splits


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["10", "9", "1"], ["1", "9", "10"]),
        (["0.5", "-1", "10", "2"], ["-1", "0.5", "2", "10"]),
        (["1", "01"], ["01", "1"]),
        (["b", "a", "10", "9"], ["10", "9", "a", "b"]),
        (["nan", "1", "inf"], ["1", "inf", "nan"]),
    ],
)
def test_classes_are_in_the_order_of_numbers_only_if_all_are_numbers(names, expected):
    assert in_order(names) == expected
