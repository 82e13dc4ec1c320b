"""The data parts that configs share: ``config.data.update(datasets.CHARACTERS)``.

Each is what differs from ``base.py`` for one use. All run on embedded data as they are; point
them at real data with ``datasets.files(...)`` or ``datasets.tfds(...)``, or on the command
line: ``--config.data.source=files --config.data.path=tinyshakespeare/input.txt``.
"""

# Language modelling on characters: rows cut anywhere, the end of every document held out.
CHARACTERS = {
    "tokenizer": "char",
    "holdout": "tail",
    "layout": "blocks",
    "length": 256,
    "random_offset": True,
}

# Language modelling on pieces of words: documents packed whole, cut where they are too long.
# Train the tokenizer first: python -m scanax.train.data.prepare tokenizer --path ...
PIECES = {
    "tokenizer": "tokenizer.json",
    "layout": "packed",
    "long_documents": "split",
    "length": 1024,
}

# Language modelling with a cache that is carried from row to row (RMoE's protocol).
STREAMS = {"layout": "streams", "length": 512}

# Masked (absorbing) language modelling: disjoint blocks of whole text, every token counts,
# ends of documents among them (the protocol of RADD and of its predecessors).
MASKED = {"layout": "blocks", "length": 1024, "end_of_document": True}

# The same on text8-like characters: blocks of 256 at another offset in every epoch.
MASKED_CHARACTERS = {**CHARACTERS, "end_of_document": False}

# Image classification as DeiT trains it (Touvron et al. 2021).
CLASSIFICATION = {
    "flip": True,
    "resized_crop": 0.08,
    "rand_augment": 2,
    "magnitude": 9.0,
    "erasing": 0.25,
    "mixup": 0.8,
    "cutmix": 1.0,
    "label_smoothing": 0.1,
}

# Small images (CIFAR): shifts and mirror images only.
SMALL_CLASSIFICATION = {"flip": True, "crop_padding": 4}

# Image generation: mirror images, grey levels as they are in [-1, 1].
GENERATION = {"flip": True}


def files(path: str, eval_path: str = "") -> dict:
    """The source: files, relative to SCANAX_DATA."""
    return {"source": "files", "path": path, "eval_path": eval_path}


def tfds(name: str, data_dir: str, split: str = "train", eval_split: str = "") -> dict:
    """The source: a dataset that TFDS or ``scanax.train.data.prepare`` prepared."""
    where = {"source": "tfds", "name": name, "data_dir": data_dir}
    return {**where, "split": split, "eval_split": eval_split}
