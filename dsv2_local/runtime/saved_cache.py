"""A cache in a file, so that a long text is read once: tokens and their latents, layer by layer.

A safetensors file: `tokens` int64 [n], `layer.LLL` [n, row] as `kernels.latents` has a row, and for a chat's session
`conversation`, uint8: its text. Its metadata names the format with its version, the model (a hash of its manifest), how
latents are kept, and a sha256 of all tensors. Reading one executes nothing.

Version 1 had no conversation; nothing else has changed.
"""

import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from glob import escape
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dsv2_local.errors import SavedCacheError
from dsv2_local.runtime.cache import LatentCache

FORMAT, VERSION = "dsv2 cache", 2
ABANDONED = 3600.0
"""Seconds after which what a killed save has left is no save under way."""


@dataclass(frozen=True)
class SavedHeader:
    """What a file holds beside the rows: the number of its tokens, and a conversation's text, empty where none is."""

    tokens: int
    conversation: str


def save(path: Path, tokens: list[int], cache: LatentCache, fingerprint: str, conversation: str = "") -> None:
    """Write what the cache holds, `tokens`, for the user alone; the file appears whole or stays as it was.

    Raises:
        SavedCacheError: it cannot be written.
    """
    tensors, digest = {"tokens": torch.tensor(tokens, dtype=torch.int64)}, hashlib.sha256()
    if conversation:
        tensors["conversation"] = torch.frombuffer(bytearray(conversation.encode()), dtype=torch.uint8)
    for number in range(len(cache.layers)):
        tensors[_name(number)] = cache.rows(number)
    for tensor in tensors.values():
        _update(digest, tensor)
    metadata = {
        "format": f"{FORMAT} {VERSION}",
        "model": fingerprint,
        "latents": str(cache.dtype),
        "sha256": digest.hexdigest(),
    }
    try:
        _remove_abandoned(path)
        with tempfile.TemporaryDirectory(dir=path.absolute().parent, prefix=f".{path.name}.") as private:
            new = Path(private) / "new"
            save_file(tensors, new, metadata)
            new.chmod(0o600)
            descriptor = os.open(new, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
            new.replace(path)
    except (OSError, SafetensorError) as error:
        raise SavedCacheError(f"{path} cannot be written: {getattr(error, 'strerror', None) or error}") from None


def load(path: Path, cache: LatentCache, fingerprint: str) -> list[int]:
    """Fill the cache from a file, as far as its context goes; the tokens that it holds then.

    Raises:
        SavedCacheError: the file is none of this model and type of cache, or damaged; the cache is as it was then.
    """
    with _opened(path) as (file, metadata):
        _check(path, metadata, cache, fingerprint)
        _check_contents(path, file, metadata, cache)
        tokens = file.get_tensor("tokens").tolist()
        count = min(len(tokens), cache.context)
        cache.match_prefix([])
        cache.reserve(count)
        for number in range(len(cache.layers)):  # one at a time: together they may fill the memory
            cache.write_rows(number, file.get_tensor(_name(number))[:count])
    cache.advance(count)
    return [int(token) for token in tokens[:count]]


def read_header(path: Path) -> SavedHeader:
    """What a file holds beside the rows; these are neither read nor checked.

    Raises:
        SavedCacheError: the file is no saved cache, or cannot be read.
    """
    with _opened(path) as (file, _):
        conversation = file.get_tensor("conversation").numpy().tobytes() if _has_conversation(file) else b""
        try:
            return SavedHeader(file.get_slice("tokens").get_shape()[0], conversation.decode())
        except (IndexError, UnicodeDecodeError):
            raise SavedCacheError(f"{path} is damaged: its tokens or its conversation are none") from None


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, dict[str, str]]]:
    """A file of this format, and its metadata."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            name, _, version = metadata.get("format", "").rpartition(" ")
            if name != FORMAT or not version.isdecimal():
                raise SavedCacheError(f"{path} is no saved cache")
            if int(version) > VERSION:
                raise SavedCacheError(f"{path} was saved by a newer version of dsv2-local; use that one")
            yield file, metadata
    except OSError as error:
        raise SavedCacheError(f"{path} cannot be read: {error.strerror or error}") from None
    except SafetensorError as error:
        raise SavedCacheError(f"{path} is no saved cache, or a damaged one: {error}") from None


def _check(path: Path, metadata: dict[str, str], cache: LatentCache, fingerprint: str) -> None:
    if metadata.get("model") != fingerprint:
        raise SavedCacheError(f"{path} was saved from another model, or from other weights of this one")
    if metadata.get("latents") != str(cache.dtype):
        raise SavedCacheError(
            f"{path} keeps latents as {metadata.get('latents')} and this cache as {cache.dtype}; see --cache-type"
        )


def _check_contents(path: Path, file: Any, metadata: dict[str, str], cache: LatentCache) -> None:
    """Read all tensors once: their shapes must be the cache's, and their checksum the file's."""
    tokens, digest = file.get_tensor("tokens"), hashlib.sha256()
    if tokens.dtype != torch.int64 or tokens.dim() != 1:
        raise SavedCacheError(f"{path} is damaged: its tokens are {tokens.dtype} {tuple(tokens.shape)}")
    _update(digest, tokens)
    if _has_conversation(file):
        _update(digest, file.get_tensor("conversation"))
    for number, pages in enumerate(cache.layers):
        saved = file.get_tensor(_name(number))
        if saved.shape != (len(tokens), pages.shape[2]) or saved.dtype != pages.dtype:
            raise SavedCacheError(f"{path} is damaged: {_name(number)} is {saved.dtype} {tuple(saved.shape)}")
        _update(digest, saved)
    if digest.hexdigest() != metadata.get("sha256"):
        raise SavedCacheError(f"{path} is damaged: its contents do not match its checksum; delete it")


def _has_conversation(file: Any) -> bool:
    return "conversation" in file.keys()  # noqa: SIM118 (a handle of safetensors is no mapping)


def _remove_abandoned(path: Path) -> None:
    """Give back the space of saves to this file that were killed."""
    for left in path.absolute().parent.glob(f".{escape(path.name)}.*"):
        if left.is_dir() and time.time() - left.stat().st_mtime > ABANDONED:
            shutil.rmtree(left, ignore_errors=True)


def _name(layer: int) -> str:
    return f"layer.{layer:03}"


def _update(digest: "hashlib._Hash", tensor: Tensor) -> None:
    digest.update(tensor.view(torch.uint8).numpy().data)
