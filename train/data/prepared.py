"""Data prepared by TFDS (or by ``prepare.py``) as ArrayRecord: random access, no TensorFlow.

TFDS answers a record of a cut-off shard with None values and finds a missing shard only when
it gets there; here every shard is looked at before training.
"""

from collections.abc import Sequence
import hashlib
import os
import pathlib
from typing import Any

import numpy as np

from .pipeline import DataError


class Records:
    """A split of a TFDS dataset.

    Args:
      name: of the dataset, as TFDS knows it, e.g. "cifar10" or "lm1b:1.1.0".
      data_dir: where it is prepared; relative to SCANAX_DATA, "" for TFDS's own default.
      split: e.g. "train", "train[:90%]".
    """

    def __init__(self, name: str, data_dir: str, split: str):
        import tensorflow_datasets as tfds  # slow to import

        folder = (
            pathlib.Path(os.environ.get("SCANAX_DATA", ".")) / pathlib.Path(data_dir).expanduser()
        )
        self.name, self.split = name, split
        directory = str(folder) if data_dir else None
        try:
            self._builder: Any = tfds.builder(name, data_dir=directory)
            self._source: Any = tfds.data_source(
                name, split=split, data_dir=directory, download=False
            )
        except tfds.core.DatasetNotFoundError as error:
            raise DataError(
                f"TFDS knows no dataset {name!r} and {folder} holds none of that name: check"
                " data.name and data.data_dir"
            ) from error
        except (NotImplementedError, AssertionError, KeyError, OSError, ImportError) as error:
            raise DataError(
                f"dataset {name!r} is not prepared as ArrayRecord in"
                f" {directory or 'the default folder of TFDS'}. Training downloads nothing:"
                " prepare it where there is a network, e.g. with tfds build"
                f" {name} --file_format=array_record, and set data.data_dir"
            ) from error
        except ValueError as error:
            raise DataError(f"data.split {split!r} of {name}: {_first_line(error)}") from error
        self._check_shards()
        if not len(self._source):
            raise DataError(f"data.split {split!r} of {name} is empty")

    def __len__(self) -> int:
        return len(self._source)

    @property
    def features(self) -> dict[str, Any]:
        return dict(self._builder.info.features)

    @property
    def metadata(self) -> dict[str, Any]:
        """What the writer of the dataset noted beside it."""
        return dict(self._builder.info.metadata or {})

    @property
    def identity(self) -> dict[str, Any]:
        """Of the shards' names and sizes and what TFDS says of the dataset, not of every byte."""
        digest = hashlib.sha256(repr((self.split, self._builder.info.full_name)).encode())
        for path, count in self._shards():
            digest.update(repr((path.name, count, path.stat().st_size)).encode())
        return {"dataset": f"{self.name}/{self.split}", "fingerprint": digest.hexdigest()[:16]}

    def take(self, numbers: Sequence[int]) -> list[dict[str, Any]]:
        """Records by number.

        Raises:
          DataError: if a shard is damaged.
        """
        try:
            # One by one: for records in the page cache TFDS's threads cost more than they give.
            records = [self._source[number] for number in numbers]
        except (RuntimeError, ValueError, OSError) as error:
            raise DataError(self._damaged(_first_line(error))) from error
        for record in records:
            if any(value is None for value in record.values()):
                raise DataError(self._damaged("a record is missing"))
        return records

    def _damaged(self, why: str) -> str:
        return (
            f"dataset {self.name!r} in {self._builder.data_path} is damaged ({why}): copy or"
            " prepare it again"
        )

    def _shards(self) -> list[tuple[pathlib.Path, int]]:
        """Files and number of examples of all shards of the splits that are read from."""
        found = []
        for part in self.split.split("+"):  # e.g. "train[:90%]+test"
            split = self._builder.info.splits.get(part.split("[")[0].strip())
            if split is not None:  # a mocked dataset has none
                files = [pathlib.Path(str(path)) for path in split.filepaths]
                found += zip(files, split.shard_lengths, strict=True)
        return found

    def _check_shards(self) -> None:
        from array_record.python import array_record_module  # pyright: ignore

        for path, count in self._shards():
            try:
                reader = array_record_module.ArrayRecordReader(str(path))
                found = reader.num_records()
                ends = [reader.read([0]), reader.read([count - 1])] if found == count else []
                reader.close()
            except (RuntimeError, OSError, IndexError, ValueError) as error:
                raise DataError(
                    f"{path} is missing or damaged ({_first_line(error)}): copy or prepare it again"
                ) from error
            if found != count or not all(ends):
                raise DataError(
                    f"{path} is damaged: it holds {found} records, not {count}; copy or prepare it"
                    " again"
                )


def texts(records: Records, key: str) -> list[str]:
    """The documents of a text dataset.

    Args:
      records: of a dataset with a Text feature.
      key: its name.
    """
    if key not in records.features:
        raise DataError(
            f"dataset {records.name!r} has no feature {key!r} (data.text_key); it has"
            f" {', '.join(sorted(records.features))}"
        )
    found = []
    for start in range(0, len(records), 1024):
        batch = records.take(range(start, min(start + 1024, len(records))))
        found += [np.asarray(record[key]).item().decode() for record in batch]
    return found


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
