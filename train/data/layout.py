"""Rows of tokens: documents packed, padded, cut into blocks, running on as streams, or prepared.

Dimensions: R rows, T tokens per row, N tokens in all.

Every layout yields the same arrays, [R, T] int32 (labels are for next-token prediction; a
masked model reads ids only):

  ids        tokens
  labels     the token after each, IGNORE where none is predicted
  segments   1, 2, ... the documents of a row; 0 padding. The scans' state resets at a change.
  positions  0, 1, ... within a segment

and "streams" beside them ``reset`` [R] bool: the row begins anew, a carried cache is dropped.
"""

import dataclasses
import hashlib
import logging
from typing import Any

import numpy as np

from . import draws as draws_lib
from .pipeline import IGNORE, Batch, DataError
from .prepared import Records

logger = logging.getLogger("scanax")


@dataclasses.dataclass(frozen=True)
class Tokens:
    """Tokenised documents.

    Attributes:
      ids: [N] of the smallest unsigned type that holds the vocabulary.
      starts: [documents + 1] int64; document d is ids[starts[d] : starts[d + 1]].
    """

    ids: np.ndarray
    starts: np.ndarray

    @property
    def identity(self) -> dict[str, Any]:
        digest = hashlib.sha256(self.starts.tobytes())
        digest.update(self.ids.tobytes())
        documents = len(self.starts) - 1
        return {
            "tokens": len(self.ids),
            "documents": documents,
            "fingerprint": digest.hexdigest()[:16],
        }


class Packed:
    """Whole documents packed into rows, best fit first; or padded, one to a row.

    Documents are placed from the longest to the shortest, each into the fullest row that still
    has room for it, so the fill is usually above 99 %.

    Args:
      tokens: the documents.
      length: T.
      split_long: cut documents that are longer than a row into pieces of T tokens, each a
        segment of its own; otherwise they are an error.
      what: names the data in messages.
      together: several documents may share a row; otherwise each has one, padded at its end.
    """

    def __init__(
        self, tokens: Tokens, length: int, split_long: bool, what: str, together: bool = True
    ):
        self._tokens, self._length = tokens, length
        starts, sizes = _pieces(tokens, length, split_long, what)
        alone = np.arange(len(sizes)), len(sizes)
        rows, count = best_fit(sizes, length) if together else alone
        order = np.lexsort((starts, rows))  # by row, then in the order of the text
        self._starts, self._sizes = starts[order], sizes[order]
        self._first = np.searchsorted(rows[order], np.arange(count + 1))
        self.fill = float(sizes.sum() / (count * length))
        logger.info(
            "%s: %s tokens of %s documents in %s rows of %d, %.1f %% full",
            *(what, f"{sizes.sum():,}", f"{len(tokens.starts) - 1:,}", f"{count:,}", length),
            100 * self.fill,
        )
        name = "packed" if together else "padded"
        self.identity = {**tokens.identity, "layout": name, "length": length}
        self.identity["split_long"] = split_long

    def __len__(self) -> int:
        return len(self._first) - 1

    def batch(self, records: np.ndarray, draws: np.ndarray) -> Batch:
        del draws
        shape = (len(records), self._length)
        ids, segments, positions = (np.zeros(shape, np.int32) for _ in range(3))
        labels = np.full(shape, IGNORE, np.int32)
        count = np.arange(self._length, dtype=np.int32)
        for row, record in enumerate(records.tolist()):
            place = 0
            for number, i in enumerate(range(self._first[record], self._first[record + 1]), 1):
                start, size = self._starts[i], self._sizes[i]
                here = slice(place, place + size)
                document = self._tokens.ids[start : start + size]
                ids[row, here], segments[row, here] = document, number
                positions[row, here] = count[:size]
                labels[row, place : place + size - 1] = document[1:]
                place += size
        return {"ids": ids, "labels": labels, "segments": segments, "positions": positions}


class Blocks:
    """All documents one after another, cut into disjoint blocks of T tokens.

    Every token of a block has a label, so blocks overlap by the one token that is the last
    label of one and the first input of the next. What is left after the last block is not
    visited, which is reported.

    Args:
      tokens: the documents, each with its end of document if it is to have one.
      length: T.
      offset_seed: begin every epoch's blocks at another offset in [0, T); None for 0.
      what: names the data in messages.
    """

    def __init__(self, tokens: Tokens, length: int, offset_seed: int | None, what: str):
        self._ids, self._length, self._offset_seed = tokens.ids, length, offset_seed
        slack = 0 if offset_seed is None else length - 1
        self._blocks = (len(tokens.ids) - 1 - slack) // length
        if self._blocks < 1:
            raise DataError(
                f"{what} has {len(tokens.ids):,} tokens, too few for one row of data.length"
                f" ({length}): give more text or a smaller length"
            )
        left = len(tokens.ids) - 1 - self._blocks * length
        logger.info(
            "%s: %s blocks of %d tokens, %s tokens left over",
            *(what, f"{self._blocks:,}", length, f"{left:,}"),
        )
        self.identity = {**tokens.identity, "layout": "blocks", "length": length}
        self.identity["offset_seed"] = offset_seed

    def __len__(self) -> int:
        return self._blocks

    def batch(self, records: np.ndarray, draws: np.ndarray) -> Batch:
        offsets = np.zeros(len(records), np.int64)
        if self._offset_seed is not None:
            epochs = draws // self._blocks
            noise = draws_lib.uniform(self._offset_seed, epochs, 1)[:, 0]
            offsets = (noise * self._length).astype(np.int64)
        return _rows(self._ids, records * self._length + offsets, self._length)


class Streams:
    """Rows that run on from batch to batch, for models that carry a cache.

    The text is cut into as many streams as a batch has rows; row r of consecutive batches
    holds consecutive blocks of stream r. When the streams end, they begin anew at an offset
    in [0, T) drawn for the epoch, and ``reset`` is True for that batch.

    Args:
      tokens: the documents.
      length: T.
      batch_size: rows of the global batch.
      seed: of the offsets.
      what: names the data in messages.
    """

    def __init__(self, tokens: Tokens, length: int, batch_size: int, seed: int, what: str):
        self._ids, self._length, self._rows, self._seed = tokens.ids, length, batch_size, seed
        self._stream = len(tokens.ids) // batch_size
        self._blocks = (self._stream - length) // length
        if self._blocks < 1:
            raise DataError(
                f"{what} has {len(tokens.ids):,} tokens, too few for {batch_size} streams of"
                f" rows of {length} tokens: lower batch_size or data.length"
            )
        self.identity = {**tokens.identity, "layout": "streams", "length": length, "seed": seed}

    def __len__(self) -> int:
        return self._blocks * self._rows

    def batch(self, records: np.ndarray, draws: np.ndarray) -> Batch:
        epochs = draws // len(self)
        block, row = np.divmod(records, self._rows)
        noise = draws_lib.uniform(self._seed, epochs, 1)[:, 0]
        starts = row * self._stream + (noise * self._length).astype(np.int64)
        batch = _rows(self._ids, starts + block * self._length, self._length)
        return {**batch, "reset": block == 0}


def running(ids: np.ndarray, rows: int, length: int, most: int, what: str) -> Batch:
    """A text cut into ``rows`` long rows, each a whole number of blocks of T tokens.

    Args:
      ids: [N] tokens.
      rows: R; what is left of the text behind their blocks is not visited.
      length: T.
      most: blocks of a row, at most; 0 for all.
      what: names the data in messages.
    """
    stream = (len(ids) - 1) // rows
    blocks = min(stream // length, most or stream)
    if blocks < 1:
        raise DataError(
            f"{what} has {len(ids):,} tokens, too few for {rows} streams of rows of {length}"
            " tokens: lower evaluation.batch_size or data.length, or hold more text out"
        )
    return _rows(ids, np.arange(rows) * stream, blocks * length)


class Prepared:
    """Rows of T + 1 tokens that ``prepare.py`` wrote, read at random from disk.

    Args:
      records: with a feature "ids".
      length: T.
      tokenizer: identity of the config's tokenizer, which must be the writer's.
    """

    def __init__(self, records: Records, length: int, tokenizer: str):
        if "ids" not in records.features:
            raise DataError(
                f"dataset {records.name!r} holds no rows of tokens: prepare it with --tokenizer,"
                " or set data.layout=blocks or packed"
            )
        tokens = records.features["ids"].shape[0] - 1
        if tokens != length:
            raise DataError(
                f"dataset {records.name!r} was prepared with rows of {tokens} tokens: set"
                f" data.length={tokens}, or prepare it with --length={length}"
            )
        if records.metadata.get("tokenizer") != tokenizer:
            raise DataError(
                f"dataset {records.name!r} was prepared with tokenizer"
                f" {records.metadata.get('tokenizer')}, data.tokenizer is {tokenizer}"
            )
        self._records, self._length = records, length
        self.identity: dict[str, Any] = {**records.identity, "layout": "rows", "length": length}

    def __len__(self) -> int:
        return len(self._records)

    def batch(self, records: np.ndarray, draws: np.ndarray) -> Batch:
        del draws
        window = np.stack([r["ids"] for r in self._records.take(records.tolist())])
        return _arrays(window.astype(np.int32))


def best_fit(sizes: np.ndarray, capacity: int) -> tuple[np.ndarray, int]:
    """Best-fit decreasing bin packing.

    Args:
      sizes: [pieces], each between 1 and ``capacity``.

    Returns:
      The row of each piece [pieces], and the number of rows.
    """
    rows = np.zeros(len(sizes), np.int64)
    by_space: list[list[int]] = [[] for _ in range(capacity + 1)]
    spaces, count = 0, 0  # bit s of spaces: there is a row with s tokens of room
    for piece in np.argsort(-sizes, kind="stable").tolist():
        size = int(sizes[piece])
        fitting = spaces >> size
        if fitting:
            space = size + (fitting & -fitting).bit_length() - 1  # the least room that suffices
            row = by_space[space].pop()
            if not by_space[space]:
                spaces &= ~(1 << space)
        else:
            row, space, count = count, capacity, count + 1
        rows[piece] = row
        if space > size:
            by_space[space - size].append(row)
            spaces |= 1 << (space - size)
    return rows, count


def _pieces(tokens: Tokens, length: int, split_long: bool, what: str):
    """Start and size of every document, or of its pieces of at most ``length`` tokens."""
    starts, sizes = tokens.starts[:-1], np.diff(tokens.starts)
    long = np.flatnonzero(sizes > length)
    if len(long) and not split_long:
        raise DataError(
            f"{what}: {len(long)} documents are longer than data.length ({length}), the first is"
            f" document {long[0]} with {sizes[long[0]]:,} tokens. Set data.long_documents=split to"
            " cut them, raise data.length, or set data.layout=blocks"
        )
    counts = -(-sizes // length)
    first = np.repeat(np.cumsum(counts) - counts, counts)
    inside = (np.arange(counts.sum()) - first) * length
    piece_sizes = np.minimum(np.repeat(sizes, counts) - inside, length)
    return np.repeat(starts, counts) + inside, piece_sizes


def _rows(ids: np.ndarray, starts: np.ndarray, length: int) -> dict[str, np.ndarray]:
    return _arrays(ids[starts[:, None] + np.arange(length + 1)].astype(np.int32))


def _arrays(window: np.ndarray) -> dict[str, np.ndarray]:
    """[R, T + 1] tokens as rows of one segment."""
    rows, length = window.shape[0], window.shape[1] - 1
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), (rows, length))
    return {
        "ids": window[:, :-1],
        "labels": window[:, 1:],
        "segments": np.ones_like(positions),
        "positions": positions,
    }
