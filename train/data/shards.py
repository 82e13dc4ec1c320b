"""Writing datasets as sharded ArrayRecord that TFDS reads, without TensorFlow.

Shards are made in parallel and renamed when whole, so that an interrupted preparation continues
with those that are missing. The command is ``prepare.py``.
"""

from collections.abc import Iterator
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
    import tensorflow_datasets as tfds

    folder = data_dir / name / "1.0.0"
    tokenizer = tokenizers.load(plan.tokenizer, ()) if plan.tokenizer else None
    if tokenizer is not None and tokenizer.end is None:
        raise DataError(f"--tokenizer {plan.tokenizer} has no end-of-document token")
    features, metadata = _features(plan, tokenizer)
    _claim(folder, plan)
    todo = [
        (split, shard)
        for split in plan.paths
        for shard in range(plan.shards)
        if not _shard(folder, name, split, shard, plan.shards).exists()
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
    counts = {split: _counts(folder, name, split, plan.shards) for split in plan.paths}
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
        description=f"Prepared by scanax from {', '.join(plan.paths.values())}",
    )
    return {split: sum(lengths) for split, lengths in counts.items()}


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
    """One shard, written beside its place and renamed. Runs in a process of its own."""
    from array_record.python import array_record_module  # pyright: ignore
    from tensorflow_datasets.core.example_serializer import ExampleSerializer

    tokenizer = tokenizers.load(plan.tokenizer, ()) if plan.tokenizer else None
    features, _ = _features(plan, tokenizer)
    serialiser = ExampleSerializer(features.get_serialized_info())
    path = _shard(folder, name, split, shard, plan.shards)
    draft = path.with_name(f"{path.name}.tmp")
    writer = array_record_module.ArrayRecordWriter(str(draft), "group_size:1")
    count = 0
    try:
        for record in _records(plan, plan.paths[split], shard, tokenizer):
            writer.write(serialiser.serialize_example(features.encode_example(record)))
            count += 1
    finally:
        writer.close()
    if not count:
        draft.unlink()
        raise DataError(f"shard {shard} of {split} would be empty: use fewer --shards")
    draft.replace(path)


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


def _shard(folder: pathlib.Path, name: str, split: str, shard: int, shards: int) -> pathlib.Path:
    return folder / f"{name}-{split}.array_record-{shard:05d}-of-{shards:05d}"


def _counts(folder: pathlib.Path, name: str, split: str, shards: int) -> list[int]:
    from array_record.python import array_record_module  # pyright: ignore

    counts = []
    for shard in range(shards):
        path = _shard(folder, name, split, shard, shards)
        reader = array_record_module.ArrayRecordReader(str(path))
        counts.append(reader.num_records())
        reader.close()
    return counts


def _claim(folder: pathlib.Path, plan: Plan) -> None:
    """Notes the plan and the input in the folder, or checks that they are the same."""
    described = {**dataclasses.asdict(plan), "input": _fingerprint(plan)}
    note = folder / PLAN
    if note.exists():
        if json.loads(note.read_text()) != described:
            raise DataError(
                f"{folder} holds a dataset of other settings or another input (see {note.name}):"
                " give another --name or --data_dir, or remove it"
            )
        return
    if folder.exists() and any(folder.iterdir()):
        raise DataError(f"{folder} is not empty: give another --name or --data_dir")
    folder.mkdir(parents=True, exist_ok=True)
    draft = note.with_name(f"{note.name}.tmp")
    draft.write_text(json.dumps(described, indent=2) + "\n")
    draft.replace(note)


def _fingerprint(plan: Plan) -> str:
    """Of the names and contents of the input files."""
    digest = hashlib.sha256()
    for path in plan.paths.values():
        for file in files.find(path):
            digest.update(file.path.encode() + hashlib.sha256(file.read()).digest())
    return digest.hexdigest()[:16]
