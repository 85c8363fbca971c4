"""Files are known by their suffixes in lower and upper case, as cameras and other systems write them."""

import gzip
import zipfile

import numpy as np
import pytest
from PIL import Image

from squeeze_jax.data import tables, target, tokens
from squeeze_jax.data.sources import pairs
from squeeze_jax.errors import UserError
from squeeze_jax.weights import pretrained, weight_files


@pytest.mark.parametrize("name", ["W.NPZ", "w.Safetensors"])
def test_weights(tmp_path, name):
    kernel = np.arange(6, dtype=np.float32).reshape(2, 3)
    pretrained.save(tmp_path / name, {"params": {"a": {"kernel": kernel}}})
    arrays = weight_files.read(tmp_path / name)
    np.testing.assert_array_equal(arrays["params/a/kernel"], kernel)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("A.CSV", b"text,label\ngood,1\n"),
        ("A.TSV", b"text\tlabel\ngood\t1\n"),
        ("A.JSONL", b'{"text": "good", "label": 1}\n'),
        ("A.csv.GZ", gzip.compress(b"text,label\ngood,1\n", mtime=0)),
    ],
)
def test_tables(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    table = tables.read(tmp_path / name)
    assert list(table.columns) == ["text", "label"]
    assert len(table.rows) == 1


@pytest.mark.parametrize("suffixes", [("PNG",), ("Png",), ("png", "PNG")], ids=str)
def test_targets(tmp_path, suffixes):
    for split in "train", "test":
        for folder in split, f"{split}annot":
            (tmp_path / folder).mkdir()
        Image.fromarray(np.zeros((4, 4), np.uint8)).save(tmp_path / split / "0.PNG")
        for number, suffix in enumerate(suffixes, 1):
            labels = Image.fromarray(np.full((4, 4), number, np.uint8))
            labels.save(tmp_path / f"{split}annot" / f"0.{suffix}")
    source = pairs.make(str(tmp_path), ("road", "sky", "tree"))
    for examples in source.train, source.eval:
        (example,) = examples.read([0])
        assert (target.read(example.target) == 1).all()
    assert len(source.notes) == len(suffixes) - 1  # the other target of the image


def test_archives_and_vocabularies(tmp_path):
    with zipfile.ZipFile(tmp_path / "A.ZIP", "w") as archive:
        for split in "train", "test":
            for folder in split, f"{split}annot":
                Image.fromarray(np.zeros((4, 4), np.uint8)).save(tmp_path / "0.png")
                archive.write(tmp_path / "0.png", f"{folder}/0.png")
    source = pairs.make(str(tmp_path / "A.ZIP"), ("road", "sky"))
    assert len(source.train) == len(source.eval) == 1
    with pytest.raises(UserError, match="neither a folder nor a zip archive"):
        pairs.make(str(tmp_path / "A.TAR"), ("road", "sky"))
    words = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "film")
    (tmp_path / "VOCAB.TXT").write_text("\n".join(words) + "\n")
    assert tokens.load(tmp_path / "VOCAB.TXT").size == 6
