"""The names and sizes of OpenAI's clip, open_clip and transformers, brought to OpenAI's names and the arguments of `CLIP`.

A configuration that asks for what `CLIP` does not compute is refused, and the field named.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

State = dict[str, Tensor]
Sizes = dict[str, Any]


def require(where: str, field: str, got: Any, *supported: Any) -> None:
    if got not in supported:
        raise ValueError(f"{where}: {field} = {got!r} is not supported: expected {' or '.join(map(repr, supported))}")


def _openai_names(where: str, tensors: Any) -> State:
    """The state of OpenAI's CLIP, or open_clip's CLIP or CustomTextCLIP, perhaps saved from a wrapper: OpenAI's names."""
    if not isinstance(tensors, Mapping) or not tensors or not all(isinstance(t, Tensor) for t in tensors.values()):
        got = {n: type(t).__name__ for n, t in tensors.items()} if isinstance(tensors, Mapping) else type(tensors)
        raise ValueError(f"{where}: expected names with tensors, got {str(got)[:200]}: save model.state_dict()")
    state: State = dict(tensors)
    for prefix in ("_orig_mod.", "module.", "_orig_mod."):  # torch.compile and DistributedDataParallel, either outside
        if all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    if "text.positional_embedding" in state and "positional_embedding" not in state:  # CustomTextCLIP
        state = {name.removeprefix("text."): tensor for name, tensor in state.items()}
    if "logit_scale" in state and state["logit_scale"].numel() == 1:
        state["logit_scale"] = state["logit_scale"].reshape(())  # open_clip's nonscalar_logit_scale has shape [1]
    mask = state.get("attn_mask")  # traced from open_clip: a constant, which is CLIP's if it is causal
    if mask is not None and mask.equal(torch.full_like(mask, float("-inf")).triu(1)):
        del state["attn_mask"]
    return state


def from_state(where: str, tensors: Any) -> tuple[Sizes, State]:
    """Sizes as OpenAI's `build_model` reads them from shapes: all but quick_gelu and the heads of wide image towers."""
    state = _openai_names(where, tensors)
    vit = "visual.layer1.0.conv1.weight" not in state
    grid = "visual.positional_embedding" if vit else "visual.attnpool.positional_embedding"
    ranks = {"visual.conv1.weight": 4, grid: 2, "text_projection": 2, "positional_embedding": 2, "token_embedding.weight": 2}
    if lacking := [name for name, rank in ranks.items() if name not in state or state[name].ndim != rank]:
        raise ValueError(
            f"{where}: not the two towers of CLIP: lacks {', '.join(lacking)}; has {', '.join(list(state)[:5])}, ...; a model "
            "of transformers is loaded with its config.json, by its folder"
        )

    def depth(prefix: str) -> int:
        numbers = (name[len(prefix) :].split(".")[0] for name in state if name.startswith(prefix))
        return max((int(number) + 1 for number in numbers if number.isdigit()), default=0)

    stem, side, text = state["visual.conv1.weight"], (len(state[grid]) - 1) ** 0.5, state["text_projection"]
    stages = tuple(depth(f"visual.layer{stage}.") for stage in (1, 2, 3, 4))
    sizes: Sizes = {
        "embed_dim": text.shape[1],
        "image_resolution": round(side) * (stem.shape[-1] if vit else 32),
        "vision_layers": depth("visual.transformer.resblocks.") if vit else stages,
        "vision_width": len(stem) if vit else 2 * len(stem),
        "vision_patch_size": stem.shape[-1] if vit else None,
        "context_length": len(state["positional_embedding"]),
        "vocab_size": len(state["token_embedding.weight"]),
        "transformer_width": len(text),
        "transformer_heads": len(text) // 64,
        "transformer_layers": depth("transformer.resblocks."),
    }
    if not vit:
        sizes["vision_heads"] = sizes["vision_width"] * 32 // 64
    elif len(stem) <= 1024 and len(stem) % 64 == 0:
        sizes["vision_heads"] = len(stem) // 64
    marks = {"input_resolution": "image_resolution", "context_length": "context_length", "vocab_size": "vocab_size"}
    if marks.keys() <= state.keys():  # only OpenAI's archives carry these
        for mark, size in marks.items():
            require(where, mark, int(state.pop(mark)), sizes[size])
        sizes["quick_gelu"] = True
    return sizes, state


_OPEN_CLIP = {  # open_clip's defaults of the fields that are used
    "vision_cfg": {"layers": 12, "image_size": 224, "head_width": 64, "pool_type": "tok"},
    "text_cfg": {"layers": 12, "heads": 8, "context_length": 77, "vocab_size": 49408, "pool_type": "argmax", "eos_id": 2},
}
# Any other field must be empty (None, False, 0, {}), have the value that CLIP has, or change nothing that is computed:
_OPEN_CLIP_VALUES = {"mlp_ratio": 4.0, "proj_type": "linear", "block_type": "default"}
_OPEN_CLIP_INERT = {  # shapes hold it, initial values, layout, the tokenizer
    *("embed_dim", "width", "patch_size", "pos_embed_type", "init_logit_scale", "nonscalar_logit_scale"),
    *("vision_cfg", "text_cfg", "quick_gelu", "custom_text", "hf_tokenizer_name", "pad_id"),
}


def from_open_clip(where: str, config: dict[str, Any], read: Callable[[], State]) -> tuple[Sizes, State]:
    """`model_cfg` of open_clip_config.json and the weights, which are not read if the configuration is refused."""
    for section in ("model_cfg", "vision_cfg", "text_cfg"):
        for field, value in (config.get(section) or {} if section in _OPEN_CLIP else config).items():
            if value and field not in _OPEN_CLIP_INERT | _OPEN_CLIP.get(section, {}).keys():
                require(where, f"{section}.{field}", value, _OPEN_CLIP_VALUES.get(field))
    vision, text = ({**_OPEN_CLIP[section], **(config.get(section) or {})} for section in _OPEN_CLIP)
    require(where, "vision_cfg.pool_type", vision["pool_type"], "tok")
    require(where, "text_cfg.pool_type", text["pool_type"], "argmax", "eos")
    if text["pool_type"] == "eos":
        _require_end_token(where, "text_cfg.eos_id", text["eos_id"], text["vocab_size"])
    side, *sides = vision["image_size"] if isinstance(vision["image_size"], list | tuple) else [vision["image_size"]]
    if sides not in ([], [side]):
        require(where, "vision_cfg.image_size", vision["image_size"], [side, side])
    sizes, state = from_state(where, read())
    vit = isinstance(vision["layers"], int)
    return sizes | {
        "image_resolution": side,
        "vision_layers": vision["layers"] if vit else tuple(vision["layers"]),
        "vision_heads": sizes["vision_width"] * (1 if vit else 32) // vision["head_width"],
        "context_length": text["context_length"],
        "vocab_size": text["vocab_size"],
        "transformer_heads": text["heads"],
        "transformer_layers": text["layers"],
        "quick_gelu": bool(config.get("quick_gelu", False)),
    }, state


def _require_end_token(where: str, field: str, eos: Any, vocab_size: int) -> None:
    if eos != vocab_size - 1:
        why = f"clipfast reads the text's features at the largest of its token ids, {vocab_size - 1}"
        raise ValueError(f"{where}: {field} = {eos!r} is not supported: {why}")


def live_config(where: str, module: Any) -> dict[str, Any]:
    """What open_clip's configuration says of a live module, for one of OpenAI's clip or open_clip."""
    visual, text = module.visual, getattr(module, "text", module)
    vit, own = type(visual).__name__ == "VisionTransformer", "text_" if text is module else ""
    require(where, "visual", type(visual).__name__, "VisionTransformer", "ModifiedResNet")
    if text is not module:
        require(where, "text", type(text).__name__, "TextTransformer")
    blocks = [*text.transformer.resblocks, *(visual.transformer.resblocks if vit else [])]
    for block in blocks:
        require(where, "block", type(block).__name__, "ResidualAttentionBlock")
        require(where, "activation", type(block.mlp.gelu).__name__, "QuickGELU", "GELU")
        require(where, "activation", type(block.mlp.gelu).__name__, type(blocks[0].mlp.gelu).__name__)
        require(where, "activation.approximate", getattr(block.mlp.gelu, "approximate", "none"), "none")
    for name, norm in module.named_modules():
        if isinstance(norm, nn.LayerNorm | nn.BatchNorm2d):
            require(where, f"{name}.eps", norm.eps, 1e-5)
    stages = [] if vit else [len(stage) for stage in (visual.layer1, visual.layer2, visual.layer3, visual.layer4)]
    attention = visual.transformer.resblocks[0].attn.out_proj if vit else visual.attnpool.q_proj
    heads = (visual.transformer.resblocks[0].attn if vit else visual.attnpool).num_heads
    return {
        "quick_gelu": type(blocks[0].mlp.gelu).__name__ == "QuickGELU",
        "vision_cfg": {
            "layers": len(visual.transformer.resblocks) if vit else stages,
            "image_size": getattr(visual, "input_resolution", None) or visual.image_size,  # OpenAI's name, open_clip's
            "head_width": attention.in_features // heads,
            "pool_type": getattr(visual, "pool_type", "tok"),
            "final_ln_after_pool": getattr(visual, "final_ln_after_pool", False),
            "patch_dropout": getattr(getattr(visual, "patch_dropout", None), "prob", 0.0),
        },
        "text_cfg": {
            "layers": len(text.transformer.resblocks),
            "heads": text.transformer.resblocks[0].attn.num_heads,
            "context_length": module.context_length,
            "vocab_size": module.vocab_size,
            "pool_type": getattr(text, f"{own}pool_type", "argmax"),
            "eos_id": getattr(text, f"{own}eos_id", None),
            "no_causal_mask": getattr(text, "attn_mask", "OpenAI's keeps it in its blocks") is None,
        },
    }


_COMMON = {"num_hidden_layers": 12, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}
_TRANSFORMERS = {  # its defaults, which a saved config.json leaves out
    "vision_config": {**_COMMON, "image_size": 224, "hidden_size": 768, "num_attention_heads": 12},
    "text_config": {
        **_COMMON,
        **{"num_attention_heads": 8, "max_position_embeddings": 77, "vocab_size": 49408, "eos_token_id": 49407},
    },
}
TRANSFORMERS_NAMES = {  # parts of names, theirs -> OpenAI's; then q, k, v are joined and the projections transposed
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


def from_transformers(where: str, config: dict[str, Any], read: Callable[[], State]) -> tuple[Sizes, State]:
    """config.json (or a live configuration as a dict) of transformers' CLIPModel, in open_clip's terms; the weights."""
    require(where, "model_type", config.get("model_type"), "clip")
    both = {}
    for section, defaults in _TRANSFORMERS.items():  # old files say it twice, and <section>_dict wins, with its defaults
        both[section] = fields = {**defaults, **(config.get(f"{section}_dict") or config.get(section) or {})}
        require(where, f"{section}.layer_norm_eps", fields["layer_norm_eps"], 1e-5)
        require(where, f"{section}.hidden_act", fields["hidden_act"], "quick_gelu", "gelu")
    vision, text = both["vision_config"], both["text_config"]
    require(where, "vision_config.hidden_act", vision["hidden_act"], text["hidden_act"])
    if text["eos_token_id"] != 2:  # 2 stands in old files by mistake: there transformers, too, takes the largest id
        _require_end_token(where, "text_config.eos_token_id", text["eos_token_id"], text["vocab_size"])
    vision_cfg = {
        "layers": vision["num_hidden_layers"],
        "image_size": vision["image_size"],
        "head_width": vision["hidden_size"] // vision["num_attention_heads"],
    }
    text_cfg = {
        "layers": text["num_hidden_layers"],
        "heads": text["num_attention_heads"],
        "context_length": text["max_position_embeddings"],
        "vocab_size": text["vocab_size"],
    }
    same = {"quick_gelu": text["hidden_act"] == "quick_gelu", "vision_cfg": vision_cfg, "text_cfg": text_cfg}
    return from_open_clip(where, same, lambda: _rename_transformers(read()))


def _rename_transformers(tensors: Mapping[str, Tensor]) -> State:
    """OpenAI's names; a tensor of unknown name keeps its own, for `_assemble` to report."""
    state: State = {}
    for name, tensor in tensors.items():
        if not name.endswith("embeddings.position_ids"):  # 0, 1, 2, ...: a buffer that old versions saved
            for theirs, ours in TRANSFORMERS_NAMES.items():
                name = name.replace(theirs, ours)
            state[name] = tensor.T if name in ("text_projection", "visual.proj") else tensor
    for query in [name for name in state if ".attn.q_proj." in name]:
        parts = [query.replace(".q_proj.", f".{part}_proj.") for part in "qkv"]
        if all(part in state for part in parts):
            state[query.replace(".q_proj.", ".in_proj_")] = torch.cat([state.pop(part) for part in parts])
    return state
