"""Tokenizers: bytes, characters, and whatever the ``tokenizers`` package loads.

Ids are int32 arrays. The last id of the built-in vocabularies ends a document.
"""

from collections.abc import Iterable
import hashlib
import json
import pathlib
from typing import Any, Protocol

import numpy as np

from .pipeline import DataError

END = "<|endoftext|>"
END_NAMES = (END, "</s>", "<eos>", "<|eos|>", "[SEP]")  # what published tokenizers call it


class Tokenizer(Protocol):
    """Text to ids and back.

    Attributes:
      vocab_size: ids are below it.
      end: id that ends a document, or None if the vocabulary has none.
      unknown: id of what the vocabulary cannot express, or None if it can express everything.
      identity: changes whenever the mapping changes.
      byte_lengths: [vocab_size] int32, UTF-8 bytes that each id stands for, for bits per byte;
        None if a token's bytes depend on its neighbours.
    """

    @property
    def vocab_size(self) -> int: ...

    @property
    def end(self) -> int | None: ...

    @property
    def unknown(self) -> int | None: ...

    @property
    def identity(self) -> str: ...

    @property
    def byte_lengths(self) -> np.ndarray | None: ...

    def encode(self, text: str) -> np.ndarray: ...

    def decode(self, ids: np.ndarray) -> str: ...


def load(name: str, corpus: Iterable[str]) -> Tokenizer:
    """The tokenizer that ``data.tokenizer`` names.

    Args:
      name: "byte"; "char"; a tokenizer.json; or a folder with GPT-2's vocab.json and merges.txt.
      corpus: training documents, read by "char" only.
    """
    if name == "byte":
        return Bytes()
    if name == "char":
        return Characters("".join(sorted(set().union(*map(set, corpus)))))
    return Pieces(name)


class Bytes:
    """UTF-8 bytes, 0 .. 255, and the end of a document, 256."""

    vocab_size, end, unknown, identity = 257, 256, None, "byte"
    byte_lengths = np.asarray([1] * 256 + [0], np.int32)

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode(), np.uint8).astype(np.int32)

    def decode(self, ids: np.ndarray) -> str:
        return _joined(ids, self.end, lambda run: bytes(run).decode(errors="replace"))


class Characters:
    """The characters of the training text in code order, an unknown one, and the end.

    Args:
      characters: sorted, without repetition.
    """

    def __init__(self, characters: str):
        self._codes = np.frombuffer(characters.encode("utf-32-le"), np.uint32)
        self._characters = [*characters, "\N{REPLACEMENT CHARACTER}"]
        self.unknown, self.end = len(characters), len(characters) + 1
        self.vocab_size = len(characters) + 2
        self.identity = f"char-{_hash(characters)}"
        lengths = [len(c.encode()) for c in characters]
        self.byte_lengths = np.asarray([*lengths, 1, 0], np.int32)

    def encode(self, text: str) -> np.ndarray:
        codes = np.frombuffer(text.encode("utf-32-le"), np.uint32)
        places = np.minimum(np.searchsorted(self._codes, codes), len(self._codes) - 1)
        return np.where(self._codes[places] == codes, places, self.unknown).astype(np.int32)

    def decode(self, ids: np.ndarray) -> str:
        return _joined(ids, self.end, lambda run: "".join(self._characters[i] for i in run))


class Pieces:
    """A tokenizer of the ``tokenizers`` package, for example byte-level BPE.

    Args:
      path: tokenizer.json, or a folder with vocab.json and merges.txt (GPT-2's files).
    """

    def __init__(self, path: str):
        self._tokenizer: Any = _read_pieces(pathlib.Path(path).expanduser())
        vocab = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocab.values()) + 1
        self.end = next((vocab[name] for name in END_NAMES if name in vocab), None)
        self.unknown = vocab.get(getattr(self._tokenizer.model, "unk_token", None))
        self.identity = f"pieces-{_hash(self._tokenizer.to_str())}"
        self.byte_lengths = None
        if (json.loads(self._tokenizer.to_str())["decoder"] or {}).get("type") == "ByteLevel":
            special = self._tokenizer.get_added_tokens_decoder()
            self.byte_lengths = np.zeros(self.vocab_size, np.int32)
            for name, i in vocab.items():  # one character stands for one byte
                self.byte_lengths[i] = 0 if i in special else len(name)

    def encode(self, text: str) -> np.ndarray:
        return np.asarray(self._tokenizer.encode(text, add_special_tokens=False).ids, np.int32)

    def decode(self, ids: np.ndarray) -> str:
        return self._tokenizer.decode(ids.tolist(), skip_special_tokens=False)


def train_bpe(corpus: Iterable[str], vocab_size: int, path: pathlib.Path) -> int:
    """Trains byte-level BPE (Sennrich et al. 2016) with an end of document; writes ``path``.

    Returns:
      The size of the vocabulary, which is smaller than asked for if the corpus is.
    """
    tokenizers = _package()
    if vocab_size < 257:
        raise DataError(f"byte-level BPE needs a vocabulary of at least 257, got {vocab_size}")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    _byte_level(tokenizers, tokenizer)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    path.parent.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(path))
    return tokenizer.get_vocab_size()


def _read_pieces(path: pathlib.Path) -> Any:
    tokenizers = _package()
    if not path.exists():
        raise DataError(
            f"data.tokenizer {path} does not exist: choose byte, char, a tokenizer.json (train one"
            " with python -m scanax.train.data.prepare tokenizer) or a folder with vocab.json and"
            " merges.txt"
        )
    try:
        if path.is_file():
            return tokenizers.Tokenizer.from_file(str(path))
        vocab, merges = path / "vocab.json", path / "merges.txt"
        for file in (vocab, merges):
            if not file.is_file():
                raise DataError(f"data.tokenizer {path} has no {file.name}")
        bpe = tokenizers.models.BPE.from_file(str(vocab), str(merges))
        tokenizer = tokenizers.Tokenizer(bpe)
        _byte_level(tokenizers, tokenizer)
        ends = [name for name in END_NAMES if name in json.loads(vocab.read_text())]
        tokenizer.add_special_tokens(ends)
        return tokenizer
    except DataError:
        raise
    except Exception as error:  # the package raises bare Exception
        raise DataError(f"data.tokenizer {path} cannot be read: {error}") from error


def _byte_level(tokenizers: Any, tokenizer: Any) -> None:
    """GPT-2's splitting into words, and bytes as characters."""
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()


def _package() -> Any:
    try:
        import tokenizers
        import tokenizers.decoders
        import tokenizers.models
        import tokenizers.pre_tokenizers
        import tokenizers.trainers
    except ImportError as error:
        raise DataError("this data.tokenizer needs: pip install 'scanax[text]'") from error
    return tokenizers


def _joined(ids: np.ndarray, end: int, decode) -> str:
    """Decodes the runs between ends of documents, which appear as a line of their own."""
    ids = np.asarray(ids)
    runs = np.split(ids, np.flatnonzero(ids == end))
    texts = [decode([i for i in run.tolist() if i != end]) for run in runs]
    return f"\n{END}\n".join(texts)


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
