"""Tokenizers of other checkpoints: token for token what open_clip's HFTokenizer and transformers give on the same files."""

import json
import pickle
from pathlib import Path

import pytest
import torch
from open_clip.tokenizer import HFTokenizer as OpenClip
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import CLIPTokenizer

from clipfast.inputs.hf_tokenizer import HFTokenizer, get_tokenizer, in_folder
from clipfast.inputs.tokenizer import END, START, SimpleTokenizer, tokenize

CORPUS = [
    "a photo of a cat",
    "two dogs, running in the snow!",
    "Ein Bild von einer Straße",
    "日本語 の 写真",
    "naïve café_au_lait",
]
TEXTS = [
    *CORPUS, "", " \n ", "A DOG'S  life &amp; times ☃", "[SEP] </s> <|endoftext|> <eos>", "e\u0301 Ã©tÃ©",
    "a very long caption " * 20, "_x__y_ ... 3.14",
]  # fmt: skip


def bert(folder: Path) -> dict:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer.train_from_iterator(CORPUS, trainers.WordPieceTrainer(vocab_size=120, special_tokens=special))
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer.save(str(folder / "tokenizer.json"))
    return {"tokenizer_class": "BertTokenizer", "do_lower_case": True}


def unigram(folder: Path, kind: str, special: list[str], template: str) -> dict:
    tokenizer = Tokenizer(models.Unigram())
    steps = [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(prepend_scheme="always")]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    trainer = trainers.UnigramTrainer(vocab_size=110, special_tokens=special, unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator(CORPUS * 3, trainer)
    ends = [(token, special.index(token)) for token in ("<s>", "</s>") if token in template]
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=ends)
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.save(str(folder / "tokenizer.json"))
    return {"tokenizer_class": kind, "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>", "extra_ids": 0}


def t5(folder: Path) -> dict:
    return unigram(folder, "T5Tokenizer", ["<pad>", "</s>", "<unk>"], "$A </s>")


def xlm(folder: Path) -> dict:
    return unigram(folder, "XLMRobertaTokenizer", ["<s>", "<pad>", "</s>", "<unk>"], "<s> $A </s>") | {"sep_token": "</s>"}


def gemma(folder: Path) -> dict:
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=340, special_tokens=special[:5], show_progress=False))
    tokenizer.post_processor = processors.TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", 1)])
    stored = json.loads(tokenizer.to_str())
    words = [*special, *(word for word in stored["model"]["vocab"] if word not in special)]
    stored["model"]["vocab"] = {word: i for i, word in enumerate(words)}
    (folder / "tokenizer.json").write_text(json.dumps(stored))
    # What the file's own post-processor says counts, not this.
    ends = {"add_bos_token": True, "add_eos_token": False, "padding_side": "right"}
    return {"tokenizer_class": "GemmaTokenizer", "bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"} | ends


def files(folder: Path, make, **settings) -> Path:
    (folder / "tokenizer_config.json").write_text(json.dumps(make(folder) | settings))
    return folder


@pytest.mark.parametrize(
    ("make", "settings", "options"),
    [
        (bert, {}, {"strip_sep_token": True}),  # CLIPA
        (bert, {"do_lower_case": False, "padding_side": "left"}, {"clean": "lower"}),
        (t5, {}, {"clean": "canonicalize"}),  # SigLIP, MetaCLIP 2's mT5
        (xlm, {}, {}),  # MetaCLIP 2 worldwide
        (gemma, {}, {"clean": "canonicalize"}),  # SigLIP 2
    ],
)
def test_open_clips_tokenizers(tmp_path: Path, make, settings: dict, options: dict) -> None:
    folder = files(tmp_path, make, **settings)
    theirs, ours = OpenClip(str(folder), context_length=12, **options), HFTokenizer(folder, context_length=12, **options)
    for length in (None, 5, 40):
        got = ours(TEXTS, length)
        assert got.dtype == torch.int64 and torch.equal(got, theirs(TEXTS, length))
    assert torch.equal(ours("two dogs"), theirs("two dogs")) and ours([]).shape == (0, 12)
    assert torch.equal(pickle.loads(pickle.dumps(ours))(TEXTS), ours(TEXTS))
    assert len({tuple(row) for row in ours(TEXTS).tolist()}) > 6  # not all unknown


@pytest.mark.parametrize("pad", [END, "!"])
def test_transformers_clip_tokenizer(tmp_path: Path, pad: str) -> None:
    """Of vocab.json and merges.txt, and of the tokenizer.json that transformers writes from them."""
    own = SimpleTokenizer()
    (tmp_path / "vocab.json").write_text(json.dumps(own.encoder))
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, own.merges)]))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "CLIPTokenizer", "pad_token": pad}))
    theirs = CLIPTokenizer.from_pretrained(tmp_path)
    theirs.add_tokens(["<cat-toy>"])
    theirs.save_pretrained(tmp_path / "saved")
    texts = [*TEXTS, "a <cat-toy> on a mat", f"{START} a {END} b"]
    expected = theirs(texts, return_tensors="pt", max_length=77, padding="max_length", truncation=True).input_ids
    assert torch.equal(get_tokenizer(tmp_path / "saved")(texts), expected)
    assert torch.equal(get_tokenizer(tmp_path)(texts[:-2]), expected[:-2])
    assert expected[0, -1] == own.encoder[pad]


def test_the_tokenizer_of_a_checkpoint(tmp_path: Path) -> None:
    config = {
        "text_cfg": {"hf_tokenizer_name": "org/words", "context_length": 9, "tokenizer_kwargs": {"strip_sep_token": True}}
    }
    (tmp_path / "model").mkdir()
    (tmp_path / "words").mkdir()
    words = files(tmp_path / "words", bert)

    def wants(config: dict, **other):
        (tmp_path / "model" / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
        return get_tokenizer(tmp_path / "model", **other)

    asked = []
    got = wants(config, hub=lambda name: asked.append(name) or in_folder(words))(TEXTS)
    assert asked == ["org/words"] and torch.equal(got, HFTokenizer(words, 9, strip_sep_token=True)(TEXTS))
    with pytest.raises(FileNotFoundError, match="expected the files of the tokenizer org/words beside the weights"):
        wants(config)
    plain = wants({"text_cfg": {"context_length": 12}})
    assert torch.equal(plain(TEXTS), tokenize(TEXTS, 12, truncate=True)) and torch.equal(
        get_tokenizer(tmp_path)(TEXTS), tokenize(TEXTS, truncate=True)
    )
    for field, text in (
        ("tokenizer_kwargs.reduction_mask", {"tokenizer_kwargs": {"reduction_mask": "simple"}}),
        ("tokenizer_kwargs.language", config["text_cfg"] | {"tokenizer_kwargs": {"language": "deu"}}),
        ("tokenizer_mode", config["text_cfg"] | {"tokenizer_mode": "clips"}),
    ):
        with pytest.raises(ValueError, match=f"text_cfg.{field}: expected none"):
            wants({"text_cfg": text})


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="expected tokenizer.json"):
        HFTokenizer(tmp_path)
    with pytest.raises(ValueError, match="expected clean to be canonicalize, lower, whitespace or empty, got 'no'"):
        HFTokenizer(tmp_path, clean="no")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="tokenizer.json: expected a tokenizer of the package tokenizers"):
        HFTokenizer(tmp_path)
    files(tmp_path, t5, pad_token="[nothing]", tokenizer_class="Other")
    HFTokenizer(tmp_path)  # a special token that is not in the vocabulary is added, as transformers does
    files(tmp_path, t5, pad_token=None, tokenizer_class="Other")
    with pytest.raises(ValueError, match="expected pad_token to name a token of the vocabulary"):
        HFTokenizer(tmp_path)
    files(tmp_path, t5, tokenizer_class="SiglipTokenizer")
    with pytest.raises(ValueError, match="tokenizer_class: expected one that tokenizer.json holds whole"):
        HFTokenizer(tmp_path)
