"""Checkpoints of OpenAI's clip, open_clip and transformers -> `clipfast.CLIP`.

Every source is brought to one form: `state`, tensors under OpenAI's parameter names, and `sizes`, the keyword arguments
of `CLIP` (names.py). `_assemble` then builds the model and accepts no missing, unexpected or mis-shaped key.

Nothing in a checkpoint is executed: pickles are read with `weights_only=True`, and TorchScript archives (the published
format) by TorchScript's own reader, which knows tensors and TorchScript classes only and cannot import Python code; of
the module it returns, only the state dict is used.
"""

import copy
import difflib
import hashlib
import json
import os
import pickle
import urllib.error
import urllib.request
import warnings
import zipfile
from collections.abc import Callable, Mapping
from http.client import HTTPException
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from tqdm import tqdm

from clipfast.inputs import MEAN, STD, Preprocess
from clipfast.model import CLIP
from clipfast.weights.names import Sizes, State, from_open_clip, from_state, from_transformers, live_config, require

Find = Callable[[str], Path | None]  # file name -> where it lies; None when the folder or repository has none

URLS = {  # the last but one part of an address is the SHA-256 of the archive
    name: "https://openaipublic.azureedge.net/clip/models/" + tail
    for name, tail in {
        "RN50": "afeb0e10f9e5a86da6080e35cf09123aca3b358a0c3e3b6c78a7b63bc04b6762/RN50.pt",
        "RN101": "8fa8567bab74a42d41c5915025a8e4538c3bdbe8804a470a72f30b0d94fab599/RN101.pt",
        "RN50x4": "7e526bd135e493cef0776de27d5f42653e6b4c8bf9e0f653bb11773263205fdd/RN50x4.pt",
        "RN50x16": "52378b407f34354e150460fe41077663dd5b39c54cd0bfd2b27167a4a06ec9aa/RN50x16.pt",
        "RN50x64": "be1cfb55d75a9666199fb2206c106743da0f6468c9d327f3e0d0a543a9919d9c/RN50x64.pt",
        "ViT-B/32": "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af/ViT-B-32.pt",
        "ViT-B/16": "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f/ViT-B-16.pt",
        "ViT-L/14": "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836/ViT-L-14.pt",
        "ViT-L/14@336px": "3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02/ViT-L-14-336px.pt",
    }.items()
}


def available_models() -> list[str]:
    """Names that `load` downloads: the nine models that OpenAI published."""
    return list(URLS)


def load(
    name: str | os.PathLike[str],
    device: str | torch.device | None = None,
    jit: bool = False,
    download_root: str | None = None,
    *,
    quick_gelu: bool | None = None,
    vision_heads: int | None = None,
) -> tuple[CLIP, Preprocess]:
    """A model in eval mode, and the transform that makes its input from an image.

    name: one of `available_models()`; a TorchScript archive, state dict, open_clip checkpoint or safetensors file; a
      folder of open_clip or transformers, or its `hf-hub:organisation/name[@revision]`; a checkpoint of clipfast.train.
    device: default "cuda" if there is one, else "cpu". Weights are float32 on the CPU, else as by `convert_weights`.
    jit: accepted for OpenAI's callers; clipfast has no TorchScript model and returns the same eager one, with a warning.
    download_root: where downloads are kept: default ~/.cache/clip, and the Hugging Face cache for `hf-hub:`.
    quick_gelu, vision_heads: what a bare state dict cannot tell: its activation, and the heads of an image tower wider
      than ViT-L (up to there width / 64, OpenAI's rule, is taken). When given they override what the source says.

    Raises RuntimeError for an unknown name or a wrong checksum, OSError when there is no network or a file cannot be
    read, ValueError when the file does not hold a CLIP that clipfast computes.
    """
    if jit:
        warnings.warn("jit=True: clipfast has no TorchScript model; the eager one computes the same", stacklevel=2)
    where = os.fspath(name)
    if where in URLS:
        sizes, state = _from_file(_download(URLS[where], Path(download_root or "~/.cache/clip").expanduser()))
    elif where.startswith("hf-hub:"):
        sizes, state = _from_folder(where, _hub_finder(where.removeprefix("hf-hub:"), download_root))
    elif os.path.isfile(os.path.join(where, ".metadata")):  # a checkpoint of clipfast.train
        from clipfast.weights.distributed import weights  # here, as it brings in torch.distributed

        sizes, state = _from_checkpoint(where, weights(where))
    elif os.path.isdir(where):
        sizes, state = _from_folder(where, lambda file: path if (path := Path(where, file)).is_file() else None)
    elif os.path.isfile(where):
        sizes, state = _from_file(Path(where))
    else:
        near = difflib.get_close_matches(where, URLS, cutoff=0.5)
        hint = f"; nearest: {', '.join(near)}" if near else ""
        expected = f"a file, a folder, hf-hub:organisation/name, or one of {', '.join(URLS)}"
        raise RuntimeError(f"model {where!r} not found: expected {expected}{hint}")
    told = {"quick_gelu": quick_gelu, "vision_heads": vision_heads}
    sizes |= {key: value for key, value in told.items() if value is not None}
    model = _assemble(where, sizes, state, torch.float32).eval()
    target = torch.device(device if device is not None else "cuda" if torch.cuda.is_available() else "cpu")
    if target.type != "cpu":
        convert_weights(model)
    return model.to(target), Preprocess(model.visual.input_resolution)


def build_model(state_dict: Mapping[str, Tensor], quick_gelu: bool = True) -> CLIP:
    """OpenAI's `build_model`: sizes read from the keys, eval mode, weights as `convert_weights` leaves them."""
    sizes, state = from_state("state_dict", state_dict)
    model = _assemble("state_dict", sizes | {"quick_gelu": quick_gelu}, state, torch.float32)
    convert_weights(model)
    return model.eval()


def convert_weights(model: nn.Module) -> None:
    """OpenAI's half precision, in place: convolutions, linear layers, attention and the two projections in float16;
    layer and batch norms, embeddings and logit_scale stay as they are."""
    for module in model.modules():
        halved = list(module.parameters(recurse=False)) if isinstance(module, nn.Conv2d | nn.Linear) else []
        own = dict(module.named_parameters(recurse=False))
        halved += [own[name] for name in ("in_proj_weight", "in_proj_bias", "text_projection", "proj") if name in own]
        for parameter in halved:
            parameter.data = parameter.data.half()


def beyond_shapes(model: CLIP) -> Sizes:
    """Arguments of CLIP that the shapes of its weights do not tell, as `model_config` in clipfast's own files."""
    visual: Any = model.visual
    first = visual.transformer.resblocks[0].attn if hasattr(visual, "transformer") else visual.attnpool
    text: Any = model.transformer.resblocks[0].attn
    heads = {"vision_heads": first.heads, "transformer_heads": text.heads}
    return {"quick_gelu": model.quick_gelu, "image_resolution": visual.input_resolution} | heads


def from_tensors(state: Mapping[str, Tensor], model_config: Sizes) -> CLIP:
    """A model in eval mode that holds copies of these tensors, whose device and dtypes it has."""
    sizes, named = from_state("the model", state)
    return _assemble("the model", sizes | model_config, named).eval()


@torch.enable_grad()  # so that requires_grad survives joining and transposing
def convert(module: nn.Module) -> CLIP:
    """A live CLIP of OpenAI's clip, open_clip (CLIP or CustomTextCLIP) or transformers (CLIPModel) as ours.

    Features are equal; the weights are copied, with the source's dtypes, device, frozen parameters and training flag.
    ValueError names the feature of the source that clipfast does not compute.
    """
    if isinstance(module, CLIP):
        return copy.deepcopy(module)
    where = f"{type(module).__module__}.{type(module).__qualname__}"
    source: Any = module
    tensors = source.state_dict(keep_vars=True)  # keep_vars: requires_grad travels with each tensor
    try:
        if hasattr(source, "vision_model"):
            sizes, state = from_transformers(where, source.config.to_dict(), lambda: tensors)
        else:
            sizes, state = from_open_clip(where, live_config(where, source), lambda: tensors)
    except AttributeError as error:
        raise TypeError(f"{where}: expected a CLIP of OpenAI's clip, open_clip or transformers: {error}") from error
    model = _assemble(where, sizes, state)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(state[name].requires_grad)
    return model.train(module.training)


def _assemble(where: str, sizes: Sizes, state: State, dtype: torch.dtype | None = None) -> CLIP:
    """The model of these sizes, holding copies of these tensors in `dtype`, or each in its own (None)."""
    if "quick_gelu" not in sizes:
        raise ValueError(
            f"{where}: weights alone do not tell the activation: pass quick_gelu=True (OpenAI's models, and what was "
            "trained from them or as *-quickgelu in open_clip) or quick_gelu=False (open_clip's default)"
        )
    if "vision_heads" not in sizes:
        raise ValueError(
            f"{where}: weights alone do not tell the number of heads of an image tower of width "
            f"{sizes['vision_width']}: pass vision_heads= (open_clip's ViT-H, -g, -bigG and -e have 16)"
        )
    with torch.device("meta"):  # no memory, no initialisation: every tensor comes from `state`
        model = CLIP(**sizes)
    expected = model.state_dict()
    counters = {
        name for name in expected if name.endswith("num_batches_tracked")
    }  # unused by CLIP, and absent from some archives
    state = {name: torch.zeros((), dtype=torch.long) for name in counters} | state
    faults = {
        "missing": sorted(expected.keys() - state.keys()),
        "unexpected": sorted(state.keys() - expected.keys()),
        "mis-shaped": [
            f"{name} (expected {list(expected[name].shape)}, got {list(tensor.shape)})"
            for name, tensor in state.items()
            if name in expected and expected[name].shape != tensor.shape
        ],
        "not of floating point": [n for n, t in state.items() if n not in counters and not t.is_floating_point()],
    }
    if any(faults.values()):
        listed = "; ".join(f"{len(names)} {fault}: {', '.join(names)}" for fault, names in faults.items() if names)
        raise ValueError(f"{where}: the weights do not fit the model of sizes {sizes}: {listed}")
    for name, tensor in state.items():
        own = tensor.dtype if dtype is None or name in counters else dtype
        state[name] = torch.empty_like(expected[name], dtype=own, device=tensor.device).copy_(tensor.detach())
    model.load_state_dict(state, assign=True)
    return model


# ---- files


def _from_file(path: Path) -> tuple[Sizes, State]:
    return _from_checkpoint(str(path), _read(path))


def _from_checkpoint(where: str, checkpoint: dict[str, Any]) -> tuple[Sizes, State]:
    sizes, state = from_state(where, checkpoint.get("state_dict", checkpoint))
    return sizes | checkpoint.get("model_config", {}), state  # clipfast's own files carry `model_config`


def _read(path: Path) -> dict[str, Any]:
    """What a checkpoint file holds, on the CPU."""
    path.open("rb").close()  # if it may not be read, Python's own error says so
    try:
        if path.suffix == ".safetensors":
            with safetensors.safe_open(path, "pt") as file:
                about = json.loads((file.metadata() or {}).get("model_config", "{}"))
            state = safetensors.torch.load_file(path)
            return {"state_dict": state, "model_config": about} if about else state
        if zipfile.is_zipfile(path) and any(n.endswith("/constants.pkl") for n in zipfile.ZipFile(path).namelist()):
            return torch.jit.load(str(path), map_location="cpu").state_dict()
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file makes its reader raise nearly anything
        if isinstance(error, pickle.UnpicklingError) and "GLOBAL" in str(error):
            fault = "the file holds Python objects besides tensors, and clipfast runs no code from a checkpoint"
            raise ValueError(f"{path}: {fault}: save model.state_dict() alone, or safetensors") from error
        expected = "expected a TorchScript archive, PyTorch checkpoint or safetensors file"
        got = f"got {path.stat().st_size} bytes that are none, or cut short ({_first_line(error)})"
        raise ValueError(f"{path}: {expected}, {got}: download or copy the file again") from error
    if not isinstance(checkpoint, dict):
        got = type(checkpoint).__name__
        raise ValueError(f"{path}: expected a mapping of names to tensors, got {got}: save model.state_dict()")
    return checkpoint


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _download(url: str, folder: Path) -> Path:
    """The archive at `url`, kept in `folder` and verified."""
    expected, filename = url.split("/")[-2:]
    target = folder / filename
    if target.exists() and not target.is_file():
        raise RuntimeError(f"{target} exists and is not a regular file: move it away or give another download_root")
    if target.is_file():
        digest = hashlib.sha256()
        with open(target, "rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
        if digest.hexdigest() == expected:
            return target
        got = digest.hexdigest()
        warnings.warn(f"{target}: expected SHA-256 {expected}, got {got}: downloading it again", stacklevel=3)
    partial = folder / f"{filename}.{os.getpid()}.part"  # in the same folder, so that os.replace is atomic
    try:
        folder.mkdir(parents=True, exist_ok=True)
        partial.touch()
    except OSError as error:
        raise type(error)(f"cannot write to {folder} ({error}): give a writable download_root") from error
    try:
        got = _fetch(url, partial)
        if got != expected:
            raise RuntimeError(f"{url}: expected SHA-256 {expected}, got {got}: try again or place it at {target}")
        os.replace(partial, target)
    except (ConnectionError, TimeoutError, urllib.error.URLError, HTTPException) as error:
        reason = getattr(error, "reason", error)
        raise ConnectionError(f"cannot download {url} ({reason}): without a network place it at {target}") from error
    finally:
        partial.unlink(missing_ok=True)
    return target


def _fetch(url: str, partial: Path) -> str:
    """Writes what is at `url` to `partial`, with a progress bar; returns its SHA-256."""
    digest = hashlib.sha256()
    with urllib.request.urlopen(url, timeout=60) as source, open(partial, "wb") as output:
        size = int(source.headers.get("Content-Length") or 0)
        with tqdm(total=size or None, desc=url.split("/")[-1], ncols=80, unit="B", unit_scale=True) as bar:
            while chunk := source.read(1 << 16):
                output.write(chunk)
                digest.update(chunk)
                bar.update(len(chunk))
        if bar.n < size:
            raise ConnectionError(f"broke off after {bar.n} of {size} bytes")
    return digest.hexdigest()


# ---- folders and repositories


def _hub_finder(repository: str, cache: str | None) -> Find:
    """Finds files through huggingface_hub: its cache, tokens, mirrors and HF_HUB_OFFLINE apply."""
    from huggingface_hub import hf_hub_download  # here, as its import takes longer than all of clipfast's
    from huggingface_hub.utils import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

    repo_id, _, revision = repository.partition("@")
    offline = False

    def find(file: str) -> Path | None:
        nonlocal offline
        try:
            return Path(hf_hub_download(repo_id, file, revision=revision or None, cache_dir=cache, local_files_only=offline))
        except LocalEntryNotFoundError:
            offline = True  # no network, and not in the cache: do not retry for every further file
        except EntryNotFoundError:
            pass
        except (HfHubHTTPError, OSError, ValueError) as error:
            reason = f"cannot get {file} ({_first_line(error)})"
            raise OSError(f"hf-hub:{repository}: {reason}: check the name and the network") from error
        return None

    return find


def _from_folder(where: str, find: Find) -> tuple[Sizes, State]:
    if path := find("open_clip_config.json"):
        config = _json(path)
        _check_preprocess(f"{where}/preprocess_cfg", config.get("preprocess_cfg") or {})
        names = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
        return from_open_clip(where, config.get("model_cfg", config), lambda: _weights(where, find, *names))
    if path := find("config.json"):
        for file in ("preprocessor_config.json", "processor_config.json"):
            if processor := find(file):
                _check_preprocess(f"{where}/{file}", _json(processor).get("image_processor") or _json(processor))
        names = ("model.safetensors", "pytorch_model.bin")
        return from_transformers(where, _json(path), lambda: _weights(where, find, *names))
    raise FileNotFoundError(
        f"{where}: found neither open_clip_config.json nor config.json: without a network place in a folder, and load "
        "it, open_clip_config.json and open_clip_model.safetensors (or open_clip_pytorch_model.bin), or config.json and "
        "model.safetensors (or pytorch_model.bin) of a transformers model"
    )


def _weights(where: str, find: Find, *names: str) -> State:
    """All tensors of the first file that is there, or of the shards that its index lists."""
    for name in names:
        if path := find(name):
            return _read(path)
        if index := find(f"{name}.index.json"):
            state: State = {}
            for shard in sorted(set(_json(index).get("weight_map", {}).values())):
                if not (path := find(shard)):
                    raise FileNotFoundError(f"{where}: {index.name} lists {shard}, which is not there: place it beside")
                state |= _read(path)
            return state
    raise FileNotFoundError(f"{where}: lacks {' and '.join(names)}: place one of them beside the configuration")


def _json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: expected a JSON object ({error}): download or copy the file again") from error


def _check_preprocess(where: str, config: Mapping[str, Any]) -> None:
    """`Preprocess` is CLIP's: shortest side, bicubic, its mean and standard deviation."""
    for field, ours in (("mean", MEAN), ("std", STD), ("image_mean", MEAN), ("image_std", STD)):
        got = config.get(field) or ours
        require(where, field, [round(float(x), 4) for x in got], [round(float(x), 4) for x in ours])
    for field, only in (("interpolation", "bicubic"), ("resize_mode", "shortest"), ("resample", 3)):  # 3: bicubic
        require(where, field, config.get(field, only), only)
