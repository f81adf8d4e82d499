"""Tokenizers of other checkpoints, read from a folder's files by Hugging Face's `tokenizers`: transformers is not needed."""

from __future__ import annotations

import os
import string
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Regex, Tokenizer, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE
from torch import Tensor

from clipfast.files import first_line, read_parsed
from clipfast.inputs.tokenizer import END, START, basic_clean, tokenize

Find = Callable[[str], Path | None]  # the path of a file of a checkpoint by its name, or None
TokenizeFunction = Callable[..., Tensor]
# What transformers' classes take where a folder's configuration says nothing.
DEFAULTS: dict[str, dict[str, str]] = {
    "CLIP": {"pad_token": END, "eos_token": END, "bos_token": START, "unk_token": END},
    "Bert": {"pad_token": "[PAD]", "sep_token": "[SEP]"},
    "XLMRoberta": {"pad_token": "<pad>", "sep_token": "</s>"},
    "Roberta": {"pad_token": "<pad>", "sep_token": "</s>"},
    "T5": {"pad_token": "<pad>"},
    "MT5": {"pad_token": "<pad>"},
    "Gemma": {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "padding_side": "left"},
    "Siglip2": {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "padding_side": "left"},
}
LONGEST = 1 << 16  # tokens of a context that a configuration may ask for
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def canonicalize(text: str) -> str:
    """Lower case, without punctuation, one space between words; an underscore is a space: SigLIP's, from big_vision."""
    return " ".join(text.replace("_", " ").translate(_PUNCTUATION).lower().split())


# open_clip's clean functions.
CLEAN: dict[str, Callable[[str], str]] = {
    "canonicalize": lambda text: canonicalize(basic_clean(text)),
    "lower": lambda text: " ".join(basic_clean(text).split()).lower(),
    "whitespace": lambda text: " ".join(basic_clean(text).split()),
    "": str,
}


class HFTokenizer:
    """`tokenizer(texts, context_length) -> [B, L]` int64, cut and padded, as open_clip's HFTokenizer; equal token for token.

    find: a folder with tokenizer.json (of CLIP also vocab.json and merges.txt) and tokenizer_config.json, or what finds them.
    clean: "canonicalize", "lower" or "whitespace" (open_clip's; all repair the text by ftfy first), or "" as transformers does.
    strip_sep_token: the separator becomes 0, as CLIPA wants it.

    Raises FileNotFoundError for a folder without such files, ValueError naming a field that cannot be done.
    """

    def __init__(
        self, find: str | Path | Find, context_length: int = 77, clean: str = "whitespace", strip_sep_token: bool = False
    ) -> None:
        if clean not in CLEAN:
            raise ValueError(f"expected clean to be {', '.join(filter(None, CLEAN))} or empty, got {clean!r}")
        where, find = (str(find), in_folder(find)) if isinstance(find, (str, Path)) else ("tokenizer", find)
        config = _json(find, "tokenizer_config.json")
        kind = str(config.get("tokenizer_class") or "").removesuffix("Fast").removesuffix("Tokenizer")
        if kind == "Siglip":
            raise ValueError(
                f"{where}: tokenizer_class: expected one that tokenizer.json holds whole, got SiglipTokenizer, which cleans "
                "texts by itself: use the same vocabulary as timm/ViT-B-16-SigLIP has it"
            )
        settings = DEFAULTS.get(kind, {}) | {
            k: v for k, v in (_json(find, "special_tokens_map.json") | config).items() if v is not None
        }
        self.clean, self.context_length, self._clean = clean, context_length, CLEAN[clean]
        self.tokenizer = _clip(where, find, settings) if kind == "CLIP" else _from_file(where, find, kind, settings)
        pad = self._id(where, "pad_token", settings)
        self._separator = self._id(where, "sep_token", settings) if strip_sep_token else None
        self.pad_token_id = pad
        self._padding = {
            "direction": settings.get("padding_side", "right"),
            "pad_id": pad,
            "pad_token": _text(settings["pad_token"]),
        }
        self._cut = settings.get("truncation_side", "right")
        try:
            self("")  # what a configuration has wrong is told now
        except Exception as error:
            raise ValueError(f"{where}: expected a tokenizer that can be run, got {first_line(error)}") from error

    def _id(self, where: str, field: str, settings: Mapping[str, Any]) -> int:
        token = _text(settings.get(field))
        found = self.tokenizer.token_to_id(token) if token else None
        if found is None:
            raise ValueError(f"{where}: tokenizer_config.json: expected {field} to name a token of the vocabulary, got {token}")
        return found

    def __call__(self, texts: str | Sequence[str], context_length: int | None = None) -> Tensor:
        """[B, context_length] int64 of one text (B = 1) or of B texts."""
        length = context_length or self.context_length
        self.tokenizer.enable_truncation(length, direction=self._cut)
        self.tokenizer.enable_padding(length=length, **self._padding)
        cleaned = [self._clean(text) for text in ([texts] if isinstance(texts, str) else texts)]
        try:
            ids = [encoding.ids for encoding in self.tokenizer.encode_batch(cleaned)]
        except BaseException as error:  # the package's own, or Rust's panic, as of a regular expression that finds no end
            if type(error) is not Exception and type(error).__name__ != "PanicException":
                raise
            raise ValueError(f"the files of this tokenizer do not fit each other: {first_line(error)}") from error
        tokens = torch.tensor(ids, dtype=torch.int64).view(len(ids), length)
        return tokens if self._separator is None else tokens.masked_fill(tokens == self._separator, 0)

    def __reduce__(self) -> tuple[Any, ...]:
        return _restored, (self.__dict__ | {"_clean": None},)


def _restored(state: dict[str, Any]) -> HFTokenizer:
    tokenizer = HFTokenizer.__new__(HFTokenizer)
    tokenizer.__dict__.update(state, _clean=CLEAN[state["clean"]])
    return tokenizer


def get_tokenizer(
    where: str | Path, context_length: int | None = None, *, find: Find | None = None, hub: Callable[[str], Find] | None = None
) -> TokenizeFunction:
    """The tokenizer of a checkpoint: `(texts, context_length) -> [B, L]`.

    where: a folder, or the name of what `find` finds files of (hf-hub:organisation/name).
    hub: the finder of another repository by its name, for an open_clip configuration that names its tokenizer's.

    OpenAI's `tokenize` (int32, cut to the length as open_clip does) where the files name no other.
    """
    try:
        return _get_tokenizer(where, context_length, find or in_folder(where), hub)
    except (TypeError, AttributeError, KeyError, IndexError, ArithmeticError) as error:
        fault = f"a field of its configuration has another type or value than its library writes ({first_line(error)})"
        raise ValueError(f"{where}: {fault}: download or copy it again") from error


def _get_tokenizer(
    where: str | Path, context_length: int | None, find: Find, hub: Callable[[str], Find] | None
) -> TokenizeFunction:
    text = _json(find, "open_clip_config.json")
    if text:
        text = (text.get("model_cfg") or text).get("text_cfg") or {}
        return _open_clip_tokenizer(str(where), context_length, text, find, hub)
    names = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt")
    if not any(find(name) for name in names):
        return Truncating(context_length or 77)
    told = (_json(find, "config.json").get("text_config") or {}).get("max_position_embeddings")
    return HFTokenizer(find, context_length or _length(where, told or 77), clean="")


def _open_clip_tokenizer(
    where: str, length: int | None, text: Mapping[str, Any], find: Find, hub: Callable[[str], Find] | None
) -> TokenizeFunction:
    options, name = dict(text.get("tokenizer_kwargs") or {}), text.get("hf_tokenizer_name")
    length = length or _length(where, text.get("context_length") or 77)
    known = ("clean", "strip_sep_token") if name else ()
    wrong = next((key for key in options if key not in known and (name or (key, options[key]) != ("clean", "lower"))), None)
    if wrong or text.get("tokenizer_mode"):
        field = f"tokenizer_kwargs.{wrong}" if wrong else "tokenizer_mode"
        raise ValueError(
            f"{where}: text_cfg.{field}: expected none, got {options.get(wrong or '', text.get('tokenizer_mode'))!r}"
        )
    if not name:
        return Truncating(length)
    if not find("tokenizer.json"):  # beside the weights, or else where open_clip looks
        if hub is None:
            raise FileNotFoundError(
                f"{where}: expected the files of the tokenizer {name} beside the weights: place tokenizer.json and "
                "tokenizer_config.json there"
            )
        find = hub(name)
    return HFTokenizer(find, length, **options)


def _length(where: object, told: Any) -> int:
    if not isinstance(told, int) or not 2 <= told <= LONGEST:
        raise ValueError(
            f"{where}: expected a context length from 2 to {LONGEST:,}, got {str(told)[:60]}; pass context_length="
        )
    return told


class Truncating:
    """`tokenize` as open_clip calls it: a text that is too long is cut, its last token the end token."""

    def __init__(self, context_length: int = 77) -> None:
        self.context_length = context_length

    def __call__(self, texts: str | Sequence[str], context_length: int | None = None) -> Tensor:
        """[B, context_length] int32."""
        return tokenize(texts, context_length or self.context_length, truncate=True)


def in_folder(folder: str | Path) -> Find:
    """Finds files in a folder."""
    return lambda name: path if (path := Path(folder, name)).is_file() else None


# ---- the tokenizers themselves


def _from_file(where: str, find: Find, kind: str, settings: Mapping[str, Any]) -> Tokenizer:
    if not (path := find("tokenizer.json")):
        raise FileNotFoundError(
            f"{where}: expected tokenizer.json: transformers writes it: AutoTokenizer.from_pretrained(...).save_pretrained(...)"
        )
    try:
        tokenizer = Tokenizer.from_file(os.fspath(path))
    except BaseException as error:  # a panic of its Rust is no Exception
        if isinstance(error, KeyboardInterrupt):
            raise
        raise ValueError(f"{path}: expected a tokenizer of the package tokenizers, got: {first_line(error)}") from error
    if kind == "Bert" and isinstance(tokenizer.normalizer, normalizers.BertNormalizer):
        tokenizer.normalizer.lowercase = settings.get("do_lower_case", True)
        tokenizer.normalizer.handle_chinese_chars = settings.get("tokenize_chinese_chars", True)
        tokenizer.normalizer.strip_accents = settings.get("strip_accents")
    if kind == "Siglip2":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), tokenizer.normalizer])
    _add(tokenizer, settings)
    return tokenizer


def _clip(where: str, find: Find, settings: Mapping[str, Any]) -> Tokenizer:
    """transformers' CLIPTokenizer: NFC, lower case, no ftfy; OpenAI's merges between the start and the end token."""
    stored = _json(find, "tokenizer.json")
    if (vocabulary := find("vocab.json")) and (merges := find("merges.txt")):
        model = BPE.from_file(os.fspath(vocabulary), os.fspath(merges), **_CLIP)
    elif stored:
        pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in stored["model"]["merges"]]
        model = BPE(stored["model"]["vocab"], [(left, right) for left, right in pairs], **_CLIP)
    else:
        raise FileNotFoundError(f"{where}: expected vocab.json and merges.txt, or tokenizer.json, of CLIPTokenizer")
    tokenizer = Tokenizer(model)
    spaces = normalizers.Replace(Regex(r"\s+"), " ")
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), spaces, normalizers.Lowercase()])
    pieces = Regex(
        r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
    )  # OpenAI's, for lower case
    split = pre_tokenizers.Split(pieces, "removed", invert=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    _add(tokenizer, {"added_tokens_decoder": {token["id"]: token for token in stored.get("added_tokens") or ()}, **settings})
    start, end = (_text(settings[f"{name}_token"]) for name in ("bos", "eos"))
    ids = tokenizer.get_vocab()
    tokenizer.post_processor = processors.RobertaProcessing((end, ids[end]), (start, ids[start]), False, False)
    return tokenizer


_CLIP = {"continuing_subword_prefix": "", "end_of_word_suffix": "</w>", "fuse_unk": False, "unk_token": END}


def _add(tokenizer: Tokenizer, settings: Mapping[str, Any]) -> None:
    """The tokens that the configuration adds, in the order of their ids, and those that it names special."""
    added = sorted((int(id), token) for id, token in (settings.get("added_tokens_decoder") or {}).items())
    known = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
    for _, token in added:
        if token["content"] not in known:
            tokenizer.add_tokens([AddedToken(token["content"], **{f: token[f] for f in flags if f in token})])
            known.add(token["content"])
    for field in ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"):
        if (text := _text(settings.get(field))) and text not in known:
            tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False)])


def _text(token: Any) -> str:
    """A token's characters: configurations have it bare, or as an object with flags."""
    return str(token["content"] if isinstance(token, Mapping) else token or "")


def _json(find: Find, name: str) -> dict[str, Any]:
    """A file's object, {} where there is none."""
    return read_parsed(path) if (path := find(name)) else {}
