"""Turns a big corpus into sharded ArrayRecord once, or trains a tokenizer on it.

  python -m scanax.train.data.prepare text --path "books/*.txt" --name books --data_dir prepared
  python -m scanax.train.data.prepare text --path "books/*.txt" --name books --data_dir prepared \\
      --tokenizer tokenizer.json --length 1024
  python -m scanax.train.data.prepare images --path images.zip/train --name pets --data_dir prepared
  python -m scanax.train.data.prepare tokenizer --path "books/*.txt" --vocab_size 4096 \\
      --out tokenizer.json

The result is a TFDS dataset: train on it with ``data.source=tfds``, ``data.name``,
``data.data_dir``, or read it with TFDS itself. With a tokenizer the records are rows of tokens
ready for ``data.layout=rows``, so that training reads them at random without holding or
tokenising the corpus; else they are documents or encoded images. Shards are made in parallel
and renamed when whole: after an interruption the same command makes those that are missing.
"""

import logging
import os
import pathlib

from absl import flags

from .. import flags as flags_lib
from . import files, tokenizer as tokenizers
from .detokenizers import CLEANERS
from .pipeline import DataError
from .shards import Plan, prepare

logger = logging.getLogger("scanax")

KINDS = ("text", "images", "tokenizer")

PATH = flags.DEFINE_string("path", None, "A file, glob, folder or place in a zip.")
EVAL_PATH = flags.DEFINE_string("eval_path", "", "The same for a split named validation.")
NAME = flags.DEFINE_string("name", None, "Of the dataset: lower case, words joined by _.")
DATA_DIR = flags.DEFINE_string("data_dir", None, "Gets the dataset, as NAME/1.0.0.")
SHARDS = flags.DEFINE_integer("shards", 8, "Files per split.", lower_bound=1)
WORKERS = flags.DEFINE_integer("workers", os.cpu_count() or 1, "Processes.", lower_bound=1)
SEPARATOR = flags.DEFINE_string("separator", "", "Between the documents of a file.")
CLEAN = flags.DEFINE_enum("clean", "none", list(CLEANERS), "Applied to every document.")
TOKENIZER = flags.DEFINE_string("tokenizer", "", "byte, tokenizer.json or GPT-2's folder.")
LENGTH = flags.DEFINE_integer("length", 1024, "With --tokenizer: tokens per row.", lower_bound=2)
VOCAB = flags.DEFINE_integer("vocab_size", 4096, "Of the tokenizer to train.", lower_bound=257)
OUT = flags.DEFINE_string("out", "tokenizer.json", "The tokenizer to write.")


def _train_tokenizer(path: str) -> None:
    texts = (CLEANERS[CLEAN.value](text) for text in files.documents(path, SEPARATOR.value))
    size = tokenizers.train_bpe(texts, VOCAB.value, pathlib.Path(OUT.value))
    logger.info("%s: a vocabulary of %s", OUT.value, f"{size:,}")


def main(kind: str) -> None:
    if not PATH.value:
        raise DataError("--path is required")
    if kind == "tokenizer":
        _train_tokenizer(PATH.value)
        return
    if not NAME.value or not DATA_DIR.value:
        raise DataError("--name and --data_dir are required")
    if not NAME.value.isidentifier() or NAME.value != NAME.value.lower():
        raise DataError(f"--name {NAME.value}: use lower case letters, digits and _")
    paths = {"train": PATH.value}
    if EVAL_PATH.value:
        paths["validation"] = EVAL_PATH.value
    plan = Plan(
        kind=kind,
        paths=paths,
        separator=SEPARATOR.value,
        clean=CLEAN.value,
        tokenizer=TOKENIZER.value,
        length=LENGTH.value if TOKENIZER.value else 0,
        shards=SHARDS.value,
    )
    counts = prepare(plan, NAME.value, pathlib.Path(DATA_DIR.value), WORKERS.value)
    for split, count in counts.items():
        logger.info("%s/%s: %s records", NAME.value, split, f"{count:,}")
    logger.info(
        "train with data.source=tfds data.name=%s data.data_dir=%s", NAME.value, DATA_DIR.value
    )


if __name__ == "__main__":
    flags_lib.launch(main, commands=KINDS)
