"""The one rule between the two ways through a tower: what nobody touched runs fused, what somebody touched runs as itself.

Every module of both towers is hooked and replaced, one at a time: what the hooks see, the outputs, the gradients and the batch
statistics are those of OpenAI's class. The quick tests take every module once with a forward hook, once with another hook and
once replaced, the manners in turn; the slow ones every module in every manner.
"""

from __future__ import annotations

import contextlib
import copy
import pickle
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from clipfast.kernels.op import Op
from tests.model.openai import (
    FAMILIES,
    RESNET,
    VIT,
    compare,
    difference,
    difference_of,
    encoded,
    gradients,
    images,
    moved,
    outcome,
    pair,
    tensors,
    texts,
)


def modules(model: nn.Module, family: str) -> list[str]:
    """The names of what is touched: a ViT's model with both towers; of a ResNet's the image tower, the other being the same."""
    return [name for name, _ in model.named_modules() if family == "vit" or name.startswith("visual")]


WHOLE = pytest.mark.parametrize("whole", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["in turn", "whole"])


def altered(found: Any) -> Any:
    """The same nest, its floating tensors changed in a way that no norm takes back."""
    if isinstance(found, Tensor):
        return 1.25 * found + 0.3 * found.sin() if found.is_floating_point() else found
    if isinstance(found, (tuple, list)):
        return type(found)(altered(value) for value in found)
    return found


def kept(found: Any) -> Any:
    """The same nest as it is now, whoever writes into it later."""
    if isinstance(found, Tensor):
        return found.detach().clone()
    if isinstance(found, dict):
        return {key: kept(value) for key, value in found.items()}
    return type(found)(kept(value) for value in found) if isinstance(found, (tuple, list)) else found


class Hook:
    """A hook of any kind: notes what it sees and gives it back altered."""

    def __init__(self, kind: str) -> None:
        self.kind, self.seen = kind, []

    def on(self, module: nn.Module) -> Any:
        with_kwargs = dict(with_kwargs=True) if self.kind.startswith("forward") else {}
        return getattr(module, f"register_{self.kind}_hook")(self, **with_kwargs)

    def __call__(self, module: nn.Module, *found: Any) -> Any:
        self.seen.append((type(module).__name__, kept(found)))
        if self.kind == "forward_pre":
            args, kwargs = found
            return altered(args), kwargs
        return altered(found[0] if self.kind.startswith("full_backward") else found[-1])


KINDS = ("forward", "forward_pre", "full_backward", "full_backward_pre")


def tower(family: str) -> Callable[[Any, Tensor], Any]:
    """What is called: the whole of a ViT's model, the image tower of a ResNet's (the text tower is the same)."""
    return (lambda model, image: model(image, texts())) if family == "vit" else (lambda model, image: model.encode_image(image))


def out_of_place(model: nn.Module) -> None:
    """torch refuses backward hooks on what an activation writes over."""
    for m in model.modules():
        if isinstance(m, nn.ReLU):
            m.inplace = False


@WHOLE
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_hooks_on_every_module_see_what_they_see_on_openai(family: str, kind: str, whole: bool) -> None:
    theirs, ours = pair(FAMILIES[family], out_of_place if "backward" in kind else lambda model: None)
    names = modules(theirs, family)
    assert names == modules(ours, family)
    if kind != "forward" and not whole:
        names = names[KINDS.index(kind) - 1 :: 3]
    run, image, wrong, silent, refused = tower(family), images(FAMILIES[family]), {}, set(), set()
    for name in names:

        def call(model: Any, name: str = name) -> Any:
            hook = Hook(kind)
            handle = hook.on(model.get_submodule(name))
            try:
                pixels = image.clone().requires_grad_()
                outputs = run(model, pixels)
                return hook.seen, kept(outputs), gradients(model, outputs, pixels)
            finally:
                handle.remove()

        expected = outcome(call, theirs)
        if isinstance(expected, Exception):
            refused.add(name)
            continue
        if not expected[0]:
            silent.add(name)
        if found := difference_of(expected, outcome(call, ours)):
            wrong[name or "(model)"] = found
    assert not wrong, "\n".join(f"{kind} hook on {name}: {found}" for name, found in wrong.items())
    assert silent == {n for n in names if unread(n)}
    # A backward hook on what `out += identity` writes over.
    assert refused == {n for n in names if "backward" in kind and n.endswith(".0.bn3")}


def unread(name: str) -> bool:
    """Whether OpenAI's class reads the weights of a module without calling it."""
    return name.endswith("out_proj") or (".attnpool." in name and name.endswith("_proj"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_global_hooks_see_every_call_in_order(family: str, kind: str) -> None:
    register = {
        "forward": torch_module.register_module_forward_hook,
        "forward_pre": torch_module.register_module_forward_pre_hook,
        "full_backward": torch_module.register_module_full_backward_hook,
        "full_backward_pre": torch_module.register_module_full_backward_pre_hook,
    }[kind]
    run, image = tower(family), images(FAMILIES[family])

    def call(model: Any) -> Any:
        names, seen = {module: name for name, module in model.named_modules()}, []
        handle = register(lambda module, *found: seen.append((names[module], type(module).__name__, kept(found))))
        try:
            pixels = image.clone().requires_grad_()
            outputs = run(model, pixels)
            return kept(outputs), gradients(model, outputs, pixels), seen
        finally:
            handle.remove()

    theirs, ours = pair(FAMILIES[family])
    if isinstance(outcome(call, theirs), Exception):  # torch's refusal, see out_of_place and bn3 above
        assert family == "resnet" and "backward" in kind
        assert isinstance(outcome(call, ours), RuntimeError)
    else:
        assert not compare(call, theirs, ours)


# replaced modules


def subclassed(module: Any) -> Any:
    """A module of a subclass of its class, which gives more."""
    new = copy.copy(module)
    forward = type(module).forward
    new.__class__ = type("Louder", (type(module),), {"forward": lambda self, *a, **k: altered(forward(self, *a, **k))})
    return new


class Wrapped(nn.Module):
    """A module around another, which gives more and shows what the other has."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return altered(self.inner(*args, **kwargs))

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)


def with_forward(module: Any) -> Any:
    """The same module with another ``forward`` on the instance."""
    new = copy.copy(module)
    forward = type(module).forward
    new.forward = lambda *a, **k: altered(forward(new, *a, **k))
    return new


def hooked(module: Any) -> Any:
    """The same with a hook of a kind that torch stores apart: one that is called whatever happens."""
    new = copy.copy(module)
    for name in ("_forward_hooks", "_forward_hooks_always_called", "_forward_hooks_with_kwargs"):
        setattr(new, name, copy.copy(getattr(module, name)))
    new.register_forward_hook(lambda m, args, output: altered(output), always_call=True)
    return new


@contextlib.contextmanager
def replaced(model: Any, name: str, change: Callable[[Any], Any]) -> Iterator[Any]:
    home, _, last = name.rpartition(".")
    parent = model.get_submodule(home)
    old = parent._modules[last]
    parent._modules[last] = change(old)  # what setattr does, for names such as "0" too
    try:
        yield model
    finally:
        parent._modules[last] = old


MANNERS = (subclassed, Wrapped, with_forward, hooked)


@WHOLE
@pytest.mark.parametrize("change", MANNERS, ids=lambda change: change.__name__)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_module_may_be_replaced(family: str, change: Callable, whole: bool) -> None:
    """A ResNet in training, so that its batch statistics show too."""
    theirs, ours = pair(FAMILIES[family], lambda model: model.train(family == "resnet"))
    image, wrong, still = images(FAMILIES[family], 2 if family == "vit" else 4), {}, set()
    names = [name for name in modules(theirs, family) if name]
    names = names if whole else names[MANNERS.index(change) :: len(MANNERS)]
    run = encoded(image, texts() if family == "vit" else None)
    before = run(theirs)[0]
    run(ours)
    for name in names:

        def call(model: Any, name: str = name) -> Any:
            with replaced(model, name, change):
                return run(model)

        expected, got = outcome(call, theirs), outcome(call, ours)
        if found := difference_of(expected, got):
            wrong[name] = found
        if not difference(before, expected[0]):
            still.add(name)
    assert not wrong, "\n".join(f"{name}: {found}" for name, found in wrong.items())
    assert still == {n for n in names if unread(n)}, "the others show in OpenAI's features"


# what runs fused


@contextlib.contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter]:
    """How often each fused op chooses a backend, which it does once a call."""
    calls: Counter = Counter()
    choose = Op.choose

    def count(self: Op, *args: Any) -> Any:
        calls[self.name] += 1
        return choose(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Op, "choose", count)
        yield calls


def fused_calls(monkeypatch: pytest.MonkeyPatch, call: Callable[[], Any]) -> Counter:
    with counted(monkeypatch) as calls, torch.no_grad():
        call()
    return calls


DEEP = VIT | dict(vision_layers=4, transformer_layers=4)


def test_an_untouched_model_runs_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    _, model = pair(DEEP)
    image, text = images(DEEP), texts()
    for encode in (lambda: model.encode_image(image), lambda: model.encode_text(text), lambda: model.visual(image)):
        calls = fused_calls(monkeypatch, encode)
        assert (calls["attention"], calls["pooling"], calls["mlp"]) == (3, 1, 4)
        assert calls["layer_norm"] == 7, "with the residual addition: two a block, one in the first"
    _, model = pair(RESNET)
    calls = fused_calls(monkeypatch, lambda: model.train().encode_image(images(RESNET)))
    assert calls["pooling"] == 1 and calls["batch_norm"] == 3 + 3 * 4 + 4


PARTS = ("attn", "attn.out_proj", "ln_1", "ln_2", "mlp", "mlp.c_fc", "mlp.gelu", "mlp.c_proj", "")


@pytest.mark.parametrize("part", PARTS)
def test_a_touched_part_costs_its_own_block_the_fusion(monkeypatch: pytest.MonkeyPatch, part: str) -> None:
    image, text = images(DEEP), texts()
    for home, encode in (("visual.", lambda m: m.encode_image(image)), ("", lambda m: m.encode_text(text))):
        for at in (0, 1, 3):
            _, model = pair(DEEP)
            name = f"{home}transformer.resblocks.{at}.{part}".rstrip(".")
            for change in (subclassed, hooked):
                with replaced(model, name, change):
                    calls = fused_calls(monkeypatch, lambda model=model, encode=encode: encode(model))
                assert calls["attention"] + calls["pooling"] >= 3, (name, calls)
                assert calls["mlp"] >= 3, (name, calls)
                # Text must be padded where somebody looks, and then its end token is not read alone.
                assert calls["pooling"] == 1 or at == 3 or not home, (name, calls)
            calls = fused_calls(monkeypatch, lambda model=model, encode=encode: encode(model))
            assert (calls["attention"], calls["pooling"], calls["mlp"]) == (3, 1, 4), "fused again once nothing is touched"


@pytest.mark.parametrize("name", ["visual.conv1", "visual.ln_pre", "visual.ln_post", "token_embedding", "ln_final"])
def test_a_touched_end_of_a_tower_leaves_its_blocks_fused(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    _, model = pair(DEEP)
    with replaced(model, name, subclassed):
        calls = fused_calls(monkeypatch, lambda: model(images(DEEP), texts()))
    assert calls["attention"] + calls["pooling"] == calls["mlp"] == 8, calls


def test_a_touched_resnet_keeps_the_rest_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    _, model = pair(RESNET)
    model.train()
    for name in ("visual.layer2.0.conv2", "visual.layer2.0.bn2", "visual.layer2.0.relu2", "visual.layer2", "visual.avgpool"):
        with replaced(model, name, subclassed):
            calls = fused_calls(monkeypatch, lambda: model.encode_image(images(RESNET)))
        assert calls["pooling"] == 1 and calls["batch_norm"] >= 3 + 3 * 3 + 3, (name, calls)
    with replaced(model, "visual.attnpool", subclassed):
        calls = fused_calls(monkeypatch, lambda: model.encode_image(images(RESNET)))
    assert calls["batch_norm"] == 3 + 3 * 4 + 4, calls


# touched models travel


def doubled(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return 2 * output


def touch(model: Any) -> None:
    for part in (
        model.transformer.resblocks[0].mlp,
        model.visual.ln_post if hasattr(model.visual, "ln_post") else model.visual,
    ):
        part.register_forward_hook(doubled)
    blocks = model.transformer.resblocks
    blocks[1].mlp.c_proj = Wrapped(blocks[1].mlp.c_proj)
    model.visual.conv1.weight = nn.Parameter(2 * model.visual.conv1.weight.detach())


@pytest.mark.parametrize("family", FAMILIES)
def test_copies_and_pickles_of_a_touched_model(family: str) -> None:
    theirs, ours = pair(FAMILIES[family], touch)
    run = encoded(images(FAMILIES[family]), texts())
    assert moved(run, pair(FAMILIES[family])[0], theirs)
    assert not compare(run, theirs, ours)
    assert not compare(run, theirs, copy.deepcopy(ours))
    assert not compare(run, theirs, pickle.loads(pickle.dumps(ours)))
    assert len(tensors(list(ours.state_dict().values()))) == len(theirs.state_dict())
