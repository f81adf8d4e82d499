"""Where published weights come from: OpenAI's archives over HTTP, verified, and repositories of the Hugging Face hub."""

from __future__ import annotations

import hashlib
import os
import re
import urllib.error
import urllib.request
import warnings
from collections.abc import Callable
from http.client import HTTPException
from pathlib import Path

from tqdm import tqdm

from clipfast.files import first_line

REPOSITORY = re.compile(r"[\w-][\w.-]{0,95}(/[\w-][\w.-]{0,95})?", re.ASCII)
REVISION = re.compile(r"[\w-][\w.-]{0,95}(/[\w-][\w.-]{0,95}){0,8}", re.ASCII)  # a branch, a tag, a commit, refs/pr/1
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


def download(url: str, folder: Path) -> Path:
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
        warnings.warn(f"{target}: expected SHA-256 {expected}, got {got}: downloading it again", stacklevel=4)
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


def check_repository(repository: str) -> None:
    """OSError for a name that is none: huggingface_hub makes a path of the revision, which could climb out of its cache."""
    repo_id, _, revision = repository.partition("@")
    if not REPOSITORY.fullmatch(repo_id) or not (REVISION.fullmatch(revision) or not revision) or ".." in repository:
        expected = "expected organisation/name, or organisation/name@revision, of letters, digits, '-', '_' and '.'"
        raise OSError(f"hf-hub:{repository[:200]!r}: {expected}: check the name")


def hub_finder(repository: str, cache: str | None) -> Find:
    """Finds files through huggingface_hub: its cache, tokens, mirrors and HF_HUB_OFFLINE apply."""
    from huggingface_hub import hf_hub_download  # here, as its import takes longer than all of clipfast's
    from huggingface_hub.utils import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

    repo_id, _, revision = repository.partition("@")
    check_repository(repository)
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
            reason = f"cannot get {file} ({first_line(error)})"
            raise OSError(f"hf-hub:{repository}: {reason}: check the name and the network") from error
        return None

    return find
