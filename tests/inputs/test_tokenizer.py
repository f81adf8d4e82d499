"""Text to tokens: OpenAI's own on every string, whatever way they are found."""

import html
import importlib.util
import pickle
import random
import shutil
from pathlib import Path

import pytest
import regex
import torch
from open_clip.tokenizer import SimpleTokenizer as Reference
from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES, OPENAI_IMAGENET_TEMPLATES

from clipfast.inputs import tokenizer as module
from clipfast.inputs.tokenizer import END, START, SimpleTokenizer, clean, default_tokenizer, tokenize

WORDS = """
    a the photo of dog dogs dog's don't we're they've I'm he'll she'd rock'n'roll naïve café ÉCOLE straße İstanbul
    ΣΊΣΥΦΟΣ e.g. 3.14 1,000 42nd £5 50% C++ black-and-white http://example.org/a?b=1&c=2 foo_bar @user #tag AT&T
    r&b && & &c ;) :-D ... !!! ??? -- — “quoted” ‘single’ ﬁne ﬂow ＷＩＤＥ ｶﾀｶﾅ 日本語 中文字 한국어 العربية
    हिन्दी ไทย עברית e\u0301 a\u0308\u0301 q\u0323\u0307 'ſ \u212a Ã©tÃ© â€œmojibakeâ€\x9d schÃ¶n L&amp;M
    &lt;b&gt; &amp;amp; &amp;lt; &eacute; &NTILDE; &#39; &#x27; &#0; &#xD800; &nbsp; &notit; &copy <b>bold</b>
    <start_of_text> <|startoftext|> <|endoftext|> <|ENDOFTEXT|> x<|startoftext|>y <|ſtartoftext|> </w> dog</w>
    aaaaaaa 👍 👩🏽‍🚀 🏳️‍🌈 🇩🇪 1️⃣ ❤️ \ufffd \ufeff \u200b \u200d \u2060 \xad \ud800 \udc00 \x1b[31m \x1b[0m \x00
    \x07 \x7f ½ ² Ⅷ ٣ ① 𝔘𝔫𝔦 𐍈
""".split()  # noqa: SIM905 - a list of quoted strings would hide what they are
SPACES = [*" " * 3, "  ", "\n", "\r\n", *"\t\x0b\x0c\x1c\x1f\x85\xa0\u2003\u2028\u3000", ""]
RANGES = [(0x20, 0x7F)] * 4 + [(0, 0x20), (0x7F, 0x250), (0x250, 0x600), (0x600, 0x3100), (0x3100, 0xD800), (0xD800, 0x10000),
          (0x1F300, 0x1FAFF), (0x10000, 0x110000)]  # fmt: skip


@pytest.fixture(scope="module")
def reference() -> Reference:
    """open_clip's copy of OpenAI's tokenizer, with the special tokens spelt as OpenAI spells them."""
    tokenizer = Reference()
    for ours, theirs in ((START, "<start_of_text>"), (END, "<end_of_text>")):
        tokenizer.encoder[ours] = tokenizer.encoder.pop(theirs)
        tokenizer.decoder[tokenizer.encoder[ours]] = ours
        tokenizer.cache[ours] = ours
        del tokenizer.cache[theirs]
    pattern = tokenizer.pat.pattern.replace("<start_of_text>", regex.escape(START)).replace("<end_of_text>", regex.escape(END))
    tokenizer.pat = regex.compile(pattern, regex.IGNORECASE)
    return tokenizer


def words(rng: random.Random) -> str:
    return "".join(rng.choice(WORDS) + rng.choice(SPACES) for _ in range(rng.randint(0, 8)))


def characters(rng: random.Random) -> str:
    spans = rng.choices(RANGES, k=rng.randint(1, 3))
    return "".join(chr(rng.randrange(*rng.choice(spans))) for _ in range(rng.randint(0, 24)))


def printable(rng: random.Random) -> str:
    """Plain ASCII, where the quick path is taken: words of letters, and what a keyboard has."""
    letters = ("etaoinshrdlucmfwypvbgkqjxz", "aA'sS", "0123456789.,", "".join(map(chr, range(32, 127))))
    return " ".join("".join(rng.choices(rng.choice(letters), k=rng.randint(1, 9))) for _ in range(rng.randint(0, 8)))


def mangled(rng: random.Random) -> str:
    """What wrong encodings and escapes make of a text."""
    text = words(rng).encode("utf-8", "ignore").decode(rng.choice(["utf-8", "latin-1", "cp1252", "cp437"]), "ignore")
    return html.escape(text) if rng.random() < 0.5 else text


@pytest.mark.parametrize("make, count", [(words, 35_000), (characters, 25_000), (printable, 30_000), (mangled, 10_000)])
def test_fuzzed_strings_give_openais_tokens(reference: Reference, make, count: int) -> None:
    rng = random.Random(make.__name__)
    ours, seen, plain = default_tokenizer(), set(), 0
    for _ in range(count):
        text = make(rng)
        assert ours.encode(text) == reference.encode(text), ascii(text)
        seen.add(text)
        plain += text.isascii() and text.isprintable() and "&" not in text
    assert len(seen) > 0.8 * count  # neither one string many times over,
    assert plain > 0.9 * count if make is printable else plain < 0.5 * count  # nor always the same path


def test_captions_and_rows(reference: Reference) -> None:
    """Every class name of ImageNet under some of OpenAI's prompts, as batches; the second pass meets known words only."""
    rng = random.Random(0)
    texts = [template(name) for name in IMAGENET_CLASSNAMES for template in rng.sample(OPENAI_IMAGENET_TEMPLATES, 4)]
    expected = reference(texts, context_length=77)
    for _ in range(2):
        tokens, lengths = tokenize(texts, return_lengths=True)
        assert tokens.dtype == torch.int32 and lengths.dtype == torch.int64 and lengths.device.type == "cpu"
        assert torch.equal(tokens.long(), expected)
        assert torch.equal(lengths, expected.argmax(dim=1) + 1) and lengths.unique().numel() > 5
    assert all(default_tokenizer().decode(row[1 : n - 1]).split() == clean_words(text)
               for row, n, text in zip(tokens[:50], lengths, texts, strict=False))  # fmt: skip


def clean_words(text: str) -> list[str]:
    """As decoding spaces them."""
    return default_tokenizer().pat.findall(clean(text))


def test_what_the_quick_path_takes_for_granted(reference: Reference) -> None:
    """A whole ASCII word of the vocabulary is one piece, and the merges make that one token of it."""
    whole = [token[: -len("</w>")] for token in default_tokenizer().encoder if token.endswith("</w>") and token.isascii()]
    assert len(whole) > 33_000
    assert all(reference.bpe(word) == word + "</w>" and reference.pat.findall(word) == [word] for word in whole)


def test_vocabulary_is_openais(reference: Reference) -> None:
    ours = SimpleTokenizer()
    assert ours.encoder == reference.encoder and ours.decoder == reference.decoder
    assert (ours.encoder[START], ours.encoder[END], len(ours.encoder)) == (49406, 49407, 49408)
    ids = random.Random(0).choices(range(len(ours.encoder)), k=5000)  # also bytes that are no UTF-8
    assert ours.decode(ids) == reference.decode(ids)
    assert ours.decode(torch.tensor(ids)) == reference.decode(ids)


def test_one_text_and_none() -> None:
    assert tokenize("a dog").tolist() == [[49406, 320, 1929, 49407] + [0] * 73]
    assert tokenize(["a dog"], context_length=5).tolist() == [[49406, 320, 1929, 49407, 0]]
    tokens, lengths = tokenize(["", " \n\t "], return_lengths=True)
    assert tokens[:, :3].tolist() == [[49406, 49407, 0]] * 2 and lengths.tolist() == [2, 2]
    tokens, lengths = tokenize([], return_lengths=True)
    assert tokens.shape == (0, 77) and lengths.shape == (0,)


def test_too_long() -> None:
    fits = " ".join(["dog"] * 75)
    assert tokenize(fits)[0].tolist() == [49406] + [1929] * 75 + [49407]
    caption = " ".join(["dog"] * 500)
    with pytest.raises(RuntimeError) as error:
        tokenize(["a cat", caption])
    assert str(error.value) == f"Input {caption} is too long for context length 77"
    tokens, lengths = tokenize(["a cat", caption], truncate=True, return_lengths=True)
    assert tokens[1].tolist() == [49406] + [1929] * 75 + [49407] and lengths.tolist() == [4, 77]


def test_an_end_token_in_the_text_ends_it_for_clip() -> None:
    """CLIP pools at the first of the greatest ids, so that is what the length must say."""
    tokens, lengths = tokenize("a <|endoftext|> dog", return_lengths=True)
    assert tokens[0, :5].tolist() == [49406, 320, 49407, 1929, 49407] and lengths.tolist() == [3]


def test_long_words_take_no_quadratic_time() -> None:
    """A megabyte without a space: OpenAI's loop over all pairs would take hours."""
    tokens = tokenize("x" * 1_000_000, truncate=True)
    assert tokens[0, 0] == 49406 and tokens[0, -1] == 49407


def test_errors_name_what_came() -> None:
    with pytest.raises(TypeError, match="expected a text .* got a int: 3"):
        tokenize(["a dog", 3])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="at least 1, got 0"):
        tokenize("a dog", context_length=0)


def test_the_word_table_stays_bounded(monkeypatch: pytest.MonkeyPatch, reference: Reference) -> None:
    monkeypatch.setattr(module._Words, "LIMIT", 10)
    ours, rng = SimpleTokenizer(), random.Random(0)
    for text in [printable(rng) for _ in range(300)] + ["x" * 65, f"{START}dog"]:
        assert ours.encode(text) == reference.encode(text)
        assert len(ours._words) <= 10
    assert "x" * 65 not in ours._words


def test_goes_to_a_worker_process() -> None:
    ours = pickle.loads(pickle.dumps(default_tokenizer()))
    assert ours.encode("a dog's life") == default_tokenizer().encode("a dog's life") == [320, 1929, 568, 970]


def test_openais_names_have_openais_values() -> None:
    """clip-anytorch's copy of OpenAI's file."""
    path = Path(importlib.util.find_spec("clip").submodule_search_locations[0]) / "simple_tokenizer.py"  # type: ignore
    spec = importlib.util.spec_from_file_location("openais_simple_tokenizer", path)
    theirs = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
    spec.loader.exec_module(theirs)  # type: ignore[union-attr]
    ours, reference = SimpleTokenizer(theirs.default_bpe()), theirs.SimpleTokenizer()  # the uncut file
    own = SimpleTokenizer(module.default_bpe())
    for name in ("bpe_ranks", "cache", "encoder", "decoder", "byte_encoder", "byte_decoder", "pat"):
        assert getattr(ours, name) == getattr(own, name) == getattr(reference, name), name
    assert module.bytes_to_unicode() == theirs.bytes_to_unicode()
    rng = random.Random(5)
    for text in [*WORDS, *(words(rng) for _ in range(50)), *(printable(rng) for _ in range(50))]:
        for name in ("basic_clean", "whitespace_clean"):
            assert getattr(module, name)(text) == getattr(theirs, name)(text)
        assert ours.encode(text) == reference.encode(text)
        if text.strip():
            letters = "".join(ours.byte_encoder[byte] for byte in text.encode("utf-8", "surrogatepass"))
            assert ours.bpe(letters) == reference.bpe(letters)
            assert module.get_pairs(letters) == theirs.get_pairs(letters)
            assert module.get_pairs(tuple(letters)) == theirs.get_pairs(tuple(letters))
        assert ours._as_changed(text) == reference.encode(text)
    assert ours.bpe("aaaaaaa") == reference.bpe("aaaaaaa") and ours.cache == reference.cache


def test_a_tokenizer_that_was_changed_does_as_it_is_told() -> None:
    """A special token as programs add it, and a subclass with its own `bpe`."""
    tokenizer = SimpleTokenizer()
    tokenizer.encoder["<|mask|>"] = len(tokenizer.encoder)
    tokenizer.decoder[49408] = "<|mask|>"
    tokenizer.cache["<|mask|>"] = "<|mask|>"
    tokenizer.pat = regex.compile(rf"<\|mask\|>|{tokenizer.pat.pattern}", regex.IGNORECASE)
    for changed in (tokenizer, pickle.loads(pickle.dumps(tokenizer))):
        assert changed.encode("a <|mask|> dog") == [320, 49408, 1929]
        row = torch.frombuffer(bytearray(changed.rows(["a <|mask|> dog"], 7, False)[0]), dtype=torch.int32)
        assert row.tolist() == [49406, 320, 49408, 1929, 49407, 0, 0]

    class Letters(SimpleTokenizer):
        def bpe(self, token: str) -> str:
            return " ".join([*token[:-1], f"{token[-1]}</w>"])

    assert Letters().decode(Letters().encode("a dog")) == "a dog " and len(Letters().encode("a dog")) == 4


def test_a_vocabulary_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    shutil.copy(__file__, tmp_path / "vocabulary.gz")
    with pytest.raises(OSError, match=r"vocabulary.gz: expected a gzip file of merges"):
        SimpleTokenizer(str(tmp_path / "vocabulary.gz"))
