"""A cache in a file, so that a long text is read once: tokens and their latents, layer by layer.

A safetensors file: `tokens` int64 [n], `layer.LLL` [n, row] as `kernels.latents` has a row. Its metadata names the
format, the model (a hash of its manifest), how latents are kept, and a sha256 of all tensors. Reading one executes
nothing.
"""

import hashlib
import os
import tempfile
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dsv2_local.cache import LatentCache
from dsv2_local.errors import SavedCacheError

FORMAT = "dsv2 cache 1"


def save(path: Path, tokens: list[int], cache: LatentCache, fingerprint: str) -> None:
    """Write what the cache holds, `tokens`, for the user alone; the file appears whole or stays as it was.

    Raises:
        SavedCacheError: it cannot be written.
    """
    tensors, digest = {"tokens": torch.tensor(tokens, dtype=torch.int64)}, hashlib.sha256()
    for number in range(len(cache.layers)):
        tensors[_name(number)] = cache.rows(number)
    for tensor in tensors.values():
        _update(digest, tensor)
    metadata = {"format": FORMAT, "model": fingerprint, "latents": str(cache.kind), "sha256": digest.hexdigest()}
    try:
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
        SavedCacheError: the file is none of this model and type of cache, or damaged; the cache is empty then.
    """
    cache.begin([])
    digest = hashlib.sha256()
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            _check(path, metadata, cache, fingerprint)
            tokens = file.get_tensor("tokens")
            _update(digest, tokens)
            count = min(len(tokens), cache.context)
            cache.make_room(count)
            for number, pages in enumerate(cache.layers):  # one at a time: together they may fill the memory
                saved = file.get_tensor(_name(number))
                if saved.shape != (len(tokens), pages.shape[2]) or saved.dtype != pages.dtype:
                    raise SavedCacheError(f"{path} is damaged: {_name(number)} is {saved.dtype} {tuple(saved.shape)}")
                _update(digest, saved)
                cache.put(number, saved[:count])
    except OSError as error:
        raise SavedCacheError(f"{path} cannot be read: {error.strerror or error}") from None
    except SafetensorError as error:
        raise SavedCacheError(f"{path} is no saved cache, or a damaged one: {error}") from None
    if digest.hexdigest() != metadata.get("sha256"):
        raise SavedCacheError(f"{path} is damaged: its contents do not match its checksum; delete it")
    cache.advance(count)
    return [int(token) for token in tokens[:count]]


def _check(path: Path, metadata: dict[str, str], cache: LatentCache, fingerprint: str) -> None:
    if metadata.get("format") != FORMAT:
        raise SavedCacheError(f"{path} is no saved cache")
    if metadata.get("model") != fingerprint:
        raise SavedCacheError(f"{path} was saved from another model, or from other weights of this one")
    if metadata.get("latents") != str(cache.kind):
        raise SavedCacheError(
            f"{path} keeps latents as {metadata.get('latents')} and this cache as {cache.kind}; see --cache-type"
        )


def _name(layer: int) -> str:
    return f"layer.{layer:03}"


def _update(digest: "hashlib._Hash", tensor: Tensor) -> None:
    digest.update(tensor.view(torch.uint8).numpy().data)
