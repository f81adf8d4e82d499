"""Parts that were exchanged, resized, re-parametrised, pruned or masked: ours does with them what OpenAI's class does."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import clipfast.model
from tests.model.openai import FAMILIES, VIT, compare, difference_of, encoded, gradients, images, outcome, pair, texts
from tests.model.openai import openai as reference

CHANGES: dict[str, dict[str, Callable[[Any], Any]]] = {"vit": {}, "resnet": {}, "text": {}}


def change(*towers: str) -> Callable[[Callable], Callable]:
    def keep(make: Callable) -> Callable:
        for tower in towers:
            CHANGES[tower][make.__name__.strip("_")] = make
        return make

    return keep


def blocks_of(model: Any, tower: str) -> Any:
    return (model if tower == "text" else model.visual).transformer.resblocks


def every_block(**makes: Callable[[Any], Any]) -> None:
    """A change of one block, made in the second of either tower, as ``name = function of the block``."""
    for name, make in makes.items():
        for tower in ("vit", "text"):
            for at in (0, 1):
                CHANGES[tower][f"{name}, block {at}"] = lambda m, make=make, tower=tower, at=at: make(blocks_of(m, tower)[at])


def noisy(module: Any) -> Any:
    for p in module.parameters():
        nn.init.normal_(p, std=0.1)
    return module


def attention_of(**options: Any) -> Callable[[Any], Any]:
    return lambda b: setattr(b, "attn", noisy(nn.MultiheadAttention(b.attn.embed_dim, **({"num_heads": 2} | options))))


def norm_of(**options: Any) -> Callable[[Any], Any]:
    return lambda b: setattr(b, "ln_1", nn.LayerNorm(b.ln_1.normalized_shape, **options))


def settings(home: str, **values: Any) -> Callable[[Any], Any]:
    def make(b: Any) -> None:
        for name, value in values.items():
            setattr(b.get_submodule(home), name, value)

    return make


def another_mask(b: Any) -> None:
    length = 16 if b.ln_1.weight.shape[0] == 64 else 17
    b.attn_mask = torch.randn(length, length)


def written_mask(b: Any) -> None:
    """The mask that is there, written into; of the image tower one that is causal."""
    if b.attn_mask is None:
        b.attn_mask = torch.full((17, 17), -torch.inf).triu_(1)
    b.attn_mask = b.attn_mask.clone()
    b.attn_mask[-1, :3] = -torch.inf


def data_of_mask(b: Any) -> None:
    """The same through ``.data``, which no version counts."""
    written_mask(b)
    b.attn_mask.data[:, 1] = -1.0


every_block(
    no_mask=lambda b: setattr(b, "attn_mask", None),
    another_mask=another_mask,
    written_mask=written_mask,
    data_of_mask=data_of_mask,
    three_dimensional_mask=lambda b: setattr(b, "attn_mask", torch.randn(4, 17, 17)),
    bool_mask=lambda b: setattr(b, "attn_mask", torch.rand(17, 17) > 0.5),
    attention_without_bias=attention_of(bias=False),
    attention_with_bias_kv=attention_of(add_bias_kv=True),
    attention_with_zero=attention_of(add_zero_attn=True),
    attention_of_other_heads=attention_of(num_heads=4),
    attention_of_separate_weights=lambda b: attention_of(kdim=b.attn.embed_dim, vdim=b.attn.embed_dim)(b),
    attention_batch_first=attention_of(batch_first=True),
    heads_by_attribute=lambda b: settings("attn", num_heads=1, head_dim=b.attn.embed_dim)(b),
    no_out_bias=settings("attn.out_proj", bias=None),
    no_in_bias=settings("attn", in_proj_bias=None),
    dropout=lambda b: settings("attn", dropout=0.5)(b.train()),
    plain_norm=norm_of(),
    norm_without_affine=norm_of(elementwise_affine=False),
    norm_without_bias=norm_of(bias=False),
    norm_of_other_eps=lambda b: setattr(b.ln_2, "eps", 0.3),
    rms_norm=lambda b: setattr(b, "ln_2", nn.RMSNorm(b.ln_1.normalized_shape[0])),
    no_norm=lambda b: setattr(b, "ln_1", nn.Identity()),
    group_norm=lambda b: setattr(b, "ln_1", nn.Sequential(
        nn.Flatten(0, 1), nn.GroupNorm(4, b.attn.embed_dim), nn.Unflatten(0, (-1, 2)))),
    relu=lambda b: setattr(b.mlp, "gelu", nn.ReLU()),
    gelu=lambda b: setattr(b.mlp, "gelu", nn.GELU()),
    tanh_gelu=lambda b: setattr(b.mlp, "gelu", nn.GELU("tanh")),
    softmax=lambda b: setattr(b.mlp, "gelu", nn.Softmax(-1)),
    activation_mutated=lambda b: (setattr(b.mlp, "gelu", nn.GELU()), setattr(b.mlp.gelu, "approximate", "tanh")),
    mlp_without_bias=settings("mlp.c_fc", bias=None),
    mlp_without_last_bias=settings("mlp.c_proj", bias=None),
    narrow_mlp=lambda b: setattr(b, "mlp", nn.Sequential(OrderedDict(
        c_fc=nn.Linear(b.attn.embed_dim, 24), gelu=nn.GELU(), c_proj=nn.Linear(24, b.attn.embed_dim)))),
    mlp_of_other_names=lambda b: setattr(b, "mlp", nn.Sequential(
        nn.Linear(b.attn.embed_dim, 24), nn.ReLU(), nn.Linear(24, b.attn.embed_dim))),
    longer_mlp=lambda b: b.mlp.append(nn.Linear(b.attn.embed_dim, b.attn.embed_dim)),
    dropout_in_mlp=lambda b: (setattr(b, "mlp", nn.Sequential(OrderedDict(
        c_fc=b.mlp.c_fc, gelu=b.mlp.gelu, dropout=nn.Dropout(0.5), c_proj=b.mlp.c_proj))), b.train()),
    no_mlp=lambda b: setattr(b, "mlp", nn.Identity()),
    activation_put_before=lambda b: setattr(b, "mlp", nn.Sequential(OrderedDict(
        c_fc=b.mlp.gelu, gelu=b.mlp.c_fc, c_proj=b.mlp.c_proj))),
    a_weight_of_two=lambda b: setattr(b.mlp.c_proj, "weight", nn.Parameter(2 * b.mlp.c_proj.weight.detach())),
)  # fmt: skip


for tower in ("vit", "text"):
    for name, make in dict(
        fewer_blocks=lambda t: setattr(t, "resblocks", t.resblocks[:1]),
        no_blocks=lambda t: setattr(t, "resblocks", nn.Sequential()),
        blocks_reversed=lambda t: setattr(t, "resblocks", nn.Sequential(*reversed(t.resblocks))),
        one_block_twice=lambda t: t.resblocks.append(t.resblocks[0]),
        a_linear_between=lambda t: t.resblocks.insert(1, nn.Linear(t.width, t.width)),
        a_norm_at_the_end=lambda t: t.resblocks.append(nn.LayerNorm(t.width)),
    ).items():  # fmt: skip
        CHANGES[tower][name] = lambda m, make=make, tower=tower: make((m if tower == "text" else m.visual).transformer)


# the image tower's ends


@change("vit", "resnet")
def no_change(model: Any) -> None: ...


@change("vit")
def no_projection(model: Any) -> None:
    model.visual.proj = None


@change("vit")
def no_last_norm(model: Any) -> None:
    model.visual.ln_post = nn.Identity()


@change("vit")
def no_first_norm(model: Any) -> None:
    model.visual.ln_pre = nn.Identity()


@change("vit")
def neither_norm_nor_projection(model: Any) -> None:
    model.visual.ln_post, model.visual.proj = nn.Identity(), None


@change("vit")
def another_projection(model: Any) -> None:
    model.visual.proj = nn.Parameter(torch.randn(128, 7))


@change("vit")
def first_bias(model: Any) -> None:
    model.visual.conv1.bias = nn.Parameter(torch.randn(128))


@change("vit")
def overlapping_patches(model: Any) -> None:
    model.visual.conv1.stride = (4, 4)
    model.visual.positional_embedding = nn.Parameter(torch.randn(50, 128))


@change("vit")
def padded_patches(model: Any) -> None:
    model.visual.conv1.padding = (4, 4)
    model.visual.positional_embedding = nn.Parameter(torch.randn(26, 128))


@change("vit")
def larger_patches(model: Any) -> None:
    model.visual.conv1 = nn.Conv2d(3, 128, 16, 16, bias=False)
    model.visual.positional_embedding = nn.Parameter(torch.randn(5, 128))


@change("vit")
def oblong_patches(model: Any) -> None:
    model.visual.conv1 = nn.Conv2d(3, 128, (8, 16), (8, 16), bias=False)
    model.visual.positional_embedding = nn.Parameter(torch.randn(9, 128))


@change("vit")
def reflected_padding(model: Any) -> None:
    model.visual.conv1 = nn.Conv2d(3, 128, 8, 8, padding=4, padding_mode="reflect", bias=False)
    model.visual.positional_embedding = nn.Parameter(torch.randn(26, 128))


@change("vit")
def patches_by_unfolding(model: Any) -> None:
    model.visual.conv1 = nn.Sequential(nn.Unfold(8, stride=8), nn.Unflatten(2, (4, 4)), nn.Conv2d(192, 128, 1))
    model.visual.conv1.weight = model.visual.conv1[2].weight


@change("vit")
def a_class_token_of_each_image(model: Any) -> None:
    model.visual.class_embedding = nn.Parameter(torch.randn(2, 1, 128))


@change("vit")
def positions_of_each_image(model: Any) -> None:
    model.visual.positional_embedding = nn.Parameter(torch.randn(2, 17, 128))


@change("vit")
def a_subclass_of_the_block(model: Any) -> None:
    for block in model.visual.transformer.resblocks:
        base = type(block)
        block.__class__ = type("Block", (base,), {"attention": lambda self, x, base=base: 2 * base.attention(self, x)})


@change("resnet")
def dense_last_stage(model: Any) -> None:
    """No stride in the last stage, as dense features want it, and more positions."""
    stage = model.visual.layer4
    stage[0].avgpool = nn.Identity()
    stage[0].downsample._modules["-1"] = nn.Identity()
    for block in stage:
        block.conv2.dilation = block.conv2.padding = (2, 2)
    model.visual.attnpool.positional_embedding = nn.Parameter(torch.randn(17, 256))


@change("resnet")
def average_pool(model: Any) -> None:
    model.visual.attnpool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())


@change("resnet")
def feature_map(model: Any) -> None:
    model.visual.attnpool = nn.Identity()


@change("resnet")
def other_activations(model: Any) -> None:
    model.visual.relu2, model.visual.layer1[0].relu1, model.visual.layer2[0].relu3 = nn.SiLU(), nn.LeakyReLU(), nn.GELU()


@change("resnet")
def other_pools(model: Any) -> None:
    model.visual.avgpool, model.visual.layer2[0].avgpool = nn.MaxPool2d(2), nn.MaxPool2d(2)


@change("resnet")
def convolutions(model: Any) -> None:
    visual = model.visual
    visual.conv2 = nn.Conv2d(4, 4, 3, padding=1, groups=2)
    visual.conv3.padding_mode, visual.conv3._reversed_padding_repeated_twice = "reflect", [1, 1, 1, 1]
    visual.layer1[0].conv2 = nn.Conv2d(8, 8, 5, padding=2, bias=False)
    visual.layer2[0].conv1.bias = nn.Parameter(torch.randn(16))


@change("resnet")
def norms_in_training(model: Any) -> None:
    model.train()
    model.visual.bn1.momentum, model.visual.bn2.eps = 0.5, 0.3
    model.visual.bn3 = nn.BatchNorm2d(8, affine=False)
    block = model.visual.layer1[0]
    block.bn1, block.bn2 = nn.BatchNorm2d(8, track_running_stats=False), nn.BatchNorm2d(8, momentum=None)
    block.bn3 = nn.GroupNorm(4, 32)


@change("resnet")
def norms_frozen(model: Any) -> None:
    model.train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()


@change("resnet")
def heads_of_the_pool(model: Any) -> None:
    model.visual.attnpool.num_heads = 2


@change("resnet")
def another_projection_of_the_pool(model: Any) -> None:
    model.visual.attnpool.c_proj = nn.Linear(256, 5)


@change("resnet")
def a_block_more(model: Any) -> None:
    model.visual.layer1.append(type(model.visual.layer1[0])(32, 8))
    model.visual.layer1[1].downsample = nn.Sequential(nn.Conv2d(32, 32, 1), nn.BatchNorm2d(32))
    model.eval()


# the text tower's ends


@change("text")
def no_final_norm(model: Any) -> None:
    model.ln_final = nn.Identity()


@change("text")
def another_text_projection(model: Any) -> None:
    model.text_projection = nn.Parameter(torch.randn(64, 5))


@change("text")
def more_words(model: Any) -> None:
    model.token_embedding = nn.Embedding(100, 64)


@change("text")
def embedding_of_small_norm(model: Any) -> None:
    model.token_embedding = nn.Embedding(60, 64, max_norm=1.0)


@change("text")
def embedding_with_padding(model: Any) -> None:
    model.token_embedding = nn.Embedding(60, 64, padding_idx=59, scale_grad_by_freq=True)


@change("text")
def sparse_embedding(model: Any) -> None:
    model.token_embedding.sparse = True


@change("text")
def longer_context(model: Any) -> None:
    """As Long-CLIP: a longer table of positions, masks to fit."""
    model.context_length = 24
    model.positional_embedding = nn.Parameter(torch.randn(24, 64))
    for block in model.transformer.resblocks:
        block.attn_mask = model.build_attention_mask()


@pytest.mark.parametrize("tower", CHANGES)
def test_changed_parts(tower: str) -> None:
    """Outputs, gradients and statistics equal OpenAI's; what it refuses, ours refuses."""
    family = "vit" if tower == "text" else tower
    run = encoded(None, texts()) if tower == "text" else encoded(images(FAMILIES[family]))
    wrong, refused = {}, set()
    for name, make in CHANGES[tower].items():
        theirs, ours = pair(FAMILIES[family], make)
        expected, got = outcome(run, theirs), outcome(run, ours)
        if isinstance(expected, Exception):
            refused.add(name)
            if not isinstance(got, Exception):
                wrong[name] = f"OpenAI's raises {type(expected).__name__}, ours gives {[list(t.shape) for t in got[0]]}"
        elif found := difference_of(expected, got):
            wrong[name] = found
    assert not wrong, "\n".join(f"{name}: {found}" for name, found in wrong.items())
    batch_first = {f"attention_batch_first, block {at}" for at in (0, 1)}  # a mask of L tokens beside B
    assert refused == (batch_first if tower == "text" else set())


# sizes


def of_size(height: int, width: int, dim: int = 128, patch: int = 8) -> Callable[[Any], Any]:
    tokens = 1 + (height // patch) * (width // patch)

    def make(model: Any) -> None:
        home = model.visual if dim == 128 else model.visual.attnpool
        home.positional_embedding = nn.Parameter(torch.randn(tokens, dim))

    return make


SIZED = {"vit": [(48, 48), (32, 48), (56, 16), (35, 39)], "resnet": [(96, 96), (64, 128)]}


@pytest.mark.parametrize("family", SIZED)
def test_tables_of_other_sizes(family: str) -> None:
    for size in SIZED[family]:
        image = torch.randn(2, 3, *size)
        models = pair(FAMILIES[family], of_size(*size) if family == "vit" else of_size(*size, 256, 32))
        assert not compare(encoded(image), *models), size
        assert not compare(lambda model, image=image: model.visual(image), *models), size
        for method in (models[1].visual, models[1].encode_image) if size != (35, 39) else ():  # which has 4 x 4 patches too
            with pytest.raises((RuntimeError, ValueError)):
                method(images(FAMILIES[family]))


def test_images_of_four_channels() -> None:
    def four(model: Any) -> None:
        model.visual.conv1 = nn.Conv2d(4, 128, 8, 8, bias=False)

    models = pair(VIT, four)
    image = torch.randn(2, 4, 32, 32)
    assert not compare(encoded(image), *models)
    assert not compare(lambda model: model.visual(image), *models)
    for method in (models[1].visual, models[1].encode_image):
        with pytest.raises((RuntimeError, ValueError)):
            method(image[:, :3])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shape", [(3, 96, 64), (3, 40, 40), (3, 16, 16), (1, 32, 32), (4, 64, 64)], ids=str)
def test_images_that_do_not_fit_are_refused(family: str, shape: tuple[int, ...]) -> None:
    image = torch.randn(2, *shape)
    theirs, ours = pair(FAMILIES[family])
    for call in (lambda m: m.visual(image), lambda m: m.encode_image(image)):
        assert isinstance(outcome(call, theirs), Exception)
        assert isinstance(outcome(call, ours), (RuntimeError, ValueError))


def test_patches_that_overlap_without_their_positions_are_refused() -> None:
    theirs, ours = pair(VIT, lambda model: setattr(model.visual.conv1, "stride", (4, 4)))
    for call in (lambda m: m.visual(images(VIT)), lambda m: m.encode_image(images(VIT))):
        assert isinstance(outcome(call, theirs), RuntimeError)
        assert isinstance(outcome(call, ours), (RuntimeError, ValueError))


# texts


def test_texts_are_read_at_the_first_of_their_largest_ids() -> None:
    """Without an end token, with several, with one in the first place, shorter than the context, of another integer type."""
    generator = torch.Generator().manual_seed(9)
    plain = torch.randint(0, 40, (5, 16), generator=generator)
    several = texts()
    several[:, 3] = several[:, 5] = 59
    first = texts()
    first[:, 0] = 59
    for text in (plain, several, first, torch.zeros(2, 16, dtype=torch.long), plain[:, :9], plain[:, :1], texts().int()):
        assert not compare(encoded(None, text), *pair(VIT)), text
    models = pair(VIT)
    for text in (torch.full((2, 16), 60), torch.full((2, 17), 5), torch.full((2, 16), -1)):
        assert all(isinstance(outcome(encoded(None, text), model), Exception) for model in models), text


# weights that are computed


class Scaled(nn.Module):
    def __init__(self, like: Tensor) -> None:
        super().__init__()
        self.scale = nn.Parameter(1 + 0.3 * torch.randn(like.shape[0], *[1] * (like.ndim - 1)))

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.scale


def parametrized(module: Any, name: str) -> None:
    parametrize.register_parametrization(module, name, Scaled(getattr(module, name)))


def steps(family: str, text: bool) -> Callable[[Any], Any]:
    """Features of three training steps, and the weights after them."""

    def call(model: Any) -> Any:
        torch.manual_seed(6)
        optimizer = torch.optim.SGD(model.parameters(), 0.01)
        features = []
        for _ in range(3):
            outputs = [model.encode_image(images(FAMILIES[family]))] + ([model.encode_text(texts())] if text else [])
            gradients(model, outputs)
            optimizer.step()
            features.append([o.detach() for o in outputs])
        return features, {name: value.detach().clone() for name, value in model.state_dict().items()}

    return call


def rows_first(model: Any) -> Any:
    """With weights in torch's usual order, since torch's pruning fails on any convolution whose channels come last."""
    return model.to(memory_format=torch.contiguous_format)


COMPUTED: dict[str, Callable[[Any, str], Any]] = {
    "parametrize": parametrized,
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "the old weight_norm": nn.utils.weight_norm,
    "the old spectral_norm": nn.utils.spectral_norm,
    "prune": lambda module, name: prune.l1_unstructured(module, name, 0.3),
}
HOMES = {
    "vit": ["visual.conv1", "visual.transformer.resblocks.0.attn.out_proj", "transformer.resblocks.1.attn.out_proj",
            "visual.transformer.resblocks.1.mlp.c_fc", "transformer.resblocks.0.mlp.c_proj", "token_embedding"],
    "resnet": ["visual.conv2", "visual.layer2.0.conv1", "visual.layer3.0.downsample.0", "visual.attnpool.v_proj",
               "visual.attnpool.c_proj"],
}  # fmt: skip


@pytest.mark.parametrize("manner", COMPUTED)
@pytest.mark.parametrize("family", FAMILIES)
def test_computed_weights_train(family: str, manner: str) -> None:
    wrong, refused = {}, set()
    for home in HOMES[family]:
        models = pair(
            FAMILIES[family], lambda model, home=home: COMPUTED[manner](rows_first(model).get_submodule(home), "weight")
        )
        call = steps(family, family == "vit")
        expected, got = outcome(call, models[0]), outcome(call, models[1])
        if isinstance(expected, Exception):
            refused.add(home)
        elif found := difference_of(expected, got, 2e-5):
            wrong[home] = found
    assert not wrong, "\n".join(f"{manner} of {home}: {found}" for home, found in wrong.items())
    # Hooks compute the weights, and OpenAI's class does not call these.
    uncalled = {home for home in HOMES[family] if home.endswith(("out_proj", "v_proj", "attnpool.c_proj"))}
    assert refused == (uncalled if manner in ("the old weight_norm", "prune") else set())


OTHERS = {
    "vit": [("", "positional_embedding"), ("", "text_projection"), ("visual", "proj"), ("visual", "class_embedding"),
            ("visual", "positional_embedding"), ("visual.ln_pre", "weight"), ("transformer.resblocks.0.ln_2", "bias"),
            ("visual.transformer.resblocks.1.attn", "in_proj_weight"), ("transformer.resblocks.1.attn", "in_proj_bias")],
    "resnet": [("visual.attnpool", "positional_embedding"), ("visual.bn1", "weight"), ("visual.layer1.0.bn3", "bias")],
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_any_parameter_may_be_parametrized(family: str) -> None:
    wrong = {}
    for home, name in OTHERS[family]:
        models = pair(FAMILIES[family], lambda model, home=home, name=name: parametrized(model.get_submodule(home), name))
        if found := compare(steps(family, True), *models, 2e-5):
            wrong[f"{home}.{name}"] = found
    assert not wrong, "\n".join(f"{name}: {found}" for name, found in wrong.items())


class Louder(torch.Tensor):
    """A parameter that any function takes as three times what it is."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.detach:
            return super().__torch_function__(func, types, args, kwargs or {})
        if func in COMPUTING:
            args = [cls.value(a) for a in args]
            return func(*args, **{name: cls.value(a) for name, a in (kwargs or {}).items()})
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def value(cls, found: Any) -> Any:
        return 3 * found.as_subclass(torch.Tensor) if type(found) is cls else found


COMPUTING = (F.linear, F.conv2d, F.layer_norm, F.embedding, F.multi_head_attention_forward)
SUBCLASSED = [
    "visual.conv1.weight", "visual.ln_pre.weight", "visual.transformer.resblocks.0.mlp.c_fc.weight",
    "transformer.resblocks.1.mlp.c_proj.weight", "transformer.resblocks.1.attn.out_proj.weight",
    "visual.transformer.resblocks.1.attn.in_proj_weight", "token_embedding.weight", "ln_final.weight",
]  # fmt: skip


def test_parameters_of_a_tensor_subclass_act() -> None:
    wrong, still = {}, set()
    call = encoded(images(VIT), texts())
    before = outcome(call, pair(VIT)[0])[0]
    for name in SUBCLASSED:
        home, _, last = name.rpartition(".")

        def make(model: Any, home: str = home, last: str = last) -> None:
            module = model.get_submodule(home)
            setattr(module, last, nn.Parameter(getattr(module, last).detach().as_subclass(Louder)))

        models = pair(VIT, make)
        expected = outcome(call, models[0])
        if found := difference_of(expected, outcome(call, models[1])):
            wrong[name] = found
        if not difference_of(before, expected[0]):
            still.add(name)
    assert not wrong, "\n".join(f"{name}: {found}" for name, found in wrong.items())
    assert not still


@pytest.mark.parametrize("family", FAMILIES)
def test_functional_call_with_other_weights(family: str) -> None:
    """All of them, one alone, per image and gradients by torch.func."""

    def call(model: Any) -> Any:
        state = {name: 1.5 * value.detach() for name, value in model.named_parameters()}
        some = {
            name: value.clone().requires_grad_()
            for name, value in state.items()
            if name.endswith(("c_fc.weight", "conv1.weight"))
        }
        args = images(FAMILIES[family]), texts()
        whole = torch.func.functional_call(model, state, args)
        part = torch.func.functional_call(model, some, args)
        grads = torch.autograd.grad(sum(p.sin().sum() for p in part), [*some.values()])

        def loss(some: Any, image: Tensor) -> Tensor:
            found = torch.func.functional_call(model, some, (image[None], args[1]))
            return found[0].sin().sum()

        each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))({k: v.detach() for k, v in some.items()}, args[0])
        return [t.detach() for t in (*whole, *part)], list(grads), {k: v.detach() for k, v in each.items()}

    assert not compare(call, *pair(FAMILIES[family]), 2e-5)


# classes that were patched


PATCHED = ("ResidualAttentionBlock.attention", "ResidualAttentionBlock.forward", "QuickGELU.forward", "LayerNorm.forward",
           "Transformer.forward", "VisionTransformer.forward", "CLIP.encode_image")  # fmt: skip


@pytest.mark.parametrize("name", PATCHED)
def test_methods_replaced_on_a_class(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As programs do to change every block at once."""
    cls, _, method = name.partition(".")
    call = encoded(images(VIT), texts())
    before = outcome(call, pair(VIT)[0])[0]
    for home in (reference, clipfast.model):
        old = getattr(getattr(home, cls), method)
        monkeypatch.setattr(getattr(home, cls), method, lambda self, x, old=old: old(self, x) + old(self, x).sin())
    theirs, ours = pair(VIT)
    expected = outcome(call, theirs)
    assert difference_of(before, expected[0])
    assert not difference_of(expected, outcome(call, ours))


@pytest.mark.parametrize("cls", [nn.Linear, nn.LayerNorm, nn.Conv2d, nn.MultiheadAttention, nn.Embedding, nn.Sequential])
def test_methods_replaced_on_torchs_class(cls: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    call = encoded(images(VIT), texts())
    theirs, ours = pair(VIT)
    before, old = outcome(call, theirs)[0], cls.forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        found = old(self, *args, **kwargs)
        return (found[0].cos(), None) if isinstance(found, tuple) else found.cos()

    monkeypatch.setattr(cls, "forward", forward)
    expected = outcome(call, theirs)
    assert difference_of(before, expected[0])
    assert not difference_of(expected, outcome(call, ours))


def test_dynamic_quantisation() -> None:
    def call(model: Any) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            small = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
        assert "dynamic" in type(small.visual.transformer.resblocks[0].mlp.c_fc).__module__
        with torch.no_grad():
            return [small.encode_image(images(VIT)), small.encode_text(texts())]

    theirs, ours = pair(VIT)
    assert difference_of(outcome(encoded(images(VIT), texts()), theirs)[0], outcome(call, theirs), 1e-4)
    assert not compare(call, theirs, ours, 1e-4)
