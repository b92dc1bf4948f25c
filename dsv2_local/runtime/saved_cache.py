"""Saves the KV cache of a sequence to a file, so that a long text is prefilled only once.

The format is safetensors, which executes no code when it is read. Tensors: `tokens` int64 [n], `layer.000`, `layer.001`
and so on [n, …], each layer's rows in the layout of `kernels/latents.py`, and `conversation` uint8 (UTF-8 text) in the
session of a chat. Metadata: the format with its version, the model (a hash of its manifest), how latents are stored,
a sha256 of all tensors, and one of the conversation alone, so that damaged rows do not take the text with them.

Version 1 had no conversation; this is the only difference.
"""

import errno
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from dsv2_local import locks
from dsv2_local.errors import DamagedCacheError, SavedCacheError
from dsv2_local.quant import checkpoint
from dsv2_local.runtime.cache import LatentCache
from dsv2_local.runtime.sequence import Sequence

FORMAT, VERSION = "dsv2 cache", 2
NEW = "new"  # the file that is being written, in a directory of its own


@dataclass(frozen=True)
class SavedHeader:
    """What a saved cache contains besides the rows.

    Attributes:
        tokens: the number of tokens.
        conversation: its text, or "".
        sealed: whether the conversation has a checksum of its own, which matches.
    """

    tokens: int
    conversation: str
    sealed: bool = False


def save(
    path: Path,
    sequence: Sequence,
    cache: LatentCache,
    fingerprint: str,
    conversation: str = "",
    wanted: Callable[[int], bool] | None = None,
) -> bool:
    """Write a sequence, as far as `cache` has it, to a file that only the user can read.

    The file is replaced atomically: if the write fails or the process is killed, an old file stays as it was. Processes
    that save to one file take turns.

    Args:
        path: the file; if it is a link, what it links to.
        sequence: its tokens, and where their rows are.
        cache: the rows.
        fingerprint: the hash of the model's manifest.
        conversation: any text to store with it.
        wanted: called when it is this process's turn, with the number of tokens in the file as it is then (0 if there
            is none); False leaves it as it is. None: write in any case.

    Returns:
        Whether the file was written.

    Raises:
        SavedCacheError: the file cannot be written.
    """
    try:
        path = path.resolve()
        with _turn(path) as private:
            if wanted and not wanted(read_header(path).tokens if holds_something(path) else 0):
                return False
            tensors, metadata = _contents(sequence, cache, conversation)
            save_file(tensors, private / NEW, {**metadata, "model": fingerprint})
            (private / NEW).chmod(0o600)
            descriptor = os.open(private / NEW, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
            (private / NEW).replace(path)
    except (OSError, SafetensorError) as error:
        raise SavedCacheError(f"{path} cannot be written: {getattr(error, 'strerror', None) or error}") from None
    return True


def holds_something(path: Path) -> bool:
    """Whether there is a file to load; one of `mktemp`, which is empty, is none."""
    return path.is_file() and path.stat().st_size > 0


def _contents(sequence: Sequence, cache: LatentCache, conversation: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a file, and its metadata but for the model."""
    tensors = {"tokens": torch.tensor(sequence.tokens[: sequence.length], dtype=torch.int64)}
    metadata = {"format": f"{FORMAT} {VERSION}", "latents": str(cache.dtype)}
    if conversation:
        text = torch.frombuffer(bytearray(conversation.encode()), dtype=torch.uint8)
        tensors["conversation"] = text
        metadata["conversation_sha256"] = _sha256([text])
    for number in range(len(cache.layers)):
        tensors[_name(number)] = cache.rows(sequence, number)
    return tensors, {**metadata, "sha256": _sha256(tensors.values())}


@contextmanager
def _turn(path: Path) -> Iterator[Path]:
    """A locked directory beside `path`, in which its new contents are written; waits while another process has it."""
    private = _private(path)
    while True:
        private.mkdir(mode=0o700, exist_ok=True)
        try:
            lock = locks.take(private, directory=True, wait=True)
            break
        except FileNotFoundError:  # whoever had it has removed it
            continue
    try:
        found = os.fstat(lock)
        if found.st_uid != os.getuid() or found.st_mode & 0o077:
            raise PermissionError(errno.EPERM, f"{private} is not this user's alone")
        (private / NEW).unlink(missing_ok=True)  # of a save that was killed
        yield private
    finally:
        _remove(private)
        os.close(lock)


def remove_abandoned(path: Path) -> None:
    """Delete what a save to `path` that was killed has left."""
    private = _private(path.resolve())
    with suppress(OSError):  # BlockingIOError: a save is under way
        lock = locks.take(private, directory=True) if private.is_dir() else None
        if lock is not None:
            _remove(private)
            os.close(lock)


def _private(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial")


def _remove(private: Path) -> None:
    with suppress(OSError):
        (private / NEW).unlink(missing_ok=True)
        private.rmdir()


class SavedSequence:
    """The contents of a file, which have been checked.

    Attributes:
        tokens: its tokens, as many as the context has room for.
    """

    def __init__(self, file: Any, cache: LatentCache) -> None:
        self._file, self._cache = file, cache
        self.tokens: list[int] = file.get_tensor("tokens")[: cache.context].tolist()

    def load(self, sequence: Sequence) -> None:
        """Write the rows into the blocks of a sequence of these tokens, of which none is computed yet.

        Raises:
            CacheFullError: other sequences hold the blocks.
        """
        count = len(self.tokens)
        sequence.reserve(count)
        for number in range(len(self._cache.layers)):  # layer by layer, since all at once may not fit in memory
            self._cache.write_rows(sequence, number, self._file.get_tensor(_name(number))[:count])
        sequence.advance(count)


@contextmanager
def opened(path: Path, cache: LatentCache, fingerprint: str) -> Iterator[SavedSequence]:
    """Open a file that fits the cache.

    Raises:
        DamagedCacheError: the contents do not match their checksum.
        SavedCacheError: the file cannot be read, or was saved from another model or with another type of cache.
    """
    with _opened(path) as (file, metadata):
        _check(path, metadata, cache, fingerprint)
        _check_contents(path, file, metadata, cache)
        yield SavedSequence(file, cache)


def read_header(path: Path) -> SavedHeader:
    """Read a file's number of tokens and its conversation; the rows are neither read nor checked.

    Raises:
        SavedCacheError: the file is not a saved cache, cannot be read, or its conversation is damaged.
    """
    with _opened(path) as (file, metadata):
        text, sealed = b"", metadata.get("conversation_sha256")
        if _has_conversation(file):
            tensor = file.get_tensor("conversation")
            text = tensor.numpy().tobytes()
            if sealed is not None and _sha256([tensor]) != sealed:
                raise SavedCacheError(f"{path} is damaged: its conversation does not match its checksum; delete it")
        try:
            return SavedHeader(file.get_slice("tokens").get_shape()[0], text.decode(), sealed is not None)
        except (IndexError, UnicodeDecodeError):
            raise SavedCacheError(
                f"{path} is damaged: its tokens are not a list, or its conversation is not UTF-8; delete it"
            ) from None


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, dict[str, str]]]:
    """Open a file of this format; yields it with its metadata."""
    try:
        with checkpoint.opened(path) as file:
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
    if _sha256(_checked_tensors(path, file, cache)) != metadata.get("sha256"):
        raise DamagedCacheError(f"{path} is damaged: its contents do not match its checksum; delete it")


def _checked_tensors(path: Path, file: Any, cache: LatentCache) -> Iterator[Tensor]:
    """The tensors in the order of the checksum, one at a time, since all together may not fit in memory."""
    tokens = file.get_tensor("tokens")
    if tokens.dtype != torch.int64 or tokens.dim() != 1:
        raise DamagedCacheError(
            f"{path} is damaged: its tokens are {tokens.dtype} {tuple(tokens.shape)}, not int64 [n]; delete it"
        )
    yield tokens
    if _has_conversation(file):
        yield file.get_tensor("conversation")
    for number, blocks in enumerate(cache.layers):
        saved, shape = file.get_tensor(_name(number)), (len(tokens), blocks.shape[2])
        if saved.shape != shape or saved.dtype != blocks.dtype:
            raise DamagedCacheError(
                f"{path} is damaged: {_name(number)} is {saved.dtype} {tuple(saved.shape)}, not {blocks.dtype} "
                f"{shape}; delete it"
            )
        yield saved


def _has_conversation(file: Any) -> bool:
    return "conversation" in file.keys()  # noqa: SIM118 (a safetensors handle is not a mapping)


def _name(layer: int) -> str:
    return f"layer.{layer:03}"


def _sha256(tensors: Iterable[Tensor]) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.view(torch.uint8).numpy().data)
    return digest.hexdigest()
