"""Cleaning of documents: undoing the tokenisation of benchmark corpora, and book covers.

Wikitext, PTB and LM1B are published with spaces around punctuation. Perplexities under
another tokenizer compare with published ones only after the same repairs, in the same order:
these are those of the protocol that RADD shares with SEDD and MDLM (Ou et al. 2025; Lou et
al. 2024; Sahoo et al. 2024). They are no general detokenizers, and do not try to be right
where the protocol is not.
"""

from collections.abc import Callable, Sequence
import re

Rule = tuple[str, str]  # a regular expression and what replaces it


def wikitext(text: str) -> str:
    """Repairs WikiText-2 and WikiText-103 (raw)."""
    return _apply(_WIKITEXT, text)


def ptb(text: str) -> str:
    """Repairs the Penn Treebank's language-modelling text; numbers, which are N, become 1."""
    return _apply(_PTB, text)


def lm1b(text: str) -> str:
    """Repairs the One Billion Word benchmark."""
    return _apply(_LM1B, text)


def lambada(text: str) -> str:
    """LAMBADA: straight double quotes, no space around, a line break before."""
    return "\n" + text.replace("“", '"').replace("”", '"').strip()


def gutenberg(text: str) -> str:
    """A book of Project Gutenberg without its header and licence.

    Raises:
      ValueError: if the lines that mark begin and end are not there.
    """
    begin = re.search(r"^\*\*\* ?START OF.*\n", text, re.MULTILINE | re.IGNORECASE)
    closing = r"^(\*\*\* ?END OF|End of (the )?Project Gutenberg)"
    end = re.search(closing, text, re.MULTILINE | re.IGNORECASE)
    if begin is None or end is None or end.start() < begin.end():
        raise ValueError(
            "a text has no '*** START OF' and '*** END OF' lines of Project Gutenberg: leave"
            " data.clean=none for it"
        )
    return text[begin.end() : end.start()].strip() + "\n"


def _apply(rules: Sequence[Rule], text: str) -> str:
    for pattern, replacement in rules:
        text = re.sub(pattern, replacement, text)
    return text


def _exactly(*pairs: tuple[str, str]) -> list[Rule]:
    """Rules that replace strings as they are written."""
    return [(re.escape(old), new.replace("\\", r"\\")) for old, new in pairs]


def _inside(opening: str, closing: str, space: str) -> Rule:
    """Removes the space inside a pair of brackets or quotes."""
    a, b = re.escape(opening), re.escape(closing)
    inner = f"[^{a}{b}]+" if space == " " else f"[^{b}]*?"
    return f"{a}{space}({inner}){space}{b}", rf"{opening}\1{closing}"


_PAIRS = (("(", ")"), ("[", "]"), ("{", "}"), ('"', '"'), ("'", "'"))

_WIKITEXT = [
    *_exactly(("s '", "s'"), (" @-@ ", "-"), (" @,@ ", ","), (" @.@ ", ".")),
    *_exactly(*((f" {mark} ", f"{mark} ") for mark in ":;.!?,")),
    *(_inside(opening, closing, r"\s*") for opening, closing in _PAIRS),
    *_exactly(("= = = =", "===="), ("= = =", "==="), ("= =", "=="), (" ° ", "°")),
    *_exactly((" \n", "\n"), ("\n ", "\n"), (" N ", " 1 "), (" 's", "'s")),
]

_PTB = [
    *_exactly((" 's", "'s"), ("s ' ", "s' "), (" n't", "n't"), (" \n ", "\n"), ("\\/", "/")),
    *(_exactly((" N ", " 1 ")) * 10),
    *_exactly(("$ 1", "$1"), ("# 1", "#1"), ("<unk>", "?")),
]

_LM1B = [
    *_exactly(("http : / / ", "http://"), ("https : / / ", "https://")),
    (r" '(\w+)", r"'\1"),
    (r" (\w+) \. ", r" \1. "),
    (r" (\w+) \.$", r" \1."),
    *(
        rule
        for mark in "?!"
        for rule in (*_exactly((f" {mark} ", f"{mark} ")), (rf" \{mark}$", mark))
    ),
    *_exactly((" , ", ", "), (" : ", ": "), (" ; ", "; "), (" / ", "/")),
    *(_inside(*pair, " ") for pair in (_PAIRS[3], _PAIRS[4], _PAIRS[0], _PAIRS[1])),
    *_exactly(("$ ", "$"), ("£ ", "£")),
]

CLEANERS: dict[str, Callable[[str], str]] = {
    "none": lambda text: text,
    "gutenberg": gutenberg,
    "wikitext": wikitext,
    "ptb": ptb,
    "lm1b": lm1b,
    "lambada": lambada,
}
