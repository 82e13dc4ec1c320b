"""Text for language models: from a source to tokenised documents to rows.

source -> documents -> clean -> training and evaluation documents -> tokens -> layout
"""

from collections.abc import Sequence
import dataclasses
import functools
import hashlib
import logging

import numpy as np

from . import draws, embedded, files, layout, prepared, tokenizer as tokenizers
from .detokenizers import CLEANERS
from .layout import Tokens
from .pipeline import Batch, Batches, DataError, Source, eval_batch

logger = logging.getLogger("scanax")

SOURCES = ("embedded", "files", "tfds")
LAYOUTS = ("packed", "padded", "blocks", "streams", "rows")
HOLDOUTS = ("hash", "tail")
LONG = ("error", "split")


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """Text data.

    Attributes:
      source: "embedded", "files" or "tfds".
      path: files: a file, glob, folder or place in a zip (see ``files.py``).
      eval_path: files: the evaluation documents; "" holds some of ``path`` out.
      name, data_dir, split, eval_split: tfds; an empty eval_split holds some out.
      text_key: tfds: the feature with the text.
      separator: files: what separates the documents of a file; "" if a file is one.
      clean: a function of ``detokenizers.py`` applied to every document.
      holdout: which documents are held out: "hash", those whose SHA-256 falls below
        ``eval_fraction``; or "tail", the end of every document (for a single long one).
      eval_fraction: of the documents, or of every document's characters.
      tokenizer: "byte", "char", a tokenizer.json, or a folder with GPT-2's files.
      end_of_document: put the tokenizer's end token after every document.
      layout: "packed", "padded", "blocks" or "streams" (see ``layout.py``), or "rows" of tokens
        that ``prepare.py`` wrote (tfds).
      length: tokens per row.
      random_offset: blocks begin at another offset in every epoch.
      long_documents: packed, padded: documents longer than a row are an "error", or are "split".
      seed: of the order and the offsets.
    """

    source: str
    path: str
    eval_path: str
    name: str
    data_dir: str
    split: str
    eval_split: str
    text_key: str
    separator: str
    clean: str
    holdout: str
    eval_fraction: float
    tokenizer: str
    end_of_document: bool
    layout: str
    length: int
    random_offset: bool
    long_documents: str
    seed: int

    def __post_init__(self):
        choices = {
            "source": SOURCES,
            "layout": LAYOUTS,
            "holdout": HOLDOUTS,
            "clean": tuple(CLEANERS),
            "long_documents": LONG,
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"data.{name} must be one of {', '.join(allowed)}; got {getattr(self, name)!r}"
                )
        if self.length < 2:
            raise ValueError(f"data.length must be at least 2, got {self.length}")
        if not 0 < self.eval_fraction < 1:
            raise ValueError(f"data.eval_fraction must be in (0, 1), got {self.eval_fraction}")
        if self.layout == "rows" and (
            self.source != "tfds" or self.tokenizer == "char" or not self.eval_split
        ):
            raise ValueError(
                "data.layout=rows needs data.source=tfds, data.eval_split (for example"
                " train[95%:]), and a data.tokenizer other than char"
            )
        if self.random_offset and self.layout != "blocks":
            raise ValueError("data.random_offset is for data.layout=blocks")


class Corpus:
    """The documents of a config, read, tokenised and laid out when first asked for."""

    def __init__(self, config: TextConfig):
        self.config = config

    @functools.cached_property
    def documents(self) -> tuple[list[str], list[str]]:
        """Training and evaluation documents, cleaned."""
        c, clean = self.config, CLEANERS[self.config.clean]
        train, evaluation = _read(c)
        try:
            train, evaluation = [clean(x) for x in train], [clean(x) for x in evaluation]
        except ValueError as error:
            raise DataError(f"data.clean={c.clean}: {error}") from error
        if not evaluation:
            train, evaluation = hold_out(train, c.holdout, c.eval_fraction)
        return train, evaluation

    @functools.cached_property
    def tokenizer(self) -> tokenizers.Tokenizer:
        name = self.config.tokenizer
        found = tokenizers.load(name, self.documents[0] if name == "char" else ())
        if self.config.end_of_document and found.end is None:
            raise DataError(
                f"data.tokenizer {name} has no end-of-document token (one of"
                f" {', '.join(tokenizers.END_NAMES)}): set data.end_of_document=false"
            )
        return found

    def encode(self, text: str) -> np.ndarray:
        """Tokens of a user's text; a DataError if the vocabulary has no token for some of it."""
        tokenizer = self.tokenizer
        ids = tokenizer.encode(text)
        if tokenizer.unknown is not None and tokenizer.unknown in ids:
            strange = [c for c in sorted(set(text)) if tokenizer.unknown in tokenizer.encode(c)]
            raise DataError(
                f"data.tokenizer {self.config.tokenizer} has no token for"
                f" {', '.join(map(repr, strange)) or 'part of the text'}: write it without"
            )
        return ids

    def train_source(self, batch_size: int) -> Source:
        """The rows to train on."""
        return self._source(0, batch_size)

    @functools.cached_property
    def eval_source(self) -> Source:
        """The rows to evaluate on: packed documents, or disjoint blocks."""
        return self._source(1, 1)

    def train_batches(self, batch_size: int, process_index: int, process_count: int) -> Batches:
        """Batches in the order of ``data.seed``; streams in their own.

        The evaluation text is read too, so that what is wrong with it is said at once.
        """
        if self.config.layout != "streams":
            _ = self.eval_source
        seed = None if self.config.layout == "streams" else self.config.seed
        source = self.train_source(batch_size)
        return Batches(source, batch_size, process_index, process_count, seed=seed)

    @property
    def eval_tokens(self) -> np.ndarray:
        """The whole evaluation text, unsigned integers."""
        if self.config.layout == "rows":
            raise DataError("data.layout=rows has no running evaluation text; choose blocks")
        return self._tokens[1].ids

    def eval_batch(self, size: int, index: int) -> Batch | None:
        return eval_batch(self.eval_source, size, index)

    def eval_streams(self, rows: int, most: int) -> Batch:
        """The evaluation text as rows that run on, see ``layout.running``."""
        what = f"evaluation text ({_place(self.config)})"
        return layout.running(self.eval_tokens, rows, self.config.length, most, what)

    @functools.cached_property
    def _tokens(self) -> tuple[Tokens, Tokens]:
        train, evaluation = self.documents
        tokens = [
            tokenise(x, self.tokenizer, self.config.end_of_document) for x in (train, evaluation)
        ]
        unknown = self.tokenizer.unknown
        if unknown is not None and (count := int((tokens[1].ids == unknown).sum())):
            logger.warning(
                "%d characters of the evaluation text are not in the training text", count
            )
        return tokens[0], tokens[1]

    def _source(self, part: int, batch_size: int) -> Source:
        """The rows of the training (part 0) or evaluation text (1)."""
        c, training = self.config, part == 0
        if c.layout == "rows":
            records = prepared.Records(c.name, c.data_dir, c.split if training else c.eval_split)
            return layout.Prepared(records, c.length, self.tokenizer.identity)
        tokens, what = self._tokens[part], f"{('training', 'evaluation')[part]} text ({_place(c)})"
        if c.layout in ("packed", "padded"):
            split, together = c.long_documents == "split", c.layout == "packed"
            source = layout.Packed(tokens, c.length, split, what, together)
        elif c.layout == "streams" and training:
            seed = draws.stream(c.seed, "streams")
            source = layout.Streams(tokens, c.length, batch_size, seed, what)
        else:
            seed = draws.stream(c.seed, "offset") if c.random_offset and training else None
            source = layout.Blocks(tokens, c.length, seed, what)
        source.identity["tokenizer"] = self.tokenizer.identity
        return source


def tokenise(documents: Sequence[str], tokenizer: tokenizers.Tokenizer, end: bool) -> Tokens:
    """All documents as one array, each followed by the end token if ``end``."""
    kind = np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32
    last = np.asarray([tokenizer.end] if end else [], kind)
    parts, starts = [], [0]
    for document in documents:
        ids = tokenizer.encode(document).astype(kind)
        parts += [ids, last]
        starts.append(starts[-1] + len(ids) + len(last))
    return Tokens(np.concatenate(parts), np.asarray(starts, np.int64))


def hold_out(documents: Sequence[str], how: str, fraction: float) -> tuple[list[str], list[str]]:
    """Training and evaluation documents; the same whatever their order.

    Args:
      how: "hash": whole documents by their SHA-256; "tail": the end of each document.
      fraction: held out, of the documents or of each document's characters.
    """
    if how == "tail":
        cuts = [len(d) - int(len(d) * fraction) for d in documents]
        train = [d[:cut] for d, cut in zip(documents, cuts, strict=True)]
        evaluation = [d[cut:] for d, cut in zip(documents, cuts, strict=True) if d[cut:]]
    else:
        held = [held_out(document.encode(), fraction) for document in documents]
        train = [d for d, out in zip(documents, held, strict=True) if not out]
        evaluation = [d for d, out in zip(documents, held, strict=True) if out]
    if not train or not evaluation:
        raise DataError(
            f"data.holdout={how} with data.eval_fraction={fraction} leaves {len(train)} of"
            f" {len(documents)} documents for training and {len(evaluation)} for evaluation: set"
            " data.holdout=tail, data.separator, data.eval_fraction or data.eval_path"
        )
    return train, evaluation


def held_out(content: bytes, fraction: float) -> bool:
    """Whether something with this content belongs to the evaluation part."""
    return int.from_bytes(hashlib.sha256(content).digest()[:8], "big") < fraction * 2**64


def _read(c: TextConfig) -> tuple[list[str], list[str]]:
    """Training and evaluation documents as the source has them; the latter may be empty."""
    if c.source == "embedded":
        return embedded.text(), []
    if c.source == "files":
        evaluation = files.documents(c.eval_path, c.separator) if c.eval_path else ()
        return list(files.documents(c.path, c.separator)), list(evaluation)
    splits = [c.split, c.eval_split] if c.eval_split else [c.split]
    parts = [
        prepared.texts(prepared.Records(c.name, c.data_dir, split), c.text_key) for split in splits
    ]
    return parts[0], parts[1] if c.eval_split else []


def _place(c: TextConfig) -> str:
    return {"embedded": "embedded", "files": c.path, "tfds": f"{c.name}/{c.split}"}[c.source]
