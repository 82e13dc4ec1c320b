"""The data parts of configs/datasets.py: every key exists, and batches come out."""

import numpy as np
import pytest

from scanax.configs import base, datasets
from scanax.train.config import build
from scanax.train.data import tokenizer as tokenizers
from scanax.train.data.image_sources import ImageConfig
from scanax.train.data.images import ImageSet
from scanax.train.data.text import Corpus, TextConfig

TEXT = ("CHARACTERS", "PIECES", "STREAMS", "MASKED", "MASKED_CHARACTERS")
IMAGES = ("CLASSIFICATION", "SMALL_CLASSIFICATION", "GENERATION")


def test_every_part_is_tested():
    assert {n for n in vars(datasets) if n.isupper()} == {*TEXT, *IMAGES}


@pytest.mark.parametrize("name", TEXT)
def test_text(name, tmp_path):
    values = {**base.get_config("language_model").data.to_dict(), **getattr(datasets, name)}
    if values["tokenizer"].endswith(".json"):
        values["tokenizer"] = str(tmp_path / values["tokenizer"])
        tokenizers.train_bpe(["some text"], 300, tmp_path / "tokenizer.json")
    corpus = Corpus(build(TextConfig, values, "data"))
    batch = next(corpus.train_batches(4, 0, 1))
    assert batch["ids"].shape == (4, values["length"])
    assert 0 <= batch["ids"].min() and batch["ids"].max() < corpus.tokenizer.vocab_size
    assert corpus.eval_batch(4, 0)["ids"].shape == (4, values["length"])


@pytest.mark.parametrize("name", IMAGES)
def test_images(name):
    values = {**base.get_config("image_classification").data.to_dict(), **getattr(datasets, name)}
    images = ImageSet(build(ImageConfig, {**values, "channels": 1}, "data"))
    batch = next(images.train_batches(8, 0, 1))
    assert batch["images"].shape == (8, 8, 8, 1)
    assert np.abs(batch["images"]).max() <= 1 and ("targets" in batch) == (name == "CLASSIFICATION")


def test_sources_are_keys_of_the_config():
    known = base.get_config("language_model").data
    for source in (datasets.files("a", "b"), datasets.tfds("a", "b", "c", "d")):
        assert set(source) <= set(known)
