"""Text: tokenizers, held-out parts, layouts, and what is said of text that cannot be used."""

import gzip
import zipfile

import numpy as np
import pytest

from scanax.configs import base
from scanax.train.config import build
from scanax.train.data import tokenizer as tokenizers
from scanax.train.data.layout import Blocks, Packed, Streams, Tokens, best_fit
from scanax.train.data.pipeline import IGNORE, Batches, DataError
from scanax.train.data.text import Corpus, TextConfig, hold_out, tokenise

DOCUMENTS = [f"document {i} " + "word " * (i % 7) for i in range(40)]


def corpus(**changes) -> Corpus:
    defaults = base.get_config("language_model").data.to_dict()
    return Corpus(build(TextConfig, {**defaults, **changes}, "data"))


def take(source, *records: int) -> dict[str, np.ndarray]:
    return source.batch(np.asarray(records), np.asarray(records))


def tokens(*sizes: int) -> Tokens:
    starts = np.cumsum([0, *sizes])
    return Tokens(np.arange(starts[-1], dtype=np.uint16), starts)


# Tokenizers.


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    path = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
    assert tokenizers.train_bpe(corpus().documents[0], 400, path) == 400
    return path


@pytest.mark.parametrize("name", ["byte", "char", "bpe"])
def test_text_survives_tokenisation(name, bpe):
    text = "naïve\tcafé — 漢字\n  two  spaces 🙂"
    found = tokenizers.load(str(bpe) if name == "bpe" else name, [text])
    ids = found.encode(text)
    assert ids.dtype == np.int32 and 0 <= ids.min() and ids.max() < found.vocab_size
    assert found.decode(ids) == text
    assert found.byte_lengths[ids].sum() == len(text.encode())
    assert found.end is not None and found.byte_lengths[found.end] == 0
    assert tokenizers.END in found.decode(np.append(ids, found.end))


def test_gpt2_files_give_the_same_ids(bpe, tmp_path):
    """vocab.json and merges.txt, as GPT-2 is published, instead of tokenizer.json."""
    import tokenizers as package

    package.Tokenizer.from_file(str(bpe)).model.save(str(tmp_path))
    assert {p.name for p in tmp_path.iterdir()} == {"vocab.json", "merges.txt"}
    text = "the statement's value, in 1,024 parts\n\n  end"
    one, other = tokenizers.load(str(bpe), ()), tokenizers.load(str(tmp_path), ())
    np.testing.assert_array_equal(one.encode(text), other.encode(text))
    assert one.end == other.end and len(one.encode(text)) < len(text)


def test_identity_follows_the_mapping(bpe, tmp_path):
    other = tmp_path / "other.json"
    tokenizers.train_bpe(corpus().documents[0], 399, other)
    names = {tokenizers.load(str(path), ()).identity for path in (bpe, other, bpe)}
    names |= {tokenizers.load("char", [text]).identity for text in ("ab", "abc", "cba")}
    assert len(names) == 4


def test_characters_not_seen_in_training_are_one_token():
    found = tokenizers.load("char", ["abc"])
    np.testing.assert_array_equal(found.encode("axc"), [0, found.unknown, 2])
    assert found.vocab_size == 5


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda path: None, "does not exist: choose byte, char"),
        (lambda path: path.write_text("{}"), "cannot be read"),
        (lambda path: path.mkdir(), "has no vocab.json"),
    ],
)
def test_bad_tokenizers(make, message, tmp_path):
    path = tmp_path / "tokenizer.json"
    make(path)
    with pytest.raises(DataError, match=message):
        tokenizers.load(str(path), ())


# Layouts.


def test_packed_rows_hold_every_document_once():
    found = tokenise(DOCUMENTS, tokenizers.Bytes(), end=True)
    packed = Packed(found, 64, split_long=False, what="text")
    batch = take(packed, *range(len(packed)))
    assert packed.fill > 0.9 and (batch["segments"] > 0).mean() == pytest.approx(packed.fill)
    seen = []
    for row in range(len(packed)):
        segments = batch["segments"][row]
        for number in range(1, segments.max() + 1):
            here = segments == number
            seen.append(tokenizers.Bytes().decode(batch["ids"][row][here][:-1]))
            np.testing.assert_array_equal(batch["positions"][row][here], np.arange(here.sum()))
            labels = batch["labels"][row][here]
            np.testing.assert_array_equal(labels[:-1], batch["ids"][row][here][1:])
            assert labels[-1] == IGNORE
    assert sorted(seen) == sorted(DOCUMENTS)
    assert (batch["labels"][batch["segments"] == 0] == IGNORE).all()


def test_best_fit_is_no_worse_than_a_plain_search():
    generator = np.random.default_rng(0)
    for _ in range(20):
        sizes = generator.integers(1, 33, size=60)
        rows, count = best_fit(sizes, 32)
        space = []  # best fit decreasing, row by row
        for size in sorted(sizes, reverse=True):
            fitting = [(room, i) for i, room in enumerate(space) if room >= size]
            if fitting:
                space[min(fitting)[1]] -= size
            else:
                space.append(32 - size)
        assert np.bincount(rows, weights=sizes).max() <= 32
        assert count == len(space) and set(rows) == set(range(count))


def test_long_documents_are_an_error_or_split():
    with pytest.raises(DataError, match=r"2 documents are longer .* first is document 1 with 9"):
        Packed(tokens(3, 9, 4, 7), 4, split_long=False, what="text")
    split = Packed(tokens(3, 9, 4, 7), 4, split_long=True, what="text")
    batch = take(split, *range(len(split)))
    np.testing.assert_array_equal(np.sort(batch["ids"][batch["segments"] > 0]), np.arange(23))


def test_blocks_are_disjoint_and_predict_every_token():
    blocks = Blocks(tokens(10, 13), 5, None, "text")
    batch = take(blocks, *range(len(blocks)))
    np.testing.assert_array_equal(batch["ids"].ravel(), np.arange(20))
    np.testing.assert_array_equal(batch["labels"].ravel(), np.arange(1, 21))


def test_blocks_move_with_the_epoch():
    blocks = Blocks(tokens(1000), 10, 3, "text")
    offsets = []
    for epoch in range(30):
        draws = epoch * len(blocks) + np.arange(len(blocks))
        ids = blocks.batch(np.arange(len(blocks)), draws)["ids"]
        offsets.append(int(ids[0, 0]))
        np.testing.assert_array_equal(ids.ravel(), offsets[-1] + np.arange(ids.size))
    assert set(offsets) == set(range(10))


def test_streams_run_on_from_batch_to_batch():
    streams = Streams(tokens(103), 5, batch_size=4, seed=1, what="text")
    batches = Batches(streams, 4, 0, 1)
    epochs = []
    for i in range(2 * len(streams) // 4):
        batch = next(batches)
        np.testing.assert_array_equal(batch["reset"], i % (len(streams) // 4) == 0)
        if batch["reset"].all():
            epochs.append([])
        epochs[-1].append(batch["ids"])
        np.testing.assert_array_equal(batch["labels"], batch["ids"] + 1)
    for epoch in epochs:
        rows = np.concatenate(epoch, axis=1)
        np.testing.assert_array_equal(rows - rows[:, :1], np.arange(rows.shape[1])[None] + 0 * rows)
        np.testing.assert_array_equal(rows[:, 0] - rows[0, 0], np.arange(4) * (103 // 4))
    assert len(epochs) == 2 and epochs[0][0][0, 0] != epochs[1][0][0, 0]


@pytest.mark.parametrize(
    "make", [lambda t: Blocks(t, 50, None, "text"), lambda t: Streams(t, 10, 4, 0, "text")]
)
def test_too_little_text(make):
    with pytest.raises(DataError, match="too few"):
        make(tokens(30))


# Sources and the parts held out.


def test_embedded_text_is_the_manual():
    train, evaluation = corpus().documents
    assert len(train) > 50 and len(evaluation) > 3 and not set(train) & set(evaluation)
    assert "for" in " ".join(train) and sum(map(len, train)) > 300_000


def test_what_is_held_out_does_not_depend_on_the_order():
    train, evaluation = hold_out(DOCUMENTS, "hash", 0.2)
    assert 2 <= len(evaluation) <= 16 and len(train) + len(evaluation) == 40
    assert set(hold_out(DOCUMENTS[::-1], "hash", 0.2)[1]) == set(evaluation)
    train, evaluation = hold_out(["0123456789"], "tail", 0.2)
    assert (train, evaluation) == (["01234567"], ["89"])
    with pytest.raises(DataError, match=r"set data\.holdout=tail"):
        hold_out(["0123456789"], "hash", 0.2)


def test_files_of_every_kind_hold_the_same_documents(tmp_path, monkeypatch):
    folder = tmp_path / "folder"
    folder.mkdir()
    for i, document in enumerate(DOCUMENTS):
        (folder / f"{i:02d}.txt").write_text(document)
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        for i, document in enumerate(DOCUMENTS):
            archive.writestr(f"inside/{i:02d}.txt", document)
    joined = "\n\n".join(DOCUMENTS)
    (tmp_path / "one.txt.gz").write_bytes(gzip.compress(joined.encode()))
    (tmp_path / "unnamed").write_text(joined)
    (tmp_path / "marked.txt").write_bytes(b"\xef\xbb\xbf" + joined.replace("\n", "\r\n").encode())
    monkeypatch.setenv("SCANAX_DATA", str(tmp_path))
    for changes in (
        {"path": "folder/*.txt"},
        {"path": "folder"},
        {"path": "all.zip"},
        {"path": "all.zip/inside"},
        {"path": str(tmp_path / "one.txt.gz"), "separator": "\n\n"},
        {"path": "marked.txt", "separator": "\n\n"},
        {"path": "unnamed", "separator": "\n\n"},
    ):
        train, evaluation = corpus(source="files", **changes).documents
        assert sorted(train + evaluation) == sorted(DOCUMENTS), changes


@pytest.mark.parametrize(
    "content, changes, message",
    [
        (b"", {}, "is empty"),
        (b"caf\xe9", {}, r"not UTF-8 \(byte 0xe9 at offset 3\).*iconv"),
        (b"one", {"separator": "%%"}, "has no data.separator '%%'"),
        (b"one", {"path": "absent.txt"}, "absent.txt does not exist"),
        (b"one", {"path": "*.text"}, "no file matches"),
        (b"one", {"path": ""}, "data.path is empty"),
        (b"one", {"eval_path": "absent.txt"}, "absent.txt does not exist"),
        (b"one", {"clean": "gutenberg"}, "data.clean=gutenberg"),
    ],
)
def test_files_that_cannot_be_used(content, changes, message, tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_bytes(content)
    monkeypatch.setenv("SCANAX_DATA", str(tmp_path))
    with pytest.raises(DataError, match=message):
        _ = corpus(source="files", **{"path": "a.txt", **changes}).documents


@pytest.mark.parametrize("name", ["a.txt.gz", "a.zip"])
def test_damaged_archives(name, tmp_path, monkeypatch):
    path = tmp_path / name
    if name.endswith(".zip"):
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("a.txt", "text " * 1000)
    else:
        path.write_bytes(gzip.compress(b"text " * 1000))
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 0x55
    path.write_bytes(bytes(content))
    monkeypatch.setenv("SCANAX_DATA", str(tmp_path))
    with pytest.raises(DataError, match="damaged"):
        _ = corpus(source="files", path=name).documents


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"source": "web"}, "data.source must be one of"),
        ({"layout": "rows"}, "data.layout=rows needs"),
        ({"random_offset": True, "layout": "packed"}, "random_offset"),
        ({"eval_fraction": 0.0}, "eval_fraction"),
        ({"length": 1}, "data.length"),
    ],
)
def test_wrong_configs(changes, message):
    with pytest.raises(ValueError, match=message):
        corpus(**changes)


def test_identity_names_text_tokenizer_and_layout():
    found = corpus().train_batches(4, 0, 1).identity
    for changes in ({"tokenizer": "char"}, {"length": 128}, {"layout": "packed"}, {"seed": 1}):
        other = corpus(long_documents="split", **changes).train_batches(4, 0, 1).identity
        assert other != found, changes
    assert corpus().train_batches(4, 0, 1).identity == found
