"""Programs written for OpenAI's package (prompt learners, adapters, dense features, attribution) run on ours as they are.

Each is a small one of our own in the manner of a published one, and reaches into the model as that does. It runs on OpenAI's
model and on ours with equal weights: outputs, the gradients of what it learns, of every parameter and of the pixels are equal.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import loralib
import peft
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.model.openai import END, FAMILIES, compare, gradients, images, pair, texts

PROGRAMS: dict[str, tuple[type[Program], tuple[str, ...]]] = {}


class Program(nn.Module):
    """A model and what a program adds to it; ``forward(image, text)`` gives its results."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.build(model)

    def build(self, model: Any) -> None: ...


def program(name: str, *families: str) -> Callable[[type[Program]], type[Program]]:
    def keep(cls: type[Program]) -> type[Program]:
        PROGRAMS[name] = cls, families or tuple(FAMILIES)
        return cls

    return keep


def learned(*shape: int, scale: float = 0.3) -> nn.Parameter:
    return nn.Parameter(scale * torch.randn(*shape))


def unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True)


def text_features(model: Any, prompts: Tensor, tokens: Tensor) -> Tensor:
    """Rows in the place of token embeddings [B, L, C] -> [B, D], as every prompt learner writes it."""
    x = prompts + model.positional_embedding.type(model.dtype)
    x = model.transformer(x.permute(1, 0, 2)).permute(1, 0, 2)
    x = model.ln_final(x).type(model.dtype)
    return x[torch.arange(x.shape[0]), tokens.argmax(dim=-1)] @ model.text_projection


def with_context(model: Any, tokens: Tensor, context: Tensor) -> Tensor:
    """The embedded tokens with the rows behind the start token replaced by ``context`` [n, C]."""
    rows = model.token_embedding(tokens).type(model.dtype)
    return torch.cat([rows[:, :1], context.expand(len(rows), -1, -1), rows[:, 1 + len(context) :]], dim=1)


def patch_tokens(visual: Any, image: Tensor) -> Tensor:
    """The tokens of a ViT [B, L, C], normalised, before its transformer."""
    x = visual.conv1(image).flatten(2).permute(0, 2, 1)
    start = visual.class_embedding.to(x.dtype) + torch.zeros(len(x), 1, x.shape[-1], dtype=x.dtype)
    return visual.ln_pre(torch.cat([start, x], dim=1) + visual.positional_embedding.to(x.dtype))


# prompt learners


@program("CoOp")
class CoOp(Program):
    def build(self, model: Any) -> None:
        self.context = learned(4, model.ln_final.weight.shape[0])

    def forward(self, image: Tensor, text: Tensor) -> Any:
        features = text_features(self.model, with_context(self.model, text, self.context), text)
        return self.model.logit_scale.exp() * unit(self.model.encode_image(image)) @ unit(features).t()


@program("CoCoOp")
class CoCoOp(Program):
    """The context moves with the image: a prompt for each image and class."""

    def build(self, model: Any) -> None:
        width, dim = model.ln_final.weight.shape[0], model.visual.output_dim
        self.context = learned(4, width)
        self.meta = nn.Sequential(OrderedDict(linear1=nn.Linear(dim, 6), relu=nn.ReLU(), linear2=nn.Linear(6, width)))

    def forward(self, image: Tensor, text: Tensor) -> Any:
        features = unit(self.model.encode_image(image.type(self.model.dtype)))
        logits = []
        for feature, shift in zip(features, self.meta(features), strict=True):
            prompts = with_context(self.model, text, self.context + shift)
            logits.append(self.model.logit_scale.exp() * feature @ unit(text_features(self.model, prompts, text)).t())
        return torch.stack(logits)


class Prompted(nn.Module):
    """A block before which rows of the sequence are replaced: ``at`` says where they start; length first, as OpenAI's."""

    def __init__(self, block: Any, rows: Callable[[], Tensor], at: int) -> None:
        super().__init__()
        self.block, self.rows, self.at = block, rows, at

    def forward(self, x: Tensor) -> Tensor:
        rows = self.rows()
        rows = rows[:, None].expand(-1, x.shape[1], -1)
        return self.block(torch.cat([x[: self.at], rows, x[self.at + len(rows) :]]))


@program("MaPLe", "vit")
class MaPLe(Program):
    """Prompts in every block of both towers; those of the image tower are projections of those of the text tower."""

    def build(self, model: Any) -> None:
        width, visual = model.ln_final.weight.shape[0], model.visual
        blocks, image_blocks = model.transformer.resblocks, visual.transformer.resblocks
        self.prompts = nn.ParameterList(learned(2, width) for _ in blocks)
        self.projections = nn.ModuleList(nn.Linear(width, visual.conv1.out_channels) for _ in blocks)
        self.tokens = len(visual.positional_embedding)
        for i in range(1, len(blocks)):
            blocks[i] = Prompted(blocks[i], lambda i=i: self.prompts[i], 1)
            image_blocks[i] = Prompted(image_blocks[i], lambda i=i: self.projections[i](self.prompts[i]), self.tokens)

    def forward(self, image: Tensor, text: Tensor) -> Any:
        model, visual = self.model, self.model.visual
        rows = self.projections[0](self.prompts[0]).expand(len(image), -1, -1)
        x = torch.cat([patch_tokens(visual, image.type(model.dtype)), rows], dim=1)
        x = visual.transformer(x.permute(1, 0, 2)).permute(1, 0, 2)
        x = visual.ln_post(x[:, 0, :]) @ visual.proj
        return unit(x), unit(text_features(model, with_context(model, text, self.prompts[0]), text))


@program("VPT, deep, by pre-hooks", "vit")
class VisualPrompts(Program):
    """Learned rows at the end of the sequence of every block, put there by hooks while ``encode_image`` runs."""

    def build(self, model: Any) -> None:
        self.rows = nn.ParameterList()
        for i, block in enumerate(model.visual.transformer.resblocks):
            self.rows.append(learned(3, model.visual.conv1.out_channels))
            block.register_forward_pre_hook(lambda _, args, i=i: self.put(args[0], i))

    def put(self, x: Tensor, i: int) -> Tensor:
        rows = self.rows[i][:, None].expand(-1, x.shape[1], -1)
        return torch.cat([x if i == 0 else x[: -len(rows)], rows])

    def forward(self, image: Tensor, text: Tensor) -> Any:
        return self.model.encode_image(image)


@program("textual inversion")
class TextualInversion(Program):
    """A new word: one more row of the embedding, with an id above the end token's, which OpenAI's argmax then reads."""

    def build(self, model: Any) -> None:
        old = model.token_embedding
        model.token_embedding = nn.Embedding(old.num_embeddings + 1, old.embedding_dim)
        model.token_embedding.weight.data[:-1] = old.weight.data

    def forward(self, image: Tensor, text: Tensor) -> Any:
        text = text.clone()
        text[:, 3] = END + 1
        return self.model.encode_text(text)


# adapters


@program("CLIP-Adapter")
class ClipAdapter(Program):
    def build(self, model: Any) -> None:
        dim = model.visual.output_dim
        self.adapter = nn.Sequential(
            nn.Linear(dim, dim // 4, bias=False), nn.ReLU(), nn.Linear(dim // 4, dim, bias=False), nn.ReLU()
        )

    def forward(self, image: Tensor, text: Tensor) -> Any:
        features = self.model.encode_image(image)
        features = unit(0.2 * self.adapter(features) + 0.8 * features)
        return self.model.logit_scale.exp() * features @ unit(self.model.encode_text(text)).t()


@program("Tip-Adapter")
class TipAdapter(Program):
    """A cache of the features of a few labelled images; its keys are learned on (Tip-Adapter-F)."""

    def build(self, model: Any) -> None:
        with torch.no_grad():
            side = model.visual.input_resolution
            shots = torch.stack([torch.randn(6, 3, side, side) for _ in range(2)])
            features = unit(torch.stack([model.encode_image(view) for view in shots]).mean(0))
        self.cache = nn.Linear(features.shape[1], len(features), bias=False)
        self.cache.weight = nn.Parameter(features)
        self.values = F.one_hot(torch.arange(6) % 2).float()

    def forward(self, image: Tensor, text: Tensor) -> Any:
        with torch.no_grad():
            features, classes = unit(self.model.encode_image(image)), unit(self.model.encode_text(text))
        affinity = self.cache(features)
        return 100.0 * features @ classes.t() + (-(5.5 - 5.5 * affinity)).exp() @ self.values


class Parallel(nn.Module):
    """A layer beside another, with a bottleneck of two (AdaptFormer); the layer's attributes stay in reach."""

    def __init__(self, layer: Any, width: int) -> None:
        super().__init__()
        self.layer, self.down, self.up = layer, nn.Linear(width, 2), nn.Linear(2, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + 0.5 * self.up(F.relu(self.down(x)))


@program("adapters beside every MLP", "vit")
class Adapters(Program):
    def build(self, model: Any) -> None:
        for tower in (model, model.visual):
            for block in tower.transformer.resblocks:
                block.mlp = Parallel(block.mlp, block.ln_1.weight.shape[0])

    def forward(self, image: Tensor, text: Tensor) -> Any:
        return self.model(image, text)


@program("wrapped blocks and norms", "vit")
class WrappedBlocks(Program):
    def build(self, model: Any) -> None:
        for tower in (model, model.visual):
            blocks = tower.transformer.resblocks
            width = blocks[0].ln_1.weight.shape[0]
            blocks[0] = nn.Sequential(blocks[0], nn.LayerNorm(width))
            blocks[1].ln_2 = nn.Sequential(blocks[1].ln_2, nn.Linear(width, width))

    def forward(self, image: Tensor, text: Tensor) -> Any:
        return self.model(image, text)


# LoRA


class Lora(nn.Module):
    """A frozen linear layer and a product of rank two beside it, showing the layer's weight as LoRA libraries do."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down, self.up = learned(2, base.in_features), learned(base.out_features, 2)
        self.weight, self.bias = base.weight, base.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.down.t() @ self.up.t()


@program("LoRA, own", "vit")
class OwnLora(Program):
    def build(self, model: Any) -> None:
        for tower in (model, model.visual):
            for block in tower.transformer.resblocks:
                block.mlp.c_fc, block.mlp.c_proj = Lora(block.mlp.c_fc), Lora(block.mlp.c_proj)

    def forward(self, image: Tensor, text: Tensor) -> Any:
        return self.model(image, text)


class LoraAttention(nn.Module):
    """The attention of a block with loralib's layers, in the place of its nn.MultiheadAttention (as CLIP-LoRA does)."""

    def __init__(self, attn: Any) -> None:
        super().__init__()
        assert isinstance(attn, nn.MultiheadAttention)
        width, self.heads = attn.embed_dim, attn.num_heads
        self.qkv = loralib.MergedLinear(width, 3 * width, r=2, enable_lora=[True, False, True])
        self.out = loralib.Linear(width, width, r=2)
        self.qkv.load_state_dict(dict(weight=attn.in_proj_weight, bias=attn.in_proj_bias), strict=False)
        self.out.load_state_dict(attn.out_proj.state_dict(), strict=False)
        for layer in (self.qkv, self.out):
            nn.init.normal_(layer.lora_B, std=0.3)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, need_weights: bool = False, attn_mask: Any = None) -> Any:
        L, B, C = q.shape
        q, k, v = (t.reshape(L, B * self.heads, -1).transpose(0, 1) for t in self.qkv(q).chunk(3, dim=-1))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask)
        return self.out(y.transpose(0, 1).reshape(L, B, C)), None


@program("LoRA, loralib", "vit")
class LoralibLora(Program):
    def build(self, model: Any) -> None:
        for tower in (model, model.visual):
            for block in tower.transformer.resblocks:
                block.attn = LoraAttention(block.attn)
                fc = loralib.Linear(block.mlp.c_fc.in_features, block.mlp.c_fc.out_features, r=2)
                fc.load_state_dict(block.mlp.c_fc.state_dict(), strict=False)
                nn.init.normal_(fc.lora_B, std=0.3)
                block.mlp.c_fc = fc
        loralib.mark_only_lora_as_trainable(model)
        model.train()  # unmerged

    def forward(self, image: Tensor, text: Tensor) -> Any:
        return self.model(image, text)


class PeftLora(Program):
    targets: tuple[str, ...]

    def build(self, model: Any) -> None:
        config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=[*self.targets], init_lora_weights=False)
        self.tuned = peft.get_peft_model(model, config)

    def forward(self, image: Tensor, text: Tensor) -> Any:
        first = self.tuned(image, text), self.model.encode_image(image)
        self.tuned.merge_adapter()  # into the weights, in place
        merged = self.model.encode_text(text).detach()
        self.tuned.unmerge_adapter()
        return first, merged


@program("LoRA, peft, of the MLPs")
class PeftMlp(PeftLora):
    targets = ("c_fc", "c_proj")


@program("LoRA, peft, of out_proj", "vit")
class PeftOut(PeftLora):
    targets = ("out_proj",)


@program("LoRA, peft, of the whole attention", "vit")
class PeftAttention(PeftLora):
    targets = ("attn",)


# dense features


@program("dense tokens, by blocks", "vit")
class Dense(Program):
    """Every token projected, as a segmentation head takes them; by the transformer whole and block by block."""

    def forward(self, image: Tensor, text: Tensor) -> Any:
        visual = self.model.visual
        x = patch_tokens(visual, image).permute(1, 0, 2)
        states, y = [], x
        for block in visual.transformer.resblocks:
            y = block(y)
            states.append(y)
        whole = visual.ln_post(visual.transformer(x).permute(1, 0, 2)) @ visual.proj
        return whole, states, self.model.encode_image(image)


@program("MaskCLIP, ResNet", "resnet")
class MaskResnet(Program):
    """The projections of the attention pool as 1 × 1 convolutions over the feature map, compared with the texts."""

    def forward(self, image: Tensor, text: Tensor) -> Any:
        v = self.model.visual
        x = image.type(v.conv1.weight.dtype)
        for conv, bn, relu in ((v.conv1, v.bn1, v.relu1), (v.conv2, v.bn2, v.relu2), (v.conv3, v.bn3, v.relu3)):
            x = relu(bn(conv(x)))
        x = v.layer4(v.layer3(v.layer2(v.layer1(v.avgpool(x)))))
        for linear in (v.attnpool.v_proj, v.attnpool.c_proj):
            x = F.conv2d(x, linear.weight[:, :, None, None], linear.bias)
        return F.conv2d(x / x.norm(dim=1, keepdim=True), unit(self.model.encode_text(text))[:, :, None, None])


@program("MaskCLIP, ViT", "vit")
class MaskVit(Program):
    """The last block with the values in the place of its attention's output."""

    def forward(self, image: Tensor, text: Tensor) -> Any:
        visual = self.model.visual
        x = patch_tokens(visual, image).permute(1, 0, 2)
        *blocks, last = visual.transformer.resblocks
        for block in blocks:
            x = block(x)
        attn = last.attn
        width = attn.embed_dim
        value = F.linear(last.ln_1(x), attn.in_proj_weight[2 * width :], attn.in_proj_bias[2 * width :])
        x = x + attn.out_proj(value)
        x = x + last.mlp(last.ln_2(x))
        dense = visual.ln_post(x.permute(1, 0, 2))[:, 1:] @ visual.proj
        return unit(dense) @ unit(self.model.encode_text(text)).t()


@program("CLIP Surgery's attention", "vit")
class Surgery(Program):
    """The method of the last block replaced on the instance: value to value in the place of query to key."""

    def build(self, model: Any) -> None:
        block = model.visual.transformer.resblocks[-1]

        def attention(x: Tensor) -> Tensor:
            attn, (L, B, C) = block.attn, x.shape
            v = F.linear(x, attn.in_proj_weight, attn.in_proj_bias).chunk(3, dim=-1)[2]
            v = v.reshape(L, B * attn.num_heads, attn.head_dim).transpose(0, 1)
            y = torch.softmax(v @ v.transpose(1, 2) * attn.head_dim**-0.5, dim=-1) @ v
            return attn.out_proj(y.transpose(0, 1).reshape(L, B, C))

        block.attention = attention

    def forward(self, image: Tensor, text: Tensor) -> Any:
        return self.model.encode_image(image)


@program("feature pyramid of a ResNet by hooks", "resnet")
class Pyramid(Program):
    def forward(self, image: Tensor, text: Tensor) -> Any:
        found: list[Tensor] = []
        visual = self.model.visual
        hooks = [
            m.register_forward_hook(lambda _, __, y: found.append(y)) for m in (visual.layer1, visual.layer2, visual.layer3)
        ]
        features = self.model.encode_image(image)
        for hook in hooks:
            hook.remove()
        return features, found


# attribution


class GradCam(Program):
    def layer(self) -> Any: ...

    def forward(self, image: Tensor, text: Tensor) -> Any:
        """The activations of a layer and their gradient, by a forward hook with ``retain_grad`` and by a backward hook."""
        kept, grads = [], []

        def keep(_: Any, __: Any, output: Tensor) -> None:
            output.retain_grad()
            kept.append(output)

        layer = self.layer()
        hooks = [layer.register_forward_hook(keep), layer.register_full_backward_hook(lambda _, __, g: grads.append(g[0]))]
        features = unit(self.model.encode_image(image))
        (features * unit(self.model.encode_text(text)).detach()).sum().backward()
        for hook in hooks:
            hook.remove()
        (activation,) = kept
        (grad,) = grads
        places = (2, 3) if activation.ndim == 4 else 0
        cam = F.relu((activation * activation.grad.mean(places, keepdim=True)).sum(1 if activation.ndim == 4 else 2))
        return activation.detach(), activation.grad, grad, cam.detach()


@program("Grad-CAM, ResNet", "resnet")
class GradCamResnet(GradCam):
    def layer(self) -> Any:
        return self.model.visual.layer4


@program("Grad-CAM, ViT, a block", "vit")
class GradCamVit(GradCam):
    def layer(self) -> Any:
        return self.model.visual.transformer.resblocks[-1]


@program("Grad-CAM, ViT, a norm", "vit")
class GradCamNorm(GradCam):
    def layer(self) -> Any:
        return self.model.visual.transformer.resblocks[-1].ln_1


@program("Grad-CAM, ViT, the first convolution", "vit")
class GradCamConvolution(GradCam):
    def layer(self) -> Any:
        return self.model.visual.conv1


def rolled(maps: list[Tensor]) -> Tensor:
    """Attention maps [B, L, L] of the blocks -> what the first token gets of every token."""
    joint = torch.eye(maps[0].shape[-1])
    for weights in maps:
        joint = (0.5 * weights + 0.5 * torch.eye(weights.shape[-1])) @ joint
    return joint[:, 0]


@program("attention roll-out", "vit")
class Rollout(Program):
    """The blocks run by hand with ``need_weights``: averaged and of every head, with the mask of the text tower."""

    def forward(self, image: Tensor, text: Tensor) -> Any:
        maps, heads = [], []
        x = patch_tokens(self.model.visual, image).permute(1, 0, 2)
        for block in self.model.visual.transformer.resblocks:
            y = block.ln_1(x)
            update, weights = block.attn(y, y, y, need_weights=True, attn_mask=block.attn_mask)
            maps.append(weights)
            x = x + update
            x = x + block.mlp(block.ln_2(x))
        x = (self.model.token_embedding(text) + self.model.positional_embedding).permute(1, 0, 2)
        for block in self.model.transformer.resblocks:
            y = block.ln_1(x)
            heads.append(block.attn(y, y, y, need_weights=True, attn_mask=block.attn_mask, average_attn_weights=False)[1])
            x = block(x)
        return rolled(maps), heads


@program("attention roll-out by hooks", "vit")
class HookedRollout(Program):
    """Pre-hooks ask every ``attn`` for its weights, forward hooks keep them, while ``encode_image`` runs."""

    def forward(self, image: Tensor, text: Tensor) -> Any:
        maps, hooks = [], []
        for block in self.model.visual.transformer.resblocks:
            asked = block.attn.register_forward_pre_hook(lambda _, a, k: (a, k | dict(need_weights=True)), with_kwargs=True)
            kept = block.attn.register_forward_hook(lambda _, __, y: maps.append(y[1]))
            hooks += [asked, kept]
        features = self.model.encode_image(image)
        for hook in hooks:
            hook.remove()
        return rolled(maps), features


@program("relevance of Chefer et al.", "vit")
class Relevance(Program):
    """Attention maps weighted by their gradients: every block's ``attention`` gives its weights, which keep their gradient."""

    def build(self, model: Any) -> None:
        self.maps: list[Tensor] = []
        for tower in (model, model.visual):
            for block in tower.transformer.resblocks:
                block.attention = lambda x, block=block: self.attend(block, x)

    def attend(self, block: Any, x: Tensor) -> Tensor:
        attn, (L, B, C) = block.attn, x.shape
        q, k, v = F.linear(x, attn.in_proj_weight, attn.in_proj_bias).chunk(3, dim=-1)
        q, k, v = (t.reshape(L, B * attn.num_heads, attn.head_dim).transpose(0, 1) for t in (q, k, v))
        scores = q @ k.transpose(1, 2) * attn.head_dim**-0.5
        weights = torch.softmax(scores if block.attn_mask is None else scores + block.attn_mask, dim=-1)
        self.maps.append(weights)
        return attn.out_proj((weights @ v).transpose(0, 1).reshape(L, B, C))

    def forward(self, image: Tensor, text: Tensor) -> Any:
        self.maps.clear()
        per_image, _ = self.model(image, text)
        grads = torch.autograd.grad(per_image.diagonal().sum(), self.maps, retain_graph=True)
        return per_image, [(g * m.detach()).clamp(min=0).mean(0) for g, m in zip(grads, self.maps, strict=True)]


@program("integrated gradients of the token rows")
class TokenGradients(Program):
    """``token_embedding`` hooked: its output becomes a leaf whose gradient is asked for."""

    def forward(self, image: Tensor, text: Tensor) -> Any:
        kept = []

        def leaf(_: Any, __: Any, rows: Tensor) -> Tensor:
            kept.append(rows.detach().requires_grad_())
            return kept[0] * 0.5

        hook = self.model.token_embedding.register_forward_hook(leaf)
        features = self.model.encode_text(text)
        hook.remove()
        (grad,) = torch.autograd.grad(features.pow(2).sum(), kept, retain_graph=True)
        return features, grad


@pytest.mark.parametrize("family", FAMILIES)
def test_programs_give_what_they_give_on_openai(family: str) -> None:
    sizes = FAMILIES[family]
    text = texts()
    wrong = {}
    for name, (cls, families) in PROGRAMS.items():
        if family not in families:
            continue

        def run(model: Any, cls: type[Program] = cls) -> Any:
            torch.manual_seed(7)
            made = cls(model)
            pixels = images(sizes).requires_grad_()
            torch.manual_seed(8)
            outputs = made(pixels, text)
            return outputs, gradients(made, outputs, pixels)

        if found := compare(run, *pair(sizes)):
            wrong[name] = found
    assert not wrong, "\n".join(f"{name}: {found}" for name, found in wrong.items())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_program_leaves_nothing_behind(family: str) -> None:
    """Once its hooks are removed, a model gives what it gave before, to the bit."""
    _, model = pair(FAMILIES[family])
    image, text = images(FAMILIES[family]), texts()
    before = model(image, text)
    for module in model.modules():
        module.register_forward_hook(lambda *_: None).remove()
        module.register_full_backward_hook(lambda *_: None).remove()
    assert all(torch.equal(a, b) for a, b in zip(before, model(image, text), strict=True))
