"""Preparing ArrayRecord datasets, resuming it, training data from them, and damaged shards."""

import io
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
from PIL import Image
import pytest
import tensorflow_datasets as tfds

from scanax.configs import base
from scanax.train.config import build
from scanax.train.data import tokenizer as tokenizers
from scanax.train.data.image_sources import ImageConfig
from scanax.train.data.images import ImageSet
from scanax.train.data.pipeline import DataError
from scanax.train.data.prepared import Records
from scanax.train.data.shards import PLAN, Plan, prepare
from scanax.train.data.text import Corpus, TextConfig

DOCUMENTS = [f"document {i} " + "word " * (i % 7) for i in range(40)]
PIXELS = np.random.default_rng(0).integers(0, 256, (20, 6, 5, 3), np.uint8)


def text_plan(path: pathlib.Path, **changes) -> Plan:
    values = {"kind": "text", "separator": "", "clean": "none", "tokenizer": "", "length": 0}
    return Plan(**{**values, "paths": {"train": str(path)}, "shards": 3, **changes})


def corpus(**changes) -> Corpus:
    defaults = base.get_config("language_model").data.to_dict()
    return Corpus(build(TextConfig, {**defaults, "source": "tfds", **changes}, "data"))


def images(**changes) -> ImageSet:
    defaults = base.get_config("image_classification").data.to_dict()
    return ImageSet(build(ImageConfig, {**defaults, "source": "tfds", **changes}, "data"))


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("sources")
    (folder / "text").mkdir()
    for i, document in enumerate(DOCUMENTS):
        (folder / "text" / f"{i:02d}.txt").write_text(document)
    for i, pixels in enumerate(PIXELS):
        path = folder / "pets" / ("cat", "dog")[i % 2] / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "png")
        path.write_bytes(file.getvalue())
    return folder


@pytest.fixture(scope="module")
def data_dir(sources, tmp_path_factory) -> pathlib.Path:
    """Three datasets: documents, rows of tokens, images."""
    folder = tmp_path_factory.mktemp("prepared")
    assert prepare(text_plan(sources / "text"), "documents", folder, 1) == {"train": 40}
    rows = text_plan(sources / "text", tokenizer="byte", length=16)
    counts = prepare(rows, "rows", folder, 1)
    assert counts["train"] > 40
    pets = text_plan(sources / "pets", kind="images")
    assert prepare(pets, "pets", folder, 1) == {"train": 20}
    return folder


def test_documents_come_back(data_dir):
    found = corpus(name="documents", data_dir=str(data_dir))
    assert sorted([*found.documents[0], *found.documents[1]]) == sorted(DOCUMENTS)
    split = corpus(
        name="documents", data_dir=str(data_dir), split="train[:30]", eval_split="train[30:]"
    )
    assert split.documents == (DOCUMENTS[:30], DOCUMENTS[30:])


def test_rows_come_back(data_dir):
    found = corpus(
        name="rows", data_dir=str(data_dir), layout="rows", length=16, eval_split="train[:4]"
    )
    tokenizer = tokenizers.Bytes()
    shards = [DOCUMENTS[:13], DOCUMENTS[13:26], DOCUMENTS[26:]]
    batches = found.train_batches(8, 0, 1)
    count = batches.identity["records"]
    rows = np.concatenate([next(batches)["ids"] for _ in range(-(-count // 8))])[:count]
    decoded = sorted(tokenizer.decode(row) for row in rows)
    expected = []
    for shard in shards:
        ids = np.concatenate([np.append(tokenizer.encode(text), tokenizer.end) for text in shard])
        expected += [ids[i : i + 16] for i in range(0, len(ids) - 16, 16)]
    assert decoded == sorted(tokenizer.decode(row) for row in expected)
    batch = next(batches)
    np.testing.assert_array_equal(batch["ids"][:, 1:], batch["labels"][:, :-1])


@pytest.mark.parametrize("in_memory", [True, False])
def test_images_come_back(data_dir, in_memory):
    found = images(
        name="pets", data_dir=str(data_dir), eval_split="train[15:]", in_memory=in_memory
    )
    pixels, labels = found.parts[0].take(np.arange(20))
    order = [i for i in range(20) if i % 2 == 0] + [i for i in range(20) if i % 2]
    np.testing.assert_array_equal(pixels, PIXELS[order])  # by class, as the files are
    np.testing.assert_array_equal(labels, np.repeat([0, 1], 10))
    assert found.parts[2] == ("cat", "dog") and len(found.parts[1]) == 5


def test_tfds_itself_reads_what_was_prepared(data_dir):
    source = tfds.data_source("documents", split="train[10:20]", data_dir=str(data_dir))
    assert [record["text"].decode() for record in source] == DOCUMENTS[10:20]


def test_a_killed_preparation_continues(sources, tmp_path):
    """The command, killed when some shards are there, then again: the shards of a quiet run."""
    arguments = [sys.executable, "-m", "scanax.train.data.prepare", "text"]
    arguments += [f"--path={sources / 'text'}", "--name=documents", "--shards=20", "--workers=1"]
    arguments += [f"--data_dir={tmp_path}"]
    folder = tmp_path / "documents" / "1.0.0"
    process = subprocess.Popen(arguments, start_new_session=True, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while len(list(folder.glob("*-of-00020"))) < 3 and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    before = {p: p.stat().st_mtime_ns for p in folder.glob("*-of-00020")}
    assert 3 <= len(before)
    result = subprocess.run(arguments, capture_output=True, text=True, timeout=300, check=True)
    assert "documents/train: 40 records" in result.stderr
    assert all(path.stat().st_mtime_ns == when for path, when in before.items())
    assert (
        corpus(name="documents", data_dir=str(tmp_path), eval_split="train[:1]").documents[0]
        == DOCUMENTS
    )


def test_classes_of_the_validation_images_must_be_known(sources, tmp_path):
    (tmp_path / "more" / "bird").mkdir(parents=True)
    for name in ("a.png", "b.png"):
        (tmp_path / "more" / "bird" / name).write_bytes((sources / "pets/cat/00.png").read_bytes())
    paths = {"train": str(sources / "pets"), "validation": str(tmp_path / "more")}
    with pytest.raises(DataError, match="bird"):
        prepare(text_plan(sources / "pets", kind="images", paths=paths), "pets", tmp_path, 1)
    assert not (tmp_path / "pets").exists()


def test_another_plan_is_refused(sources, data_dir):
    with pytest.raises(DataError, match="other settings or another input"):
        prepare(text_plan(sources / "text", shards=4), "documents", data_dir, 1)
    plan = json.loads((data_dir / "documents" / "1.0.0" / PLAN).read_text())
    assert plan["shards"] == 3


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"name": "absent"}, "TFDS knows no dataset 'absent'"),
        ({"name": "cifar10"}, "is not prepared as ArrayRecord.*downloads nothing"),
        ({"name": "lm1b"}, "is not prepared as ArrayRecord.*downloads nothing"),
        ({"name": "lm1b", "data_dir": ""}, "is not prepared as ArrayRecord.*default folder"),
        ({"split": "valid"}, "Unknown split 'valid'"),
        ({"split": "train[:0]"}, r"data\.split 'train\[:0\]' of documents"),
        ({"text_key": "story"}, "has no feature 'story'"),
        ({"name": "rows"}, "has no feature 'text'"),
        ({"layout": "rows"}, "holds no rows of tokens"),
        ({"layout": "rows", "name": "rows", "length": 32}, "prepared with rows of 16 tokens"),
    ],
)
def test_datasets_that_cannot_be_used(data_dir, changes, message):
    values = {"name": "documents", "data_dir": str(data_dir), "eval_split": "train[:2]"}
    with pytest.raises(DataError, match=message):
        corpus(**{**values, **changes}).train_batches(4, 0, 1)


def test_another_tokenizer_is_refused(data_dir, tmp_path):
    path = tmp_path / "tokenizer.json"
    tokenizers.train_bpe(DOCUMENTS, 300, path)
    found = corpus(
        name="rows",
        data_dir=str(data_dir),
        layout="rows",
        length=16,
        eval_split="train[:4]",
        tokenizer=str(path),
    )
    with pytest.raises(DataError, match="was prepared with tokenizer byte"):
        found.train_batches(4, 0, 1)


def flip(path: pathlib.Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2 + 40] ^= 4
    path.write_bytes(bytes(content))


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.unlink(),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
        flip,
    ],
    ids=["missing", "empty", "cut", "flipped"],
)
def test_damaged_shards_are_named(sources, tmp_path, damage):
    prepare(text_plan(sources / "text"), "documents", tmp_path, 1)
    shard = tmp_path / "documents/1.0.0/documents-train.array_record-00001-of-00003"
    damage(shard)
    with pytest.raises(DataError, match=r"documents.*(missing or|is) damaged"):
        _ = corpus(name="documents", data_dir=str(tmp_path), eval_split="train[:2]").documents


def test_mocked_datasets_are_read_like_real_ones(tmp_path):
    with tfds.testing.mock_data(num_examples=12):
        found = images(name="cifar10", data_dir=str(tmp_path), eval_split="test", flip=True)
        batch = next(found.train_batches(8, 0, 1))
        assert batch["images"].shape == (8, 32, 32, 3) and found.num_classes == 10
        assert len(Records("mnist", str(tmp_path), "train")) == 12
