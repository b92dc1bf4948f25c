"""Saves the KV cache of a sequence to a file, so that a long text is prefilled only once.

The format is safetensors, which executes no code when it is read. Tensors: `tokens` int64 [n], `layer.000`, `layer.001`
and so on [n, …], each layer's rows in the layout of `kernels/latents.py`, and `conversation` uint8 (UTF-8 text) in the
session of a chat. Metadata: the format with its version, the model (a hash of its manifest), how latents are stored,
and a sha256 of all tensors.

Version 1 had no conversation; this is the only difference.
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
"""Seconds after which a temporary directory was left by a save that was killed, and is deleted."""


@dataclass(frozen=True)
class SavedHeader:
    """What a saved cache contains besides the rows: the number of tokens, and the conversation's text (or "")."""

    tokens: int
    conversation: str


def save(path: Path, tokens: list[int], cache: LatentCache, fingerprint: str, conversation: str = "") -> None:
    """Write the sequence in `cache`, whose tokens are `tokens`, to a file that only the user can read.

    The file is replaced atomically: if the write fails or the process is killed, an old file stays as it was.

    Raises:
        SavedCacheError: the file cannot be written.
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
    """Fill the cache from a file, up to its context; returns the tokens that it now holds.

    Raises:
        SavedCacheError: the file is damaged, or was saved from another model or with another type of cache; the cache
            is unchanged.
    """
    with _opened(path) as (file, metadata):
        _check(path, metadata, cache, fingerprint)
        _check_contents(path, file, metadata, cache)
        tokens = file.get_tensor("tokens").tolist()
        count = min(len(tokens), cache.context)
        cache.match_prefix([])
        cache.reserve(count)
        for number in range(len(cache.layers)):  # layer by layer, since all at once may not fit in memory
            cache.write_rows(number, file.get_tensor(_name(number))[:count])
    cache.advance(count)
    return [int(token) for token in tokens[:count]]


def read_header(path: Path) -> SavedHeader:
    """Read a file's number of tokens and its conversation; the rows are neither read nor checked.

    Raises:
        SavedCacheError: the file is not a saved cache, or cannot be read.
    """
    with _opened(path) as (file, _):
        conversation = file.get_tensor("conversation").numpy().tobytes() if _has_conversation(file) else b""
        try:
            return SavedHeader(file.get_slice("tokens").get_shape()[0], conversation.decode())
        except (IndexError, UnicodeDecodeError):
            raise SavedCacheError(
                f"{path} is damaged: its tokens are not a list, or its conversation is not UTF-8; delete it"
            ) from None


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, dict[str, str]]]:
    """Open a file of this format; yields it with its metadata."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            name, _, version = metadata.get("format", "").rpartition(" ")
            if name != FORMAT or not version.isdecimal():
                raise SavedCacheError(f"{path} is not a saved cache of dsv2-local")
            if int(version) > VERSION:
                raise SavedCacheError(f"{path} was saved by a newer version of dsv2-local; use that version to read it")
            yield file, metadata
    except OSError as error:
        raise SavedCacheError(f"{path} cannot be read: {error.strerror or error}") from None
    except SafetensorError as error:
        raise SavedCacheError(f"{path} is not a saved cache, or is damaged: {error}") from None


def _check(path: Path, metadata: dict[str, str], cache: LatentCache, fingerprint: str) -> None:
    if metadata.get("model") != fingerprint:
        raise SavedCacheError(f"{path} was saved from another model, or from other weights of this one")
    if metadata.get("latents") != str(cache.dtype):
        raise SavedCacheError(
            f"{path} stores latents as {metadata.get('latents')}, but this KV cache as {cache.dtype}; load the model "
            "with the --cache-type of the file"
        )


def _check_contents(path: Path, file: Any, metadata: dict[str, str], cache: LatentCache) -> None:
    """Check that all tensors have the shapes that the cache needs, and that their checksum matches."""
    tokens, digest = file.get_tensor("tokens"), hashlib.sha256()
    if tokens.dtype != torch.int64 or tokens.dim() != 1:
        raise SavedCacheError(
            f"{path} is damaged: its tokens are {tokens.dtype} {tuple(tokens.shape)}, not int64 [n]; delete it"
        )
    _update(digest, tokens)
    if _has_conversation(file):
        _update(digest, file.get_tensor("conversation"))
    for number, blocks in enumerate(cache.layers):
        saved, shape = file.get_tensor(_name(number)), (len(tokens), blocks.shape[2])
        if saved.shape != shape or saved.dtype != blocks.dtype:
            raise SavedCacheError(
                f"{path} is damaged: {_name(number)} is {saved.dtype} {tuple(saved.shape)}, not {blocks.dtype} "
                f"{shape}; delete it"
            )
        _update(digest, saved)
    if digest.hexdigest() != metadata.get("sha256"):
        raise SavedCacheError(f"{path} is damaged: its contents do not match its checksum; delete it")


def _has_conversation(file: Any) -> bool:
    return "conversation" in file.keys()  # noqa: SIM118 (a safetensors handle is not a mapping)


def _remove_abandoned(path: Path) -> None:
    """Delete the temporary directories of saves to this file that were killed."""
    for left in path.absolute().parent.glob(f".{escape(path.name)}.*"):
        if left.is_dir() and time.time() - left.stat().st_mtime > ABANDONED:
            shutil.rmtree(left, ignore_errors=True)


def _name(layer: int) -> str:
    return f"layer.{layer:03}"


def _update(digest: "hashlib._Hash", tensor: Tensor) -> None:
    digest.update(tensor.view(torch.uint8).numpy().data)
