"""Sources: what is found in folders and parquet files, and what is said when nothing is."""

import io
import json
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastmim.data import BadImage, DigitsSource, FolderSource, ParquetSource, open_source
from fastmim.nn import patch_embed
from tests import accuracy

SHARED = Path(os.environ.get("FASTMIM_SHARED", "/nowhere")) / "data"


def png(value, size=(4, 6)):
    buffer = io.BytesIO()
    Image.new("RGB", (size[1], size[0]), (value, value, value)).save(buffer, "PNG")
    return buffer.getvalue()


def write(path, data=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png(7) if data is None else data)


def write_parquet(path, columns, features=None):
    pa = pytest.importorskip("pyarrow", reason="parquet needs pyarrow")
    import pyarrow.parquet as pq

    table = pa.table(columns)
    if features is not None:
        note = json.dumps({"info": {"features": features}})
        table = table.replace_schema_metadata({"huggingface": note})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=3)
    return path


def rows(values):
    return [{"bytes": None if v is None else png(v), "path": None} for v in values]


FEATURES = {
    "img": {"_type": "Image"},
    "label": {"_type": "ClassLabel", "names": ["cat", "dog", "emu"]},
}


def test_importing_the_package_loads_no_decoder():
    code = "import sys, fastmim.data; print({'PIL', 'simplejpeg', 'pyarrow'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"


def test_digits_are_the_default_and_complete():
    for source in (open_source(), open_source("digits")):
        assert len(source) == 1797
        assert source.read(3).shape == (1, 32, 32)
        assert source.read(3).dtype == torch.uint8
        counts = [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
        assert torch.bincount(source.labels).tolist() == counts
        assert source.classes == [str(i) for i in range(10)]
        assert source.channels == 1
        assert source.name(3) == "digits[3]"
        assert "1,797 images, 10 classes" in source.describe()


def test_digits_constants_are_those_of_the_pixels():
    pixels = DigitsSource().images.double() / 255
    assert DigitsSource.mean == (round(pixels.mean().item(), 4),)
    assert DigitsSource.std == (round(pixels.std(correction=0).item(), 4),)


def test_other_sources_have_the_constants_of_the_model():
    assert FolderSource.mean == ParquetSource.mean == patch_embed.IMAGENET_MEAN
    assert FolderSource.std == ParquetSource.std == patch_embed.IMAGENET_STD


def test_digits_follow_the_documented_rule():
    import fastmim.data.sources as module

    with np.load(Path(module.__file__).with_name("digits.npz"), allow_pickle=False) as stored:
        small = stored["images"]
    assert small.dtype == np.uint8
    assert (small.min(), small.max()) == (0, 16)
    position = np.clip((np.arange(32) + 0.5) / 4 - 0.5, 0, 7)  # align_corners=False
    low = np.minimum(position.astype(int), 6)
    weights = np.zeros((32, 8))
    weights[np.arange(32), low] = 1 - (position - low)
    weights[np.arange(32), low + 1] = position - low
    expected = np.rint(weights @ small.astype(float) @ weights.T * 255 / 16)
    assert np.array_equal(DigitsSource().images[:, 0].numpy(), expected)


def test_folder_is_read_recursively_in_sorted_order(tmp_path):
    for name in ("b/2.PNG", "b/10.png", "a/deep/er/x.jpeg", "a.png", ".hidden/y.png", "b/._2.png"):
        write(tmp_path / name, png(len(name)))
    write(tmp_path / "notes.txt", b"hello")
    source = open_source(tmp_path)
    assert isinstance(source, FolderSource)
    names = [source.name(i) for i in range(len(source))]
    assert names == ["a.png", "a/deep/er/x.jpeg", "b/10.png", "b/2.PNG"]
    assert [int(source.read(i)[0, 0, 0]) for i in range(4)] == [len(name) for name in names]
    assert source.read(0).shape == (3, 4, 6)
    assert source.labels is None  # a.png lies in no sub-folder
    assert source.classes is None
    assert source.channels == len(source.mean) == len(source.std) == 3
    assert "4 images, no labels" in source.describe()


def test_folder_labels_are_the_first_level(tmp_path):
    for name in ("dog/1.png", "cat/x/2.png", "cat/1.png", "emu/3.png"):
        write(tmp_path / name)
    source = open_source(str(tmp_path))
    assert source.classes == ["cat", "dog", "emu"]
    assert source.labels.tolist() == [0, 0, 1, 2]
    assert source.labels.dtype == torch.int64
    assert open_source(tmp_path / "cat").labels is None
    write(tmp_path / "one" / "train" / "1.png")
    assert open_source(tmp_path / "one").labels is None  # a single folder tells nothing


def test_links_are_followed_and_circles_are_not(tmp_path):
    write(tmp_path / "store" / "1.png")
    root = tmp_path / "root"
    root.mkdir()
    (root / "linked").symlink_to(tmp_path / "store")
    (root / "circle").symlink_to(root)
    (root / "broken.png").symlink_to(tmp_path / "nothing.png")
    source = open_source(root)
    assert [source.name(i) for i in range(len(source))] == ["broken.png", "linked/1.png"]
    with pytest.raises(BadImage, match=r"broken.png: cannot be read: No such file"):
        source.read(0)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes on this system")
def test_a_named_pipe_is_no_image(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    with pytest.raises(ValueError, match="saw 1 other files"):
        open_source(tmp_path)


def test_names_outside_utf8_survive(tmp_path):
    name = os.fsdecode(b"caf\xe9.png")
    try:
        write(tmp_path / name)
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    source = open_source(tmp_path)
    assert source.name(0) == name
    assert source.read(0).shape == (3, 4, 6)


def test_vanished_and_unreadable_files_are_bad(tmp_path):
    write(tmp_path / "a.png")
    write(tmp_path / "b.png")
    source = open_source(tmp_path)
    (tmp_path / "a.png").unlink()
    with pytest.raises(BadImage, match=r"a.png: cannot be read: No such file"):
        source.read(0)
    (tmp_path / "b.png").unlink()
    (tmp_path / "b.png").mkdir()  # unreadable for root as well
    with pytest.raises(BadImage, match=r"b.png: cannot be read"):
        source.read(1)


def test_file_without_permission_is_bad(tmp_path):
    write(tmp_path / "a.png")
    (tmp_path / "a.png").chmod(0)
    if os.access(tmp_path / "a.png", os.R_OK):
        pytest.skip("this user may read everything")
    with pytest.raises(BadImage, match="Permission denied"):
        open_source(tmp_path).read(0)


def test_parquet_in_the_layout_of_hugging_face(tmp_path):
    values = [10, 20, 30, 40, 50, 60, 70, 80]
    path = write_parquet(
        tmp_path / "p.parquet", {"img": rows(values), "label": [0, 1, 2, 0, 1, 2, 0, 1]}, FEATURES
    )
    source = open_source(path)
    assert isinstance(source, ParquetSource)
    assert [int(source.read(i)[0, 0, 0]) for i in range(8)] == values
    assert source.labels.tolist() == [0, 1, 2, 0, 1, 2, 0, 1]
    assert source.classes == ["cat", "dog", "emu"]
    assert source.name(7) == "p.parquet[7]"
    assert "8 images, 3 classes" in source.describe()


@pytest.mark.parametrize("column", ["img", "image", "img.bytes", "image.bytes"])
def test_parquet_column_may_be_plain_bytes(tmp_path, column):
    path = write_parquet(tmp_path / "p.parquet", {"id": [1, 2], column: [png(5), png(6)]})
    source = open_source(path)
    assert int(source.read(1)[0, 0, 0]) == 6
    assert source.labels is None


def test_parquet_column_may_have_any_name_that_the_metadata_calls_an_image(tmp_path):
    features = {"photo": {"_type": "Image"}, "fine": {"_type": "ClassLabel", "names": ["a", "b"]}}
    path = write_parquet(
        tmp_path / "p.parquet", {"photo": rows([1, 2]), "fine": [1, None]}, features
    )
    source = open_source(path)
    assert int(source.read(1)[0, 0, 0]) == 2
    assert source.labels.tolist() == [1, -1]
    assert source.classes == ["a", "b"]


def test_parquet_folder_is_read_in_order_of_names(tmp_path):
    for part in (1, 0):
        write_parquet(
            tmp_path / f"train-0000{part}-of-00002.parquet", {"img": rows([part, part + 5])}
        )
    write(tmp_path / "README.md", b"text")
    source = open_source(tmp_path)
    assert [int(source.read(i)[0, 0, 0]) for i in range(4)] == [0, 5, 1, 6]
    assert source.name(3) == "train-00001-of-00002.parquet[1]"


def test_row_without_bytes_is_bad(tmp_path):
    path = write_parquet(tmp_path / "p.parquet", {"img": rows([1, None, 3])})
    source = open_source(path)
    assert int(source.read(2)[0, 0, 0]) == 3
    with pytest.raises(BadImage, match=re.escape("p.parquet[1]: empty, 0 bytes")):
        source.read(1)


def test_sources_survive_pickling(tmp_path):
    path = write_parquet(
        tmp_path / "q" / "p.parquet", {"img": rows([1, 2]), "label": [0, 1]}, FEATURES
    )
    write(tmp_path / "f" / "a.png")
    for source in (open_source(path), open_source(tmp_path / "f"), open_source()):
        again = pickle.loads(pickle.dumps(source))
        assert len(again) == len(source)
        assert torch.equal(again.read(0), source.read(0))
        assert again.name(0) == source.name(0)


def test_missing_path(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"does not exist.*folder of images.*'digits'"):
        open_source(tmp_path / "nothing")


def test_folder_without_images_says_what_was_looked_for(tmp_path):
    with pytest.raises(ValueError, match=r"no images.*saw 0 other files"):
        open_source(tmp_path)
    write(tmp_path / "sub" / "a.npy", b"x")
    write(tmp_path / "b.heic", b"x")
    with pytest.raises(ValueError, match=r"\.jpg \.jpeg \.png.*\.parquet, saw 2 other files"):
        open_source(tmp_path)


def test_single_file_of_another_kind(tmp_path):
    write(tmp_path / "data.tar", b"x")
    with pytest.raises(ValueError, match=r"is a file that is not \.parquet.*unpack"):
        open_source(tmp_path / "data.tar")


def test_parquet_names_are_unique_over_folders(tmp_path):
    for folder in ("a", "b"):
        write_parquet(tmp_path / folder / "0.parquet", {"img": rows([1])})
    source = open_source(tmp_path)
    assert [source.name(i) for i in range(2)] == ["a/0.parquet[0]", "b/0.parquet[0]"]


def test_splits_in_folders_are_refused(tmp_path):
    for split in ("train", "validation"):
        write_parquet(tmp_path / "default" / split / "0000.parquet", {"img": rows([1])})
    with pytest.raises(ValueError, match=r"several splits \(train, validation\)"):
        open_source(tmp_path)
    assert len(open_source(tmp_path / "default" / "train")) == 1


@pytest.mark.parametrize("splits", [("train", "val"), ("Test", "Train"), ("valid", "validation")])
def test_splits_are_no_classes(tmp_path, splits):
    for name in (*splits, "other"):
        write(tmp_path / name / "cat" / "1.png")
        write(tmp_path / name / "dog" / "1.png")
    listed = ", ".join(splits).lower()
    with pytest.raises(ValueError, match=rf"image files of several splits \({listed}\)") as caught:
        open_source(tmp_path)
    remedy = tmp_path / next((n for n in splits if n.lower() == "train"), splits[0])
    assert str(caught.value).endswith(f"such as {remedy}")
    assert open_source(remedy).classes == ["cat", "dog"]


def test_classes_may_be_named_like_a_split(tmp_path):
    for name in ("train/1.png", "tractor/1.png", "test tube/1.png", "val.png/1.png"):
        write(tmp_path / name)
    assert open_source(tmp_path).classes == ["test tube", "tractor", "train", "val.png"]


def test_mixed_folder_and_mixed_splits_are_refused(tmp_path):
    write_parquet(tmp_path / "train-0.parquet", {"img": rows([1])})
    write_parquet(tmp_path / "test-0.parquet", {"img": rows([1])})
    with pytest.raises(ValueError, match=r"several splits \(test, train\)"):
        open_source(tmp_path)
    write(tmp_path / "a.png")
    with pytest.raises(ValueError, match="1 image files and 2 parquet files"):
        open_source(tmp_path)


def test_broken_parquet_names_the_file(tmp_path):
    pytest.importorskip("pyarrow", reason="parquet needs pyarrow")
    for name, data in (("text.parquet", b"<html>not found</html>"), ("empty.parquet", b"")):
        write(tmp_path / name, data)
        with pytest.raises(ValueError, match=rf"{name} is not a readable parquet file.*again"):
            open_source(tmp_path / name)
    good = write_parquet(tmp_path / "good.parquet", {"img": rows(range(50))}).read_bytes()
    write(tmp_path / "cut.parquet", good[: len(good) // 2])
    with pytest.raises(ValueError, match="not a readable parquet file"):
        open_source(tmp_path / "cut.parquet")


def test_parquet_without_images_lists_its_columns(tmp_path):
    path = write_parquet(tmp_path / "p.parquet", {"text": ["a"], "image": [3]})
    with pytest.raises(ValueError, match=r"no image column in .*found text: string, image: int64"):
        open_source(path)


def test_parquet_files_that_do_not_belong_together(tmp_path):
    other = {**FEATURES, "label": {"_type": "ClassLabel", "names": ["x", "y"]}}
    write_parquet(tmp_path / "a.parquet", {"img": rows([1]), "label": [0]}, FEATURES)
    write_parquet(tmp_path / "b.parquet", {"img": rows([1]), "label": [0]}, other)
    with pytest.raises(ValueError, match="differ in columns or classes"):
        open_source(tmp_path)


def test_parquet_labels_out_of_range_and_no_rows(tmp_path):
    path = write_parquet(tmp_path / "p.parquet", {"img": rows([1, 2]), "label": [0, 3]}, FEATURES)
    with pytest.raises(ValueError, match=r"labels 0\.\.3; expected -1 \(none\) to 2"):
        open_source(path)
    import pyarrow as pa

    empty = pa.array([], pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    path = write_parquet(tmp_path / "e.parquet", {"img": empty})
    with pytest.raises(ValueError, match="no rows"):
        open_source(path)


def test_missing_pyarrow_names_the_remedy(tmp_path, monkeypatch):
    write(tmp_path / "p.parquet", b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match=r"pip install pyarrow.*fastmim\[hf\]"):
        open_source(tmp_path / "p.parquet")


def test_missing_decoder_names_the_remedy(tmp_path, monkeypatch):
    import importlib.util

    write(tmp_path / "a.png")
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "simplejpeg" else found(name)
    )
    with pytest.raises(ImportError, match="pip install simplejpeg"):
        open_source(tmp_path)
    assert len(open_source()) == 1797  # the digits need none


@pytest.mark.skipif(not SHARED.is_dir(), reason="FASTMIM_SHARED/data is not there")
def test_real_parquet():
    pytest.importorskip("pyarrow", reason="parquet needs pyarrow")
    source = open_source(SHARED / "cifar10-test-5k.parquet")
    assert len(source) == 5000
    assert torch.bincount(source.labels).tolist() == [500] * 10
    assert source.classes[:3] == ["airplane", "automobile", "bird"]
    means = torch.stack([source.read(i).double().mean((1, 2)) for i in range(0, 5000, 10)]) / 255
    accuracy.sampled(means, torch.tensor([0.4942, 0.4851, 0.4504]))  # of the 10,000 test pictures


@pytest.mark.skipif(not SHARED.is_dir(), reason="FASTMIM_SHARED/data is not there")
def test_real_photographs():
    source = open_source(SHARED / "imagenet-sample")
    assert len(source) == 100
    for i in range(100):
        img = source.read(i)
        assert img.shape[0] == 3
        with Image.open(SHARED / "imagenet-sample" / source.name(i)) as image:
            assert tuple(img.shape[1:]) == (image.height, image.width)
