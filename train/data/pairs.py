"""Coupling pairs (Z_0, Z_1) of a flow on disk: sharded ArrayRecord, as a TFDS dataset.

Dimensions: R records.

A record holds both ends, the label, its number, the function evaluations it took, and a checksum
over all of them, so that ends that do not belong together are found. Beside the shards stand the
teacher's fingerprint, the solver and the seed. Shards are renamed when whole; those that exist are
not made again, so that an interrupted generation goes on with nothing lost and nothing twice.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
import dataclasses
import json
import pathlib
from typing import Any
import zlib

import numpy as np

from .pipeline import Batch, DataError
from .prepared import Records
from .shards import claim, serialiser, shard_path, write_metadata, write_records

NAME = "pairs"
MANIFEST = "pairs.json"
VERSION = 2  # 1 shared its starts with samples of the same seed, and its order with the files
Pair = tuple[np.ndarray, np.ndarray, int, int]  # x0, x1, label, evaluations


@dataclasses.dataclass(frozen=True)
class PairsPlan:
    """What decides every record.

    Attributes:
      teacher: fingerprint of the parameters that made the pairs.
      run: the folder of the teacher's run and its step, for people.
      solver: recipe, see ``scanax.models.rectified_flow.recipes``.
      seed: of the noise.
      batch_size: pairs that were solved at once; a solver with adaptive steps chooses them for all
        of these together.
      shape: of either end.
      num_classes: of the teacher's condition; 0 for none, when all labels are 0.
      number: of pairs.
      per_shard: pairs in a file.
      from_data: the data's own images are Z_1 and were solved backwards to Z_0.
      version: of the way from the seed and a number to a pair.
    """

    teacher: str
    run: str
    solver: str
    seed: int
    batch_size: int
    shape: tuple[int, ...]
    num_classes: int
    number: int
    per_shard: int
    from_data: bool
    version: int = VERSION

    @property
    def shards(self) -> int:
        return -(-self.number // self.per_shard)


def write(
    plan: PairsPlan, folder: pathlib.Path, make: Callable[[np.ndarray], Iterable[Pair]]
) -> int:
    """Makes the shards that are missing, then the metadata.

    Args:
      plan: of the pairs.
      folder: holds, or gets, the dataset.
      make: numbers [R] of pairs -> the pairs, in that order.

    Returns:
      How many pairs were made now.

    Raises:
      DataError: if the folder holds pairs of another plan, or something else.
    """
    place = folder / NAME / "1.0.0"
    described = json.loads(json.dumps(dataclasses.asdict(plan)))
    claim(place, MANIFEST, described, "--out")
    features = _features(plan.shape)
    encode = serialiser(features)
    made = 0
    for shard in range(plan.shards):
        path = shard_path(place, NAME, "train", shard, plan.shards)
        if path.exists():
            continue
        first = shard * plan.per_shard
        numbers = np.arange(first, min(first + plan.per_shard, plan.number))
        write_records(path, map(encode, _records(numbers, make(numbers))))
        made += len(numbers)
    write_metadata(place, NAME, features, {"train": plan.shards}, described, "Coupling pairs")
    return made


class Pairs:
    """Pairs as examples of training: ``x0``, ``x1`` [R, ...] float32, ``labels`` [R] int32.

    Args:
      folder: what ``write`` was given.
      in_memory: read, and check, all of them at once; else whenever they are needed.

    Raises:
      DataError: if there are no pairs, another version made them, or their checksums or labels do
        not hold.
    """

    def __init__(self, folder: str, in_memory: bool = True):
        self._folder = folder
        self._records = Records(NAME, folder, "train")
        self.metadata: Mapping[str, Any] = self._records.metadata
        if self.metadata.get("version") != VERSION:
            raise DataError(
                f"the pairs in {folder} were made by another version of scanax: generate them again"
            )
        self.identity = {**self._records.identity, "teacher": self.metadata["teacher"]}
        self._arrays = self._read(np.arange(len(self._records))) if in_memory else None

    def __len__(self) -> int:
        return len(self._records)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.metadata["shape"])

    @property
    def num_classes(self) -> int:
        """Of the teacher's condition; 0 for none."""
        return self.metadata["num_classes"]

    def split(self, eval_fraction: float) -> tuple["PairsPart", "PairsPart"]:
        """Pairs to train on, and the last ones, to evaluate with."""
        train = max(1, min(len(self) - 1, round(len(self) * (1 - eval_fraction))))
        return PairsPart(self, 0, train), PairsPart(self, train, len(self) - train)

    def batch(self, records: np.ndarray, draws: np.ndarray) -> Batch:
        del draws
        if self._arrays is None:
            return self._read(records)
        return {name: x[records] for name, x in self._arrays.items()}

    def _read(self, numbers: np.ndarray) -> dict[str, np.ndarray]:
        found = self._records.take(numbers.tolist())
        for record in found:
            x0, x1, label = record["x0"], record["x1"], int(record["label"])
            number, nfe = int(record["number"]), int(record["nfe"])
            if _checksum(number, (x0, x1, label, nfe)) != int(record["checksum"]):
                raise DataError(
                    f"pair {number} in {self._folder}: its ends do not belong together or are"
                    " damaged (checksum). Generate the pairs again; they must not be re-ordered"
                )
            if not 0 <= label < max(self.num_classes, 1):
                raise DataError(
                    f"pair {number} in {self._folder} has label {label}, and its teacher"
                    f" {self.num_classes} classes: generate the pairs again"
                )
        return {
            "x0": np.stack([r["x0"] for r in found]),
            "x1": np.stack([r["x1"] for r in found]),
            "labels": np.asarray([r["label"] for r in found], np.int32),
        }


class PairsPart:
    """``number`` pairs from ``first`` on; a ``pipeline.Source``."""

    def __init__(self, pairs: Pairs, first: int, number: int):
        self._pairs, self._first, self._number = pairs, first, number
        self.identity = {**pairs.identity, "first": first, "number": number}

    def __len__(self) -> int:
        return self._number

    def batch(self, records: np.ndarray, draws: np.ndarray) -> Batch:
        return self._pairs.batch(self._first + records, draws)


def check_pairs(pairs: Pairs, shape: tuple[int, ...], num_classes: int) -> None:
    """Raises a DataError if pairs are not of this shape, or of other classes than a model has."""
    if pairs.shape != shape:
        raise DataError(
            f"data.pairs has ends of shape {pairs.shape}, the data {shape}: they are of another"
            " teacher's data"
        )
    if num_classes and pairs.num_classes != num_classes:
        raise DataError(
            f"data.pairs are of a teacher with {pairs.num_classes} classes, and model.num_classes"
            f" is {num_classes}: their labels do not mean the same"
        )


def _records(numbers: np.ndarray, pairs: Iterable[Pair]) -> Iterator[dict[str, Any]]:
    for number, (x0, x1, label, nfe) in zip(numbers.tolist(), pairs, strict=True):
        x0, x1 = np.asarray(x0, np.float32), np.asarray(x1, np.float32)
        if not (np.isfinite(x0).all() and np.isfinite(x1).all()):
            raise DataError(f"pair {number} is not finite: the teacher has not learnt a flow")
        pair = x0, x1, int(label), int(nfe)
        checksum = _checksum(number, pair)
        names = ("x0", "x1", "label", "nfe")
        yield {**dict(zip(names, pair, strict=True)), "number": number, "checksum": checksum}


def _checksum(number: int, pair: Pair) -> int:
    x0, x1, label, nfe = pair
    head = np.asarray([number, label, nfe], "<i8").tobytes()
    ends = (np.ascontiguousarray(x, "<f4").tobytes() for x in (x0, x1))
    return zlib.crc32(b"".join((head, *ends)))


def _features(shape: tuple[int, ...]) -> Any:
    import tensorflow_datasets as tfds

    features: Any = tfds.features
    end = lambda: features.Tensor(shape=shape, dtype=np.float32, encoding=features.Encoding.BYTES)
    numbers = ("label", "nfe", "number", "checksum")
    fields = {name: features.Scalar(dtype=np.int64) for name in numbers}
    return features.FeaturesDict({"x0": end(), "x1": end(), **fields})
