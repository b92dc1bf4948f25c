"""Fetch models from the Hugging Face hub; resuming, cache, token and endpoint are those of huggingface_hub."""

import os
import re
from collections.abc import Sequence
from pathlib import Path

from dsv2_local.errors import HubError, InputError
from dsv2_local.machine import homes
from dsv2_local.progress import Progress, no_progress
from dsv2_local.quant import local
from dsv2_local.quant.checkpoint import is_checkpoint
from dsv2_local.quant.checksums import verify_once

DESCRIPTION = ("*.json",)
FILES = (".gguf", ".safetensors", ".bin", ".json")  # endings of files, which no repository of a model has
EVERYTHING = ("*.safetensors", "*.json", "*.jinja", "tokenizer*", "LICENSE*", "NOTICE*", "README.md")


class _NotFoundError(HubError):
    """The hub has no such repository, or it cannot be asked."""


def is_repository(name: str) -> bool:
    """Whether `name` has the form owner/name of a hub repository."""
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) is not None


def _is_directory(name: str) -> bool:
    # Path.is_dir raises for a name that is too long.
    return os.path.isdir(homes.expanded(Path(name)))  # noqa: PTH112


def resolve(
    model: str, patterns: Sequence[str] = EVERYTHING, *, revision: str | None = None, token: str | None = None
) -> Path:
    """The directory of a model: `model` itself if it is a local directory, else the cache directory of a repository.

    Args:
        model: a directory, or a hub repository (owner/name). A path in a directory that exists is a local one.
        patterns: files to fetch from a repository.
        revision: branch, tag or commit; None: the default branch.
        token: token for private and gated repositories; None: the token of the environment.

    Raises:
        InputError: `model` is neither a directory nor a repository; the message says what it is, or what is like it.
        HubError: the repository cannot be fetched.
    """
    if not model:
        raise InputError("the model's name is empty; is a variable not set?")
    path = homes.expanded(Path(model))
    if _is_directory(model):
        return path
    if os.path.exists(path):  # noqa: PTH110
        raise InputError(f"{model} {local.about_file(path)}")
    if os.path.islink(path):  # noqa: PTH114
        raise InputError(f"{model} is a link to {path.readlink()}, which does not exist")
    if not is_repository(model) or path.suffix in FILES:
        raise InputError(f"{model} is neither a directory nor a hub repository (owner/name){local.near(path)}")
    try:
        return fetch(model, patterns, revision=revision, token=token)
    except _NotFoundError:
        if not path.parent.is_dir():
            raise
        raise InputError(
            f"there is no directory {model}{local.near(path)} (nor a repository of that name, as far as can be told)"
        ) from None


def resolve_converted(model: str, verifying: Progress = no_progress) -> Path:
    """The directory of a converted model; fetches weights only after checking that the repository is converted.

    What was downloaded is compared with the checksums of the conversion before its first use; `verifying` is called
    with (bytes done, bytes in all).

    Raises:
        InputError: `model` is neither a directory nor a repository.
        CheckpointError: the directory is not a converted model (the message says what it is), or a downloaded file
            differs from its checksum.
        HubError: the repository cannot be fetched, or holds a release that must be converted first.
    """
    directory = resolve(model, DESCRIPTION)
    if _is_directory(model):
        local.require_converted(directory)
        return directory
    if not is_checkpoint(directory):
        raise HubError(f"{model} is not a converted checkpoint; convert it: dsv2 quantize {model} DIRECTORY")
    directory = fetch(model)
    verify_once(directory, verifying)
    return directory


def _token(given: str | None) -> str | None:
    """A token as a header of HTTP can have it: without the line end of the file that it was read from.

    Raises:
        InputError: it has another character that no token has.
    """
    token = (given or "").strip()
    if not (token.isascii() and token.isprintable()) or " " in token:
        raise InputError("the access token (--token or HF_TOKEN) has characters that no token has; copy it again")
    return token or None


def fetch(
    repository: str,
    patterns: Sequence[str] = EVERYTHING,
    *,
    revision: str | None = None,
    token: str | None = None,
) -> Path:
    """Download a repository's files that match `patterns`, except those in the cache; see `resolve`."""
    # Imported here because it takes a fifth of a second, which local models do not need.
    from huggingface_hub import snapshot_download
    from huggingface_hub.constants import HF_HUB_OFFLINE
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    token = _token(token)
    try:
        return Path(snapshot_download(repository, revision=revision, token=token, allow_patterns=list(patterns)))
    except GatedRepoError:
        raise HubError(
            f"{repository} is gated: accept its terms on the hub, then pass --token or set HF_TOKEN"
        ) from None
    except RepositoryNotFoundError:
        raise _NotFoundError(f"the hub has no repository {repository} that this token may see") from None
    except RevisionNotFoundError:
        raise HubError(f"{repository} has no revision {revision!r}") from None
    except LocalEntryNotFoundError:
        why = "HF_HUB_OFFLINE is set" if HF_HUB_OFFLINE else "the hub cannot be reached; go online and try again"
        raise _NotFoundError(f"{repository} is not in the cache, and {why}") from None
    except Exception as error:  # transport errors have the types of the HTTP library that huggingface_hub uses
        if isinstance(error, OSError) and error.filename:
            raise HubError(
                f"{error.filename} cannot be written: {error.strerror}; set HF_HOME to a directory that can"
            ) from None
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise HubError(f"{repository} could not be fetched ({reason}); run the same command again to resume") from None
