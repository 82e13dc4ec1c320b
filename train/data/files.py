"""Reading files: text documents, images and arrays, from folders and zips.

A path is a file, a glob ("books/*.txt"), a folder, or a place inside a zip written as if the
zip were a folder ("images.zip/train"). A relative path is looked for under the environment
variable SCANAX_DATA if that is set, else in the current folder. Every problem is a DataError
that names the file.
"""

from collections.abc import Callable, Iterator
import contextlib
import dataclasses
import glob
import gzip
import io
import os
import pathlib
import zipfile
import zlib

import numpy as np
from PIL import Image, UnidentifiedImageError

from .pipeline import DataError

TEXT_SUFFIXES = (".txt", ".txt.gz", ".md", ".text")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".ppm", ".pgm", ".webp")


@dataclasses.dataclass(frozen=True)
class File:
    """A file on disk or a member of a zip.

    Attributes:
      name: for messages, e.g. "images.zip/train/cat/1.png".
      path: within what was asked for, e.g. "cat/1.png".
      read: returns the bytes, decompressed if the name ends in .gz.
    """

    name: str
    path: str
    read: Callable[[], bytes]


def find(path: str) -> list[File]:
    """All files at ``path``, in the order of their names."""
    if not path:
        raise DataError("data.path is empty: give a file, a glob, a folder or a place in a zip")
    whole = _absolute(path)
    matches = sorted(glob.glob(str(whole))) if glob.has_magic(str(whole)) else [str(whole)]
    files = [file for match in matches for file in _expand(pathlib.Path(match))]
    if not files:
        raise DataError(f"data.path {path}: no file matches {whole}")
    return files


def read_text(file: File) -> str:
    """The text of a UTF-8 file; line ends become "\\n", a byte order mark is dropped."""
    content = file.read()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{file.name} is not UTF-8 (byte 0x{content[error.start]:02x} at offset {error.start});"
            " convert it, e.g. with: iconv -f latin1 -t utf-8"
        ) from error
    if not text.strip():
        raise DataError(f"{file.name} is empty: remove it, or leave it out of data.path")
    return text.replace("\r\n", "\n")


def documents(path: str, separator: str) -> Iterator[str]:
    """The documents at ``path``: one per file, or the parts between ``separator``."""
    found = find(path)
    files = [f for f in found if f.name.lower().endswith(TEXT_SUFFIXES)]
    if len(found) == 1:
        files = found  # named by the user: text whatever it is called
    if not files:
        raise DataError(f"data.path {path} holds no text ({', '.join(TEXT_SUFFIXES)})")
    for file in files:
        text = read_text(file)
        if not separator:
            yield text
            continue
        parts = [part for part in text.split(separator) if part.strip()]
        if len(parts) < 2:
            raise DataError(
                f"{file.name} has no data.separator {separator!r} in it; leave the separator"
                " empty if a file is one document"
            )
        yield from parts


def decode_image(file: File, channels: int) -> np.ndarray:
    """An image file as [H, W, channels] uint8 (1: grey, 3: RGB)."""
    with _open_image(file) as image:
        array = np.asarray(image.convert("L" if channels == 1 else "RGB"))
    return array.reshape(*array.shape[:2], channels)


def read_array(file: File, key: str = "") -> np.ndarray:
    """An array of an .npy, .npz (entry ``key``) or idx file."""
    try:
        if ".npz" in file.name:
            with np.load(io.BytesIO(file.read()), allow_pickle=False) as entries:
                if key not in entries:
                    raise DataError(f"{file.name} has no array {key!r}; it has {entries.files}")
                return entries[key]
        if ".npy" in file.name:
            return np.load(io.BytesIO(file.read()), allow_pickle=False)
        return _idx(file)
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{file.name} cannot be read as an array: {error}") from error


def _idx(file: File) -> np.ndarray:
    """The idx format: two zero bytes, type, number of axes, sizes (big endian), data."""
    content = file.read()
    if len(content) < 4 or content[:3] != b"\0\0\x08":
        raise DataError(f"{file.name} is not an idx file of bytes: it must begin with 00 00 08")
    axes = content[3]
    shape = np.frombuffer(content, ">u4", axes, offset=4).astype(int)
    data = np.frombuffer(content, np.uint8, offset=4 + 4 * axes)
    if data.size != shape.prod():
        raise DataError(
            f"{file.name} is cut off: it should hold {shape.prod()} bytes of data, not {data.size}"
        )
    return data.reshape(shape)


def _absolute(path: str) -> pathlib.Path:
    expanded = pathlib.Path(path).expanduser()
    return pathlib.Path(os.environ.get("SCANAX_DATA", ".")) / expanded


def _expand(path: pathlib.Path) -> Iterator[File]:
    """The files of a folder, of a zip or of a part of a zip, or the file itself."""
    archive = next((p for p in (path, *path.parents) if p.suffix == ".zip" and p.is_file()), None)
    if archive is not None:
        yield from _members(archive, str(path.relative_to(archive)).strip("."))
    elif path.is_dir():
        for child in sorted(p for p in path.rglob("*") if p.is_file()):
            if not child.name.startswith("."):
                yield _on_disk(child, str(child.relative_to(path)))
    elif path.is_file():
        yield _on_disk(path, path.name)
    else:
        raise DataError(
            f"{path} does not exist (SCANAX_DATA is {os.environ.get('SCANAX_DATA', 'not set')})"
        )


def _on_disk(path: pathlib.Path, within: str) -> File:
    return File(str(path), within, lambda: _unzip(path.read_bytes(), str(path)))


def _members(archive: pathlib.Path, prefix: str) -> Iterator[File]:
    try:
        opened = zipfile.ZipFile(archive)
    except zipfile.BadZipFile as error:
        raise DataError(f"{archive} is damaged ({error}): copy it again") from error
    folder = f"{prefix.rstrip('/')}/" if prefix else ""
    for name in sorted(opened.namelist()):
        hidden = "__MACOSX" in name or name.rsplit("/", 1)[-1].startswith(".")
        if name.endswith("/") or hidden or not (name.startswith(folder) or name == prefix):
            continue
        within = name.removeprefix(folder) or name

        def read(name: str = name) -> bytes:
            try:
                return _unzip(opened.read(name), name)
            except (zipfile.BadZipFile, zlib.error) as error:
                raise DataError(f"{archive}/{name} is damaged ({error}): copy it again") from error

        yield File(f"{archive}/{name}", within, read)


def _unzip(content: bytes, name: str) -> bytes:
    if not name.endswith(".gz"):
        return content
    try:
        return gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{name} is damaged ({error}): copy it again") from error


def is_grey(file: File) -> bool:
    """Whether an image file has one channel."""
    with _open_image(file) as image:
        return image.mode in ("1", "L", "LA", "I", "I;16")


@contextlib.contextmanager
def _open_image(file: File) -> Iterator[Image.Image]:
    """An image to be decoded inside the context; a DataError if it cannot be."""
    try:
        with Image.open(io.BytesIO(file.read())) as image:
            yield image
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        raise DataError(
            f"{file.name} does not decode as an image ({error}): replace or remove it"
        ) from error
