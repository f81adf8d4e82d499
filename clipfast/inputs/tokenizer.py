"""Text to tokens: the byte-pair encoding of OpenAI's CLIP, with the same tokens on every string.

The vocabulary beside this file, `bpe_simple_vocab_16e6.txt.gz`, is OpenAI's (github.com/openai/CLIP, MIT licence), cut
after the 48,894 merges that CLIP uses.

Where the speed comes from: OpenAI's time goes into ftfy and into a regex over the whole caption. Plain ASCII needs
neither: ftfy leaves it as it is, and as no token spans a space, whole words can be looked up; only a word not met before
goes through the regex and the merges (Hugging Face's `tokenizers`). A word is remembered as the bytes of its int32
tokens, so a row is one join.
"""

import gzip
import html
from array import array
from collections.abc import Callable, Iterable, Sequence
from functools import cache, cached_property, lru_cache
from pathlib import Path
from typing import Any, Literal, overload

import regex
import torch
from tokenizers.models import BPE
from torch import Tensor

START, END = "<|startoftext|>", "<|endoftext|>"
MERGES = 49152 - 256 - 2  # of the vocabulary's: CLIP has room for them beside 256 bytes, the same ending a word, and START, END


# ---- the names of OpenAI's simple_tokenizer.py, with its values


@cache
def default_bpe() -> str:
    """Path of the vocabulary."""
    return str(Path(__file__).with_name("bpe_simple_vocab_16e6.txt.gz"))


@lru_cache
def bytes_to_unicode() -> dict[int, str]:
    """One printable character for each of the 256 bytes, in the order of the first 256 token ids.

    Printable Latin-1 stands for itself, the others for the characters from U+0100 on (the byte-level BPE of GPT-2).
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


def get_pairs(word: Sequence[str]) -> set[tuple[str, str]]:
    """Every two neighbours of a word's symbols."""
    return set(zip(word, word[1:], strict=False))


def basic_clean(text: str) -> str:
    """Repaired by ftfy, HTML entities resolved twice, without white space at the ends."""
    return _repaired(text).strip()


def whitespace_clean(text: str) -> str:
    """One space for each run of white space, none at the ends."""
    return regex.sub(r"\s+", " ", text).strip()


def _repaired(text: str) -> str:
    import ftfy  # here, as it takes 0.1 s to import, and plain text does without

    return html.unescape(html.unescape(ftfy.fix_text(text)))


# ---- and the quick way to the same tokens


def clean(text: str) -> str:
    """Lower-cased `text`, repaired as OpenAI does: ftfy, HTML entities twice. White space is left for `split`."""
    # On printable ASCII ftfy changes nothing but HTML entities, and an ampersand before a space begins none. White space
    # at the ends goes either way. Tabs, line breaks and control characters inside take the exact path below.
    if text.isascii() and text.strip().isprintable() and ("&" not in text or "&" not in text.replace("& ", "")):
        return text.lower()
    return " ".join(_repaired(text).split()).lower()  # in this order: what lower() does to a sigma depends on its neighbours


class _Words(dict[str, bytes]):
    """The tokens of each word met; a hit runs no Python. When full it starts afresh: the frequent words are soon back."""

    LIMIT = 1 << 17  # words, about 25 MB
    LONGEST = 64  # characters; longer ones are not words that come again

    def __init__(self, encode: Callable[[str], bytes]):
        super().__init__()
        self.encode = encode

    def __missing__(self, word: str) -> bytes:
        value = self.encode(word)
        if len(word) <= self.LONGEST:
            if len(self) >= self.LIMIT:
                self.clear()
            self[word] = value
        return value


class SimpleTokenizer:
    """The tokenizer as OpenAI's users reach it (`clip.simple_tokenizer.SimpleTokenizer`).

    `encoder` maps token strings to ids, `decoder` ids to token strings.
    """

    def __init__(self, bpe_path: str = default_bpe()) -> None:  # noqa: B008 - as OpenAI's: the name of a file
        self._path = bpe_path
        try:
            with gzip.open(bpe_path, "rt", encoding="utf-8") as file:
                lines = file.read().split("\n")[1 : MERGES + 1]  # line 0 is a heading
        except (OSError, EOFError, UnicodeDecodeError) as error:
            raise OSError(f"{bpe_path}: expected a gzip file of merges, a line each, got: {error}") from error
        merges = [(left, right) for left, right in map(str.split, filter(None, lines))]
        self.byte_encoder = bytes_to_unicode()
        self.byte_decoder = {character: byte for byte, character in self.byte_encoder.items()}
        self.merges = merges
        letters = list(self.byte_encoder.values())
        vocabulary = [*letters, *(x + "</w>" for x in letters), *(left + right for left, right in merges), START, END]
        self.encoder = {token: i for i, token in enumerate(vocabulary)}
        self.decoder = dict(enumerate(vocabulary))
        self.cache = {START: START, END: END}  # of `bpe`
        self.pat = regex.compile(
            rf"{regex.escape(START)}|{regex.escape(END)}"
            r"|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+",
            regex.IGNORECASE,
        )
        self._model = BPE(self.encoder, merges, end_of_word_suffix="</w>")
        self._words = _Words(self._encode_word)
        self._made_of = self.pat, len(self.encoder)

    def __reduce__(self) -> tuple[Any, ...]:
        """A worker process reads the vocabulary again, rather than inherit the words met."""
        changed = {} if self._quick() else {name: getattr(self, name) for name in ("pat", "encoder", "decoder", "cache")}
        return type(self), (self._path,), changed

    @cached_property
    def bpe_ranks(self) -> dict[tuple[str, str], int]:
        """Place of each merge."""
        return {merge: rank for rank, merge in enumerate(self.merges)}

    def bpe(self, token: str) -> str:
        """The tokens of a word in the characters of `byte_encoder`, a space between two; the last one ends in "</w>"."""
        if token in self.cache:
            return self.cache[token]
        word = [*token[:-1], token[-1] + "</w>"]
        if len(word) == 1:
            return word[0]
        while len(word) > 1:
            first, second = min(get_pairs(word), key=lambda pair: self.bpe_ranks.get(pair, len(self.bpe_ranks)))
            if (first, second) not in self.bpe_ranks:
                break
            merged: list[str] = []
            for symbol in word:
                if merged and merged[-1] is first and symbol == second:  # not one merged just now: "aaa" gives "aa a"
                    merged[-1] = first + second
                else:
                    merged.append(first if symbol == first else symbol)
            word = merged
        self.cache[token] = " ".join(word)
        return self.cache[token]

    def _quick(self) -> bool:
        """Whether nobody has added tokens, replaced the pattern or overridden `bpe`: they are what is to run then."""
        own = type(self).bpe is SimpleTokenizer.bpe and "bpe" not in self.__dict__
        return own and self._made_of == (self.pat, len(self.encoder))

    def _as_changed(self, text: str) -> list[int]:
        """OpenAI's way, through `pat`, `bpe` and `encoder` as they are now."""
        words = self.pat.findall(whitespace_clean(basic_clean(text)).lower())
        letters = ("".join([self.byte_encoder[byte] for byte in word.encode("utf-8")]) for word in words)
        return [self.encoder[token] for word in letters for token in self.bpe(word).split(" ")]

    def _encode_word(self, word: str) -> bytes:
        """The int32 tokens of a text without white space, as bytes."""
        # A whole ASCII word of the vocabulary is its own token: the merges arrive there for each of them (a test holds it).
        whole = self.encoder.get(word if word in (START, END) else word + "</w>")
        if whole is not None and word.isascii():
            return array("i", [whole]).tobytes()
        pieces = self.pat.findall(word)
        if pieces != [word]:  # "dog," or "dog's": the pieces are likely to be known
            return b"".join(map(self._words.__getitem__, pieces))
        letters = "".join([self.byte_encoder[byte] for byte in word.encode("utf-8")])
        return array("i", [token.id for token in self._model.tokenize(letters)]).tobytes()

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, of any length, without start and end tokens."""
        if not self._quick():
            return self._as_changed(text)
        return array("i", b"".join(map(self._words.__getitem__, clean(text).split()))).tolist()

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of `tokens`; every word is followed by a space, bytes that are not UTF-8 become U+FFFD."""
        characters = "".join([self.decoder[int(token)] for token in tokens])
        text = bytes([self.byte_decoder[character] for character in characters]).decode("utf-8", errors="replace")
        return text.replace("</w>", " ")

    def rows(self, texts: Iterable[str], context_length: int, truncate: bool) -> list[bytes]:
        """Each text as one row of `tokenize`: int32 [context_length], as bytes."""
        tokens, quick = self._words.__getitem__, self._quick()
        start, end = (array("i", [self.encoder[token]]).tobytes() for token in (START, END))
        width = len(start) * context_length
        rows = []
        for text in texts:
            if not isinstance(text, str):
                raise TypeError(f"expected a text or a sequence of texts, got a {type(text).__name__}: {text!r:.60}")
            found = map(tokens, clean(text).split()) if quick else [array("i", self._as_changed(text)).tobytes()]
            row = b"".join((start, *found, end))
            if len(row) > width:
                if not truncate:
                    raise RuntimeError(f"Input {text} is too long for context length {context_length}")
                row = row[: width - len(end)] + end
            rows.append(row.ljust(width, b"\0"))
        return rows


@cache
def default_tokenizer() -> SimpleTokenizer:
    """The one that `tokenize` uses, made at first use (0.1 s)."""
    return SimpleTokenizer()


@overload
def tokenize(
    texts: str | Sequence[str],
    context_length: int = 77,
    truncate: bool = False,
    *,
    return_lengths: Literal[False] = False,
) -> Tensor: ...


@overload
def tokenize(
    texts: str | Sequence[str], context_length: int = 77, truncate: bool = False, *, return_lengths: Literal[True]
) -> tuple[Tensor, Tensor]: ...


def tokenize(
    texts: str | Sequence[str], context_length: int = 77, truncate: bool = False, *, return_lengths: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """Tokens [B, context_length] int32 of one text (B = 1) or of B texts: start token, tokens, end token, zeros.

    With `return_lengths` also the lengths [B] int64, up to and including the first end token, where CLIP reads.
    RuntimeError when a text is too long, unless `truncate`: then it is cut and its last token is the end token.
    """
    if context_length < 1:
        raise ValueError(f"expected a context length of at least 1, got {context_length}")
    rows = default_tokenizer().rows([texts] if isinstance(texts, str) else texts, context_length, truncate)
    if rows:
        tokens = torch.frombuffer(bytearray().join(rows), dtype=torch.int32).view(len(rows), context_length)
    else:
        tokens = torch.zeros(0, context_length, dtype=torch.int32)
    # The end token has the greatest id; argmax finds its first place, also in a text that spells out "<|endoftext|>".
    return (tokens, tokens.argmax(dim=1) + 1) if return_lengths else tokens
