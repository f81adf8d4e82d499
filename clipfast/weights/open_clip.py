"""open_clip's configurations, and live modules of OpenAI's clip and open_clip, in the arguments of `CLIP`.

A configuration that asks for what `CLIP` does not compute is refused, and the field named.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from clipfast.weights import names
from clipfast.weights.names import Sizes, State, from_state, merged, number, settled

require = partial(names.require, instead=names.ELSEWHERE)

DEFAULTS: dict[str, dict[str, Any]] = {  # open_clip's, of the fields that are used
    "vision_cfg": {
        **{"layers": 12, "image_size": 224, "head_width": 64, "mlp_ratio": 4.0, "no_ln_pre": False, "pool_type": "tok"},
        **{"final_ln_after_pool": False, "ls_init_value": None, "act_kwargs": None, "norm_kwargs": None},
    },
    "text_cfg": {
        **{"layers": 12, "heads": 8, "context_length": 77, "vocab_size": 49408, "mlp_ratio": 4.0, "no_causal_mask": False},
        **{"pool_type": "argmax", "eos_id": 2, "ls_init_value": None, "act_kwargs": None, "norm_kwargs": None},
    },
}
# Any other field must be empty (None, False, 0, {}), have the value that CLIP has, or change nothing that is computed:
VALUES = {"proj_type": "linear", "block_type": "default"}
_INERT = {  # shapes hold it, initial values, layout, the tokenizer (load.py tells of it)
    *("embed_dim", "width", "patch_size", "pos_embed_type", "init_logit_scale", "nonscalar_logit_scale", "init_logit_bias"),
    *("vision_cfg", "text_cfg", "quick_gelu", "custom_text", "final_ln_after_pool"),
    *("hf_tokenizer_name", "tokenizer_kwargs", "tokenizer_mode", "pad_id"),
}


def from_open_clip(where: str, config: dict[str, Any], read: Callable[[], State]) -> tuple[Sizes, State]:
    """`model_cfg` of open_clip_config.json and the weights, which are not read if the configuration is refused."""
    for section in ("model_cfg", *DEFAULTS):
        for field, value in (config.get(section) or {} if section in DEFAULTS else config).items():
            if value and field not in _INERT | DEFAULTS.get(section, {}).keys():
                require(where, f"{section}.{field}", value, VALUES.get(field))
    vision, text = ({**DEFAULTS[section], **(config.get(section) or {})} for section in DEFAULTS)
    require(where, "vision_cfg.pool_type", vision["pool_type"], "tok", "avg")
    if vision["pool_type"] == "avg":  # of one token the norm before pooling is the norm after it
        require(where, "vision_cfg.pool_type = 'avg' with final_ln_after_pool", vision["final_ln_after_pool"], True)
    require(where, "text_cfg.pool_type", text["pool_type"], "argmax", "eos", "last")
    side, *sides = vision["image_size"] if isinstance(vision["image_size"], list | tuple) else [vision["image_size"]]
    if sides not in ([], [side]):
        require(where, "vision_cfg.image_size", vision["image_size"], [side, side])
    options = {section: _options(where, f"{section}_cfg", cfg) for section, cfg in (("vision", vision), ("text", text))}
    sizes, state = from_state(where, read())
    vit = isinstance(vision["layers"], int)
    if vit:
        options["vision"] |= {"pool": "average" if vision["pool_type"] == "avg" else "token", "ln_pre": not vision["no_ln_pre"]}
        options["vision"]["mlp_width"] = int(sizes["vision_width"] * number(where, "vision_cfg.mlp_ratio", vision["mlp_ratio"]))
    else:
        options["vision"] = {}
    ratio = number(where, "text_cfg.mlp_ratio", text["mlp_ratio"])
    options["text"] |= _end_options(text) | {"mlp_width": int(sizes["transformer_width"] * ratio)}
    return settled(merged(sizes, options)) | {
        "image_resolution": side,
        "vision_layers": vision["layers"] if vit else tuple(vision["layers"]),
        "vision_heads": sizes["vision_width"] * (1 if vit else 32) // vision["head_width"],
        "context_length": text["context_length"],
        "vocab_size": text["vocab_size"],
        "transformer_heads": text["heads"],
        "transformer_layers": text["layers"],
        "quick_gelu": bool(config.get("quick_gelu", False)),
    }, state


def _options(where: str, section: str, cfg: dict[str, Any]) -> Sizes:
    """What a tower's blocks have of activation, eps and layer scale."""
    options: Sizes = {"layer_scale": cfg["ls_init_value"] is not None}
    act, norm = cfg["act_kwargs"] or {}, cfg["norm_kwargs"] or {}
    require(where, f"{section}.act_kwargs", act, {}, {"approximate": "none"}, {"approximate": "tanh"})
    if act.get("approximate") == "tanh":
        options["activation"] = "gelu_tanh"
    if norm:
        require(where, f"{section}.norm_kwargs", list(norm), ["eps"])
        options["eps"] = number(where, f"{section}.norm_kwargs.eps", norm["eps"])
    return options


def _end_options(text: dict[str, Any]) -> Sizes:
    options: Sizes = {"causal": not text["no_causal_mask"]}
    if text["pool_type"] == "last":
        options["end_token"] = -1
    elif text["pool_type"] == "eos" and text["eos_id"] != text["vocab_size"] - 1:  # else it is the largest id
        options["end_token"] = text["eos_id"]
    return options


def live_config(where: str, module: Any) -> dict[str, Any]:
    """What open_clip's configuration says of a live module, for one of OpenAI's clip or open_clip."""
    visual, text = module.visual, getattr(module, "text", module)
    vit, own = type(visual).__name__ == "VisionTransformer", "text_" if text is module else ""
    require(where, "visual", type(visual).__name__, "VisionTransformer", "ModifiedResNet")
    if text is not module:
        require(where, "text", type(text).__name__, "TextTransformer")
    for name, norm in module.named_modules():
        if isinstance(norm, nn.BatchNorm2d):
            require(where, f"{name}.eps", norm.eps, 1e-5)
    stages = [] if vit else [len(stage) for stage in (visual.layer1, visual.layer2, visual.layer3, visual.layer4)]
    attention = visual.transformer.resblocks[0].attn.out_proj if vit else visual.attnpool.q_proj
    heads = (visual.transformer.resblocks[0].attn if vit else visual.attnpool).num_heads
    quick, text_cfg = _tower(where, text, text.transformer.resblocks)
    own_quick, vision_cfg = _tower(where, visual, visual.transformer.resblocks) if vit else (quick, {})
    require(where, "activation of the image tower", *("QuickGELU" if q else "GELU" for q in (own_quick, quick)))
    side = getattr(visual, "input_resolution", None) or visual.image_size  # OpenAI's name, open_clip's
    return {
        "quick_gelu": quick,
        "vision_cfg": vision_cfg
        | {
            "layers": len(visual.transformer.resblocks) if vit else stages,
            "image_size": side,
            "head_width": attention.in_features // heads,
            "no_ln_pre": isinstance(getattr(visual, "ln_pre", None), nn.Identity),
            "pool_type": getattr(visual, "pool_type", "tok"),
            "final_ln_after_pool": getattr(visual, "final_ln_after_pool", False),
            "patch_dropout": getattr(getattr(visual, "patch_dropout", None), "prob", 0.0),
        },
        "text_cfg": text_cfg
        | {
            "layers": len(text.transformer.resblocks),
            "heads": text.transformer.resblocks[0].attn.num_heads,
            "context_length": module.context_length,
            "vocab_size": module.vocab_size,
            "pool_type": getattr(text, f"{own}pool_type", "argmax"),
            "eos_id": getattr(text, f"{own}eos_id", None),
            "no_causal_mask": getattr(text, "attn_mask", "OpenAI's keeps it in its blocks") is None,
        },
    }


def _tower(where: str, tower: Any, blocks: Any) -> tuple[bool, dict[str, Any]]:
    """(whether its activation is QuickGELU, what its blocks have of the fields above), the same in each of them."""
    norms = {f"{n}.eps": norm.eps for n, norm in tower.named_modules() if isinstance(norm, nn.LayerNorm) and "visual" not in n}
    eps = blocks[0].ln_1.eps
    for name, got in norms.items():
        require(where, name, got, eps)
    first = blocks[0].mlp
    for block in blocks:
        require(where, "block", type(block).__name__, "ResidualAttentionBlock")
        require(where, "activation", type(block.mlp.gelu).__name__, "QuickGELU", "GELU")
        require(where, "activation", type(block.mlp.gelu).__name__, type(first.gelu).__name__)
    width, hidden = first.c_fc.in_features, first.c_fc.out_features
    approximate = getattr(first.gelu, "approximate", "none")
    return type(first.gelu).__name__ == "QuickGELU", {
        # So that int(width * ratio) is the hidden width, whatever ratio it was made of.
        "mlp_ratio": 4.0 if hidden == 4 * width else (hidden + 0.5) / width,
        "act_kwargs": {"approximate": approximate} if approximate != "none" else None,
        "norm_kwargs": {"eps": eps} if eps != 1e-5 else None,
        "ls_init_value": 1.0 if hasattr(getattr(blocks[0], "ls_1", None), "gamma") else None,
    }
