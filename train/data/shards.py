"""Writing datasets as sharded ArrayRecord that TFDS reads, without TensorFlow.

Shards are made in parallel and renamed when whole, so that an interrupted preparation continues
with those that are missing. The command is ``prepare.py``.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
import concurrent.futures
import dataclasses
import functools
import hashlib
import json
import multiprocessing
import pathlib
from typing import Any

from etils import epath
import numpy as np
from tqdm import tqdm

from . import files, tokenizer as tokenizers
from .detokenizers import CLEANERS
from .pipeline import DataError
from .text import tokenise

PLAN = "prepare.json"


@dataclasses.dataclass(frozen=True)
class Plan:
    """What one dataset is made of; two runs with the same plan write the same records.

    Attributes:
      kind: "text" or "images".
      paths: split -> where its files are.
      separator, clean: see ``TextConfig``.
      tokenizer, length: rows of so many tokens; "" for documents.
      shards: files per split.
    """

    kind: str
    paths: dict[str, str]
    separator: str
    clean: str
    tokenizer: str
    length: int
    shards: int


def prepare(plan: Plan, name: str, data_dir: pathlib.Path, workers: int) -> dict[str, int]:
    """Writes the shards that are missing, then the metadata that TFDS reads.

    Returns:
      Split -> number of records.

    Raises:
      DataError: if the input cannot be used, or the folder holds the shards of another plan.
    """
    folder = data_dir / name / "1.0.0"
    tokenizer = tokenizers.load(plan.tokenizer, ()) if plan.tokenizer else None
    if tokenizer is not None and tokenizer.end is None:
        raise DataError(f"--tokenizer {plan.tokenizer} has no end-of-document token")
    features, metadata = _features(plan, tokenizer)
    described = {**dataclasses.asdict(plan), "input": _fingerprint(plan)}
    claim(folder, PLAN, described, "--name or --data_dir")
    todo = [
        (split, shard)
        for split in plan.paths
        for shard in range(plan.shards)
        if not shard_path(folder, name, split, shard, plan.shards).exists()
    ]
    # Processes, not threads: tokenising and hashing hold the interpreter's lock.
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, mp_context=context) as pool:
        jobs = [pool.submit(_write_shard, plan, folder, name, *item) for item in todo]
        done = concurrent.futures.as_completed(jobs)
        try:
            for job in tqdm(done, total=len(jobs), desc=name, unit="shard", disable=None):
                job.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    description = f"Prepared by scanax from {', '.join(plan.paths.values())}"
    shards = dict.fromkeys(plan.paths, plan.shards)
    return write_metadata(folder, name, features, shards, metadata, description)


def write_metadata(
    folder: pathlib.Path,
    name: str,
    features: Any,
    shards: Mapping[str, int],
    metadata: Mapping[str, Any],
    description: str,
) -> dict[str, int]:
    """Writes what TFDS reads beside the shards.

    Args:
      folder: of the dataset.
      name: of the dataset.
      features: of a record, of TFDS.
      shards: split -> files it consists of; they exist.
      metadata: what a reader must know beside them; JSON.
      description: for people.

    Returns:
      Split -> number of records.
    """
    import tensorflow_datasets as tfds

    counts = {split: _counts(folder, name, split, number) for split, number in shards.items()}
    infos = [
        tfds.core.SplitInfo(
            name=split,
            shard_lengths=lengths,
            num_bytes=sum(p.stat().st_size for p in folder.glob(f"{name}-{split}.*")),
            filename_template=tfds.core.ShardedFileTemplate(
                dataset_name=name,
                data_dir=epath.Path(folder),
                split=split,
                filetype_suffix="array_record",
            ),
        )
        for split, lengths in counts.items()
    ]
    tfds.folder_dataset.write_metadata(
        data_dir=folder,
        features=features,
        split_infos=infos,
        check_data=False,  # the check needs TensorFlow
        metadata=tfds.core.MetadataDict(metadata),
        description=description,
    )
    return {split: sum(lengths) for split, lengths in counts.items()}


def serialiser(features: Any) -> Callable[[Mapping[str, Any]], bytes]:
    """(record) -> its bytes, as TFDS encodes the features."""
    from tensorflow_datasets.core.example_serializer import ExampleSerializer

    serialise = ExampleSerializer(features.get_serialized_info()).serialize_example
    return lambda record: serialise(features.encode_example(record))


def write_records(path: pathlib.Path, records: Iterable[bytes]) -> int:
    """A shard, written beside its place and renamed when whole, unless it is empty.

    Returns:
      The number of records.
    """
    from array_record.python import array_record_module  # pyright: ignore

    draft = path.with_name(f"{path.name}.tmp")
    writer = array_record_module.ArrayRecordWriter(str(draft), "group_size:1")
    count = 0
    try:
        for record in records:
            writer.write(record)
            count += 1
    finally:
        writer.close()
    if count:
        draft.replace(path)
    else:
        draft.unlink()
    return count


def _features(plan: Plan, tokenizer: tokenizers.Tokenizer | None) -> tuple[Any, dict[str, Any]]:
    """The features of a record, and what a reader must know beside them."""
    import tensorflow_datasets as tfds

    if plan.kind == "images":
        (_, first), *_ = _labelled(plan.paths["train"])
        channels = 1 if files.is_grey(first) else 3
        fields: dict[str, Any] = {"image": tfds.features.Image(shape=(None, None, channels))}
        if classes := _classes(plan.paths["train"]):
            for path in plan.paths.values():
                if more := set(_classes(path)) - set(classes):
                    raise DataError(f"{path} has classes that the training images have not: {more}")
            fields["label"] = tfds.features.ClassLabel(names=classes)
        return tfds.features.FeaturesDict(fields), {}
    if tokenizer is None:
        return tfds.features.FeaturesDict({"text": tfds.features.Text()}), {}
    kind = np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32
    encoding = tfds.features.Encoding.BYTES  # read ten times as fast as a list of numbers
    row = tfds.features.Tensor(shape=(plan.length + 1,), dtype=kind, encoding=encoding)
    return tfds.features.FeaturesDict({"ids": row}), {"tokenizer": tokenizer.identity}


def _write_shard(plan: Plan, folder: pathlib.Path, name: str, split: str, shard: int) -> None:
    """One shard. Runs in a process of its own."""
    tokenizer = tokenizers.load(plan.tokenizer, ()) if plan.tokenizer else None
    encode = serialiser(_features(plan, tokenizer)[0])
    path = shard_path(folder, name, split, shard, plan.shards)
    records = _records(plan, plan.paths[split], shard, tokenizer)
    if not write_records(path, map(encode, records)):
        raise DataError(f"shard {shard} of {split} would be empty: use fewer --shards")


def _records(
    plan: Plan, path: str, shard: int, tokenizer: tokenizers.Tokenizer | None
) -> Iterator[dict[str, Any]]:
    """The records of one shard: a contiguous part of the input."""
    if plan.kind == "images":
        found = _labelled(path)
        for label, file in found[_part(len(found), shard, plan.shards)]:
            files.decode_image(file, 3)  # a damaged image is found now
            yield {"image": file.read(), **({"label": label} if label else {})}
        return
    texts = _documents(path, plan.separator)
    texts = (CLEANERS[plan.clean](text) for text in texts[_part(len(texts), shard, plan.shards)])
    if tokenizer is None:
        yield from ({"text": text} for text in texts)
        return
    ids = tokenise(list(texts), tokenizer, end=True).ids
    for start in range(0, len(ids) - plan.length, plan.length):
        yield {"ids": ids[start : start + plan.length + 1]}


def _part(count: int, shard: int, shards: int) -> slice:
    return slice(count * shard // shards, count * (shard + 1) // shards)


@functools.lru_cache(maxsize=1)
def _documents(path: str, separator: str) -> list[str]:
    return list(files.documents(path, separator))


def _labelled(path: str) -> list[tuple[str, files.File]]:
    """(class or "", file) of every image."""
    found = [f for f in files.find(path) if f.name.lower().endswith(files.IMAGE_SUFFIXES)]
    if not found:
        raise DataError(f"--path {path} holds no images ({', '.join(files.IMAGE_SUFFIXES)})")
    return [(pathlib.PurePath(f.path).parts[0] if "/" in f.path else "", f) for f in found]


def _classes(path: str) -> list[str]:
    return sorted({label for label, _ in _labelled(path)} - {""})


def shard_path(
    folder: pathlib.Path, name: str, split: str, shard: int, shards: int
) -> pathlib.Path:
    """Where TFDS looks for a shard."""
    return folder / f"{name}-{split}.array_record-{shard:05d}-of-{shards:05d}"


def _counts(folder: pathlib.Path, name: str, split: str, shards: int) -> list[int]:
    from array_record.python import array_record_module  # pyright: ignore

    counts = []
    for shard in range(shards):
        path = shard_path(folder, name, split, shard, shards)
        reader = array_record_module.ArrayRecordReader(str(path))
        counts.append(reader.num_records())
        reader.close()
    return counts


def claim(folder: pathlib.Path, note: str, described: Mapping[str, Any], how: str) -> None:
    """Notes in the folder what its records are made of, or checks that it is the same.

    Args:
      folder: of the dataset.
      note: name of the file.
      described: what decides the records; JSON.
      how: the flags that choose another folder, for the message.

    Raises:
      DataError: if the folder holds something else.
    """
    path = folder / note
    if path.exists():
        if json.loads(path.read_text()) != described:
            raise DataError(
                f"{folder} holds a dataset of other settings or another input (see {note}):"
                f" give another {how}, or remove it"
            )
        return
    if folder.exists() and any(folder.iterdir()):
        raise DataError(f"{folder} is not empty: give another {how}")
    folder.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f"{note}.tmp")
    draft.write_text(json.dumps(described, indent=2) + "\n")
    draft.replace(path)


def _fingerprint(plan: Plan) -> str:
    """Of the names and contents of the input files."""
    digest = hashlib.sha256()
    for path in plan.paths.values():
        for file in files.find(path):
            digest.update(file.path.encode() + hashlib.sha256(file.read()).digest())
    return digest.hexdigest()[:16]
