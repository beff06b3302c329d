"""Images in npz, parquet and tar files: the pixels, splits and labels of a folder, and files from strangers."""

import builtins
import gzip
import io
import json
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vqvae.data import Dataset, load
from vqvae.errors import OptionError, UserError

SIZE = {"image_size": "8x12", "resize": "pad"}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def make_tree(folder: Path, *tops: str) -> Path:
    """24 images of two classes, in several sizes and formats, below each of the folders; the last one is damaged."""
    rng = np.random.default_rng(0)
    for top in tops or ("",):
        for i in range(24):
            path = folder / top / ("cats", "dogs")[i % 2] / f"{i}.{('png', 'jpg', 'webp')[i % 3]}"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(256, size=(9 + i, 20, 3), dtype=np.uint8)).save(path)
        path.write_bytes(b"damaged")
    return folder


def files(tree: Path) -> list[Path]:
    return sorted(path for path in tree.rglob("*") if path.is_file())


def write_tar(path: Path, content: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in content.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def write_parquet(path: Path, rows: list[dict], classes: list[str] | None = None) -> None:
    """A table as Hugging Face writes it."""
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pyarrow.Table.from_pylist(rows)
    if classes:
        features = {"label": {"names": classes, "_type": "ClassLabel"}, "image": {"_type": "Image"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(table, path, row_group_size=5)


def row(path: Path, name: str, label: object = None) -> dict:
    return {"image": {"bytes": path.read_bytes(), "path": name}, **({} if label is None else {"label": label})}


def same(data: Dataset, other: Dataset) -> None:
    for split, expected in ((data.train, other.train), (data.test, other.test)):
        assert torch.equal(split.images, expected.images)
        assert torch.equal(split.labels, expected.labels)
    assert data.classes == other.classes
    assert data.unreadable == other.unreadable
    assert data.note == other.note


@pytest.mark.parametrize("splits", [(), ("train", "test")])
def test_a_tar_file_of_a_folder_gives_the_images_of_the_folder(tmp_path, splits):
    tree = make_tree(tmp_path / "tree", *splits)
    write_tar(tmp_path / "all.tar", {f"./{p.relative_to(tree).as_posix()}": p.read_bytes() for p in files(tree)})
    data = load("webdataset", data_dir=tmp_path / "all.tar", **SIZE)
    same(data, load("folder", data_dir=tree, **SIZE))
    assert data.train.images.shape[1:] == (3, 8, 12)
    assert data.classes == ("cats", "dogs")


def test_shards_of_webdataset_give_the_images_of_the_folder_with_their_labels(tmp_path):
    webdataset = pytest.importorskip("webdataset")
    tree = make_tree(tmp_path / "tree", "train", "test")
    (tmp_path / "shards").mkdir()
    for split in ("train", "test"):
        writer = webdataset.ShardWriter(f"{tmp_path}/shards/{split}-%04d.tar", maxcount=7, verbose=0)
        with writer:
            for path in files(tree / split):
                key = path.relative_to(tree / split).with_suffix("").as_posix()
                label = ("cats", "dogs").index(path.parent.name)
                writer.write({"__key__": key, path.suffix[1:]: path.read_bytes(), "cls": label})
    data = load("webdataset", data_dir=tmp_path / "shards", **SIZE)
    same(data._replace(classes=("cats", "dogs")), load("folder", data_dir=tree, **SIZE))
    assert data.classes == ("0", "1")


@pytest.mark.parametrize("name", ["train-00000-of-00002", "train/0000", "default/train/0000"])
def test_a_table_of_hugging_face_gives_the_images_of_the_folder_with_their_labels(tmp_path, name):
    tree = make_tree(tmp_path / "tree", "train", "test")
    for split in ("train", "test"):
        paths = files(tree / split)
        rows = [row(p, p.relative_to(tree / split).as_posix(), int(p.parent.name == "cats")) for p in paths]
        target = name.replace("train", split)
        write_parquet(tmp_path / "tables" / f"{target}.parquet", rows[:13], ["dogs", "cats", "pigs"])
        write_parquet(tmp_path / "tables" / f"{target}-2.parquet", rows[13:], ["dogs", "cats", "pigs"])
    data = load("parquet", data_dir=tmp_path / "tables", **SIZE)
    folder = load("folder", data_dir=tree, **SIZE)
    assert data.classes == ("dogs", "cats", "pigs")
    swapped = [split._replace(labels=1 - split.labels) for split in (folder.train, folder.test)]
    same(data, folder._replace(classes=data.classes, train=swapped[0], test=swapped[1]))


def test_every_part_of_a_table_has_its_classes_in_their_order(tmp_path):
    paths = files(make_tree(tmp_path / "tree"))
    rows = [row(path, path.name, int(path.parent.name == "cats")) for path in paths]
    write_parquet(tmp_path / "a.parquet", rows, ["dogs", "cats", "pigs"])
    for number in range(2):
        part = load("parquet", data_dir=tmp_path / "a.parquet", part=(number, 2), **SIZE)
        assert part.classes == ("dogs", "cats", "pigs")
        assert set(part.train.labels.tolist()) == {0, 1}


def test_a_table_of_bytes_without_paths_has_numbered_images(tmp_path):
    tree = make_tree(tmp_path / "tree")
    write_parquet(tmp_path / "a.parquet", [{"img": path.read_bytes(), "label": 3} for path in files(tree)])
    data = load("parquet", data_dir=tmp_path / "a.parquet", image_size=8)
    assert data.classes == ()  # one class is none
    assert len(data.train.images) + len(data.test.images) == 23
    assert [len(name) for name in data.unreadable] == [len("000000.png")]


def flat(n: int = 20) -> np.ndarray:
    return np.random.default_rng(1).integers(256, size=(n, 10, 8, 3), dtype=np.uint8)


def test_arrays_give_the_images_that_a_folder_gives(tmp_path):
    images = flat()
    (tmp_path / "tree").mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / "tree" / f"{i:06}.png")
    np.savez(tmp_path / "a.npz", images=images)
    np.savez_compressed(tmp_path / "b.npz", arr_0=images.transpose(0, 3, 1, 2))
    expected = load("folder", data_dir=tmp_path / "tree", **SIZE)
    for name in ("a.npz", "b.npz"):
        same(load("npz", data_dir=tmp_path / name, **SIZE), expected)


@pytest.mark.parametrize(
    "names",
    [
        ("x_train", "y_train", "x_test", "y_test"),
        ("train_images", "train_labels", "test_images", "test_labels"),
        ("X_train", "Y_train", "X_val", "Y_val"),
    ],
)
def test_common_names_of_arrays_are_splits_and_labels(tmp_path, names):
    images = flat()[..., 0]
    labels = np.arange(20) % 3 + 7
    np.savez(tmp_path / "a.npz", **dict(zip(names, (images[:15], labels[:15], images[15:], labels[15:]), strict=True)))
    data = load("npz", data_dir=tmp_path, image_size="10x8", channels=1)
    assert (len(data.train.images), len(data.test.images)) == (15, 5)
    assert data.classes == ("7", "8", "9")
    for split, start in ((data.train, 0), (data.test, 15)):
        for image, label in zip(split.images, split.labels, strict=True):
            (i,) = (i for i in range(start, 20) if np.array_equal(images[i], image[0].numpy()))
            assert label == labels[i] - 7


@pytest.mark.parametrize("white", [1, 255, 65535])
def test_floats_are_scaled_by_one_rule_for_all_images(tmp_path, white):
    images = np.zeros((4, 8, 8, 1), np.float32)
    images[1:] = 0.2 * white
    images[2, 0] = white
    np.savez(tmp_path / "a.npz", images=images)
    data = load("npz", data_dir=tmp_path / "a.npz", image_size=8)
    assert torch.cat([data.train.images, data.test.images]).unique().tolist() == [0, 51, 255]


def test_labels_survive_into_the_codes_of_a_model(tmp_path):
    from tests.helpers import make
    from vqvae.registry import Choice
    from vqvae.tokens import DatasetSplit

    np.savez(tmp_path / "a.npz", images=flat(), labels=np.arange(20) % 2)
    source = DatasetSplit(Choice("npz", {}), make((3, 8, 12)), 5, data_dir=tmp_path / "a.npz")
    data = load("npz", data_dir=tmp_path / "a.npz", image_size="8x12")
    assert torch.equal(torch.from_numpy(source.columns()["labels"]), data.train.labels)
    assert set(data.train.labels.tolist()) == {0, 1}


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({}, "its arrays are none; images, or x_train and x_test, are needed"),
        ({"codes": np.zeros(3)}, "its arrays are codes; images, or x_train and x_test, are needed"),
        ({"images": np.zeros((4, 8, 8, 2), np.uint8)}, "with C 1, 3 or 4, not uint8"),
        ({"images": np.zeros((4, 8, 8), np.int64)}, "must be of uint8, uint16 or floats, not int64"),
        ({"images": np.zeros((0, 8, 8), np.uint8)}, "images must be .N, H, W."),
        ({"images": np.full((4, 8, 8), -1.0)}, "pixels from -1 to -1; save it with 8 or 16 bits, or with floats"),
        ({"images": np.full((4, 8, 8), np.nan)}, "pixels that are not finite"),
        ({"images": np.array([{}])}, "images has objects, not numbers or text"),
        ({"images": np.zeros((4, 8, 8), np.uint8), "labels": np.zeros(3, int)}, "labels must be integers or text, .4."),
        ({"images": np.zeros((4, 8, 8), np.uint8), "labels": np.zeros(4)}, "labels must be integers or text, .4."),
    ],
)
def test_arrays_that_are_no_images_are_refused_in_one_line(tmp_path, arrays, message):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(UserError, match=message) as caught:
        load("npz", data_dir=tmp_path / "a.npz")
    assert "\n" not in str(caught.value)
    assert str(tmp_path / "a.npz") in str(caught.value)


class Touch:
    """Pickled, it touches a file when it is loaded."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_pickles_are_never_executed(tmp_path):
    bomb, touched = pickle.dumps(Touch(tmp_path / "touched")), tmp_path / "touched"
    np.savez(tmp_path / "a.npz", images=np.array([Touch(touched)], dtype=object))
    image = io.BytesIO()
    Image.new("RGB", (8, 8)).save(image, "PNG")
    content = {f"{i}.png": image.getvalue() for i in range(4)}
    write_tar(tmp_path / "a.tar", content | {"0.pyd": bomb, "0.pickle": bomb, "0.pth": bomb, "9.png": bomb})
    with pytest.raises(UserError):
        load("npz", data_dir=tmp_path / "a.npz")
    data = load("webdataset", data_dir=tmp_path / "a.tar", image_size=8)
    assert list(data.unreadable) == ["9.png"]
    assert not touched.exists()


@pytest.mark.parametrize("name", ["npz", "parquet", "webdataset"])
@pytest.mark.parametrize("content", [b"", b"x" * 3000, b"PK\x03\x04" + bytes(600), b"PAR1" + bytes(600) + b"PAR1"])
def test_a_damaged_file_is_one_line(tmp_path, name, content):
    if name == "parquet":
        pytest.importorskip("pyarrow")
    suffix = {"npz": "npz", "parquet": "parquet", "webdataset": "tar"}[name]
    (tmp_path / f"a.{suffix}").write_bytes(content)
    with pytest.raises(UserError, match=f"a.{suffix}") as caught:
        load(name, data_dir=tmp_path / f"a.{suffix}")
    assert "\n" not in str(caught.value)


def test_a_tar_file_that_announces_a_terabyte_is_one_line(tmp_path):
    image = io.BytesIO()
    Image.new("RGB", (8, 8)).save(image, "PNG")
    write_tar(tmp_path / "a.tar", {f"{i}.png": image.getvalue() for i in range(4)})
    raw = (tmp_path / "a.tar").read_bytes().rstrip(b"\0")
    header = tarfile.TarInfo("big.png")
    header.size = 2**40
    (tmp_path / "a.tar").write_bytes(raw + bytes(-len(raw) % 512) + header.tobuf() + image.getvalue())
    with pytest.raises(UserError, match=r"a.tar: no .tar file of images .unexpected end of data"):
        load("webdataset", data_dir=tmp_path / "a.tar", image_size=8)


def test_a_table_that_decompresses_to_far_more_than_the_file_is_one_line(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = pyarrow.table({"image": [bytes(80 * 2**20)]})
    parquet.write_table(table, tmp_path / "a.parquet", compression="zstd")
    assert (tmp_path / "a.parquet").stat().st_size < 100_000
    with pytest.raises(UserError, match="a.parquet: .*it decompresses to .* bytes, which is far more than the file"):
        load("parquet", data_dir=tmp_path / "a.parquet", image_size=8)


def test_a_tar_file_with_a_size_below_0_is_one_line(tmp_path):
    header = bytearray(tarfile.TarInfo("0.png").tobuf())
    header[124:136] = b"\xff" + (-512).to_bytes(11, "big", signed=True)  # base 256
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    write_tar(tmp_path / "a.tar", {"1.png": b"an image"})
    whole = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(whole[:1024] + bytes(header) + bytes(1024))
    with pytest.raises(UserError, match=r"a.tar: no .tar file of images"):
        load("webdataset", data_dir=tmp_path / "a.tar", image_size=8)


def test_a_compressed_tar_file_is_named_as_one(tmp_path):
    write_tar(tmp_path / "a.tar", {"1.png": b"an image"})
    (tmp_path / "a.tar").write_bytes(gzip.compress((tmp_path / "a.tar").read_bytes()))
    with pytest.raises(UserError, match=r"a.tar: no .tar file of images .it is compressed with gzip; gunzip makes"):
        load("webdataset", data_dir=tmp_path / "a.tar", image_size=8)


def test_other_images_of_an_example_are_left_out(tmp_path):
    image = io.BytesIO()
    Image.new("RGB", (8, 8)).save(image, "PNG")
    parts = {f"{i}.{end}": image.getvalue() for i in range(4) for end in ("png", "seg.png")}
    labels = {f"{i}.json": json.dumps({"label": i % 2}).encode() for i in range(4)}
    write_tar(tmp_path / "a.tar", parts | labels)
    data = load("webdataset", data_dir=tmp_path / "a.tar", image_size=8)
    assert len(data.train.images) + len(data.test.images) == 4
    assert data.classes == ("0", "1")


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    found = builtins.__import__

    def without(name, *arguments, **more):
        if name.startswith("pyarrow"):
            raise ImportError
        return found(name, *arguments, **more)

    (tmp_path / "a.parquet").touch()
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(OptionError, match=r"needs the package pyarrow: pip install 'vqvae\[data\]'"):
        load("parquet", data_dir=tmp_path / "a.parquet")


@pytest.mark.parametrize("name", ["npz", "parquet", "webdataset"])
def test_a_folder_without_such_files_is_refused(tmp_path, name):
    with pytest.raises(OptionError, match=r"has no files \(\."):
        load(name, data_dir=tmp_path)
    with pytest.raises(OptionError, match="no such folder"):
        load(name, data_dir=tmp_path / "absent")


def test_classes_of_one_name_stay_apart_and_labels_of_other_types_are_none(tmp_path):
    image = io.BytesIO()
    Image.new("RGB", (8, 8)).save(image, "PNG")
    rows = [{"image": {"bytes": image.getvalue(), "path": None}, "label": i % 3} for i in range(6)]
    write_parquet(tmp_path / "a.parquet", rows, ["crane", "crane", "dog"])
    write_parquet(tmp_path / "b.parquet", [row | {"label": [1.5]} for row in rows])
    assert load("parquet", data_dir=tmp_path / "a.parquet", image_size=8).classes == ("crane (0)", "crane (1)", "dog")
    assert load("parquet", data_dir=tmp_path / "b.parquet", image_size=8).classes == ()
