"""transformers' CLIP: its configurations and names, of both towers or of one, in the arguments of `CLIP` and OpenAI's names."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from clipfast.weights import names
from clipfast.weights.names import TOWERS, Sizes, State, from_state, merged, number, settled

require = partial(names.require, instead=names.ELSEWHERE)

_COMMON = {"num_hidden_layers": 12, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "attention_dropout": 0.0}
DEFAULTS = {  # transformers', which a saved config.json leaves out
    "vision_config": {
        **_COMMON,
        **{"image_size": 224, "hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072, "num_channels": 3},
    },
    "text_config": {
        **_COMMON,
        **{"num_attention_heads": 8, "max_position_embeddings": 77, "vocab_size": 49408, "eos_token_id": 49407},
        **{"intermediate_size": 2048},
    },
}
ACTIVATIONS = {
    **dict.fromkeys(("gelu", "gelu_python"), "gelu"),
    # One formula under all of these names.
    **dict.fromkeys(("gelu_pytorch_tanh", "gelu_new", "gelu_fast", "gelu_accurate", "gelu_python_tanh"), "gelu_tanh"),
    "quick_gelu": "quick_gelu",
}
NAMES = {  # parts of names, theirs -> OpenAI's; then q, k, v are joined and the projections transposed
    "text_projection.weight": "text_projection",
    "visual_projection.weight": "visual.proj",
    "text_model.embeddings.token_embedding.": "token_embedding.",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.encoder.layers.": "transformer.resblocks.",
    "text_model.final_layer_norm.": "ln_final.",
    "vision_model.embeddings.class_embedding": "visual.class_embedding",
    "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
    "vision_model.embeddings.patch_embedding.": "visual.conv1.",
    "vision_model.encoder.layers.": "visual.transformer.resblocks.",
    "vision_model.pre_layrnorm.": "visual.ln_pre.",
    "vision_model.post_layernorm.": "visual.ln_post.",
    ".layer_norm1.": ".ln_1.",
    ".layer_norm2.": ".ln_2.",
    ".self_attn.": ".attn.",
    ".mlp.fc1.": ".mlp.c_fc.",
    ".mlp.fc2.": ".mlp.c_proj.",
}
_KINDS = {  # model_type -> the towers
    "clip": TOWERS,
    "clip_text_model": ("text",),
    "clip_vision_model": ("image",),
}
_SECTIONS = {"vision_config": "image", "text_config": "text"}


def from_transformers(where: str, config: dict[str, Any], read: Callable[[], State]) -> tuple[Sizes, State]:
    """config.json (or a live configuration as a dict) of a CLIPModel or of one of its towers; the weights."""
    kind = config.get("model_type")
    require(where, "model_type", kind, *_KINDS)
    towers = _KINDS[str(kind)]
    for architecture in config.get("architectures") or ():
        require(where, "architectures", architecture, *_classes(towers))
    told: Sizes = {}
    for section, tower in _SECTIONS.items():
        if tower in towers:
            # Old files say it twice, and <section>_dict wins, with its defaults; a tower alone has its fields at the top.
            own = config if towers != TOWERS else config.get(f"{section}_dict") or config.get(section) or {}
            told = merged(told, _section(where, section, {**DEFAULTS[section], **own}))
    sizes, state = from_state(where, _rename(read(), towers), towers=towers)
    sizes = merged(sizes, told)
    # Where the towers differ, or one has the third activation, an option says so; quick_gelu is the text tower's.
    activations = {tower: sizes[tower].pop("activation") for tower in ("vision", "text") if tower in told}
    sizes["quick_gelu"] = activations.get("text", activations.get("vision")) == "quick_gelu"
    for tower, activation in activations.items():
        if activation != ("quick_gelu" if sizes["quick_gelu"] else "gelu"):
            sizes[tower]["activation"] = activation
    return settled(sizes), state


def _classes(towers: tuple[str, ...]) -> tuple[str, ...]:
    if towers == TOWERS:
        return ("CLIPModel",)
    kind = "Text" if towers == ("text",) else "Vision"
    return (f"CLIP{kind}Model", f"CLIP{kind}ModelWithProjection")


def _section(where: str, section: str, fields: dict[str, Any]) -> Sizes:
    require(where, f"{section}.hidden_act", fields["hidden_act"], *ACTIVATIONS)
    options = {
        "activation": ACTIVATIONS[fields["hidden_act"]],
        "mlp_width": fields["intermediate_size"],
        "eps": number(where, f"{section}.layer_norm_eps", fields["layer_norm_eps"]),
        "dropout": number(where, f"{section}.attention_dropout", fields["attention_dropout"] or 0.0),
    }
    heads, layers = fields["num_attention_heads"], fields["num_hidden_layers"]
    if section == "vision_config":
        side = fields["image_size"]
        side, *sides = side if isinstance(side, list | tuple) else [side]
        if sides not in ([], [side]):
            require(where, f"{section}.image_size", fields["image_size"], [side, side])
        options |= {"channels": fields["num_channels"], "ln_pre": True}
        return {"image_resolution": side, "vision_layers": layers, "vision_heads": heads, "vision": options}
    end, vocabulary = fields["eos_token_id"], fields["vocab_size"]
    if not isinstance(end, int):
        require(where, f"{section}.eos_token_id", end, vocabulary - 1)
    # 2 stands in old files by mistake: there transformers, too, takes the largest id.
    options["end_token"] = None if end in (2, vocabulary - 1) else end
    sizes = {"context_length": fields["max_position_embeddings"], "vocab_size": vocabulary, "transformer_layers": layers}
    return sizes | {"transformer_heads": heads, "text": options}


def _rename(tensors: State, towers: tuple[str, ...]) -> State:
    """OpenAI's names; a tensor of unknown name keeps its own, for the assembly to report. It empties `tensors`."""
    flat = (
        "" if towers == TOWERS else "text_model." if "text" in towers else "vision_model."
    )  # since 5.6 a tower alone has no prefix
    flat = "" if any(name.startswith(flat) for name in tensors) else flat
    state: State = {}
    for name in list(tensors):
        tensor = tensors.pop(name)
        if not name.endswith("embeddings.position_ids"):  # 0, 1, 2, ...: a buffer that old versions saved
            name = name if "projection." in name else flat + name
            for theirs, ours in NAMES.items():
                name = name.replace(theirs, ours)
            state[name] = tensor.T if name in ("text_projection", "visual.proj") else tensor
    for query in [name for name in state if ".attn.q_proj." in name]:
        parts = [query.replace(".q_proj.", f".{part}_proj.") for part in "qkv"]
        if all(part in state for part in parts):
            state[query.replace(".q_proj.", ".in_proj_")] = torch.cat([state.pop(part) for part in parts])
    return state
