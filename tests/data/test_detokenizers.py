"""Detokenizers against reference outputs, and books without their covers."""

import numpy as np
import pytest

from scanax.train.data.detokenizers import CLEANERS, gutenberg


@pytest.mark.parametrize("name", ["wikitext", "ptb", "lm1b", "lambada"])
def test_reference_outputs(name, golden):
    with np.load(golden / "radd" / "detokenizers.npz") as values:
        texts, expected = values["text"].tolist(), values[name].tolist()
    assert len(texts) == 7
    assert [CLEANERS[name](text) for text in texts] == expected


@pytest.mark.parametrize(
    "mark", ["*** {} OF THE PROJECT", "***{} OF THIS PROJECT", "*** {} of the"]
)
def test_books_lose_their_covers(mark):
    begin, end = mark.format("START"), mark.format("END")
    closing = f"End of the Project Gutenberg EBook\n{end} X ***\nLicence"
    book = f"Title\nabout *** START\n{begin} X ***\n\nChapter 1\n\nText.\n\n{closing}"
    assert gutenberg(book) == "Chapter 1\n\nText.\n"


@pytest.mark.parametrize("text", ["text", "*** START OF X\ntext", "*** END OF\n*** START OF\n"])
def test_a_text_without_covers_is_an_error(text):
    with pytest.raises(ValueError, match="START OF"):
        gutenberg(text)
