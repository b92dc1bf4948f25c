"""Fetch models from the Hugging Face hub; resuming, cache, token and endpoint are those of huggingface_hub."""

import os
import re
from collections.abc import Sequence
from pathlib import Path

from dsv2_local.errors import HubError, InputError
from dsv2_local.progress import Progress, no_progress
from dsv2_local.quant.checkpoint import is_checkpoint
from dsv2_local.quant.checksums import verify_once

DESCRIPTION = ("*.json",)
EVERYTHING = ("*.safetensors", "*.json", "*.jinja", "tokenizer*", "LICENSE*", "NOTICE*", "README.md")


def is_repository(name: str) -> bool:
    """Whether `name` has the form owner/name of a hub repository."""
    return re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None


def _is_directory(name: str) -> bool:
    return os.path.isdir(name)  # noqa: PTH112 (Path.is_dir raises for a name that is too long)


def resolve(
    model: str, patterns: Sequence[str] = EVERYTHING, *, revision: str | None = None, token: str | None = None
) -> Path:
    """The directory of a model: `model` itself if it is a local directory, else the cache directory of a repository.

    Args:
        model: a directory, or a hub repository (owner/name).
        patterns: files to fetch from a repository.
        revision: branch, tag or commit; None: the default branch.
        token: token for private and gated repositories; None: the token of the environment.

    Raises:
        InputError: `model` is neither a directory nor the name of a repository.
        HubError: the repository cannot be fetched.
    """
    if _is_directory(model):
        return Path(model)
    if not is_repository(model):
        raise InputError(f"{model} is neither a directory nor a hub repository (owner/name)")
    return fetch(model, patterns, revision=revision, token=token)


def resolve_converted(model: str, verifying: Progress = no_progress) -> Path:
    """The directory of a converted model; fetches weights only after checking that the repository is converted.

    What was downloaded is compared with the checksums of the conversion before its first use; `verifying` is called
    with (bytes done, bytes in all).

    Raises:
        CheckpointError: a downloaded file differs from its checksum.
        InputError: `model` is neither a directory nor the name of a repository.
        HubError: the repository cannot be fetched, or holds a release that must be converted first.
    """
    directory = resolve(model, DESCRIPTION)
    if _is_directory(model):
        return directory
    if not is_checkpoint(directory):
        raise HubError(f"{model} is not a converted checkpoint; convert it: dsv2 quantize {model} DIRECTORY")
    directory = fetch(model)
    verify_once(directory, verifying)
    return directory


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
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        return Path(snapshot_download(repository, revision=revision, token=token, allow_patterns=list(patterns)))
    except GatedRepoError:
        raise HubError(
            f"{repository} is gated: accept its terms on the hub, then pass --token or set HF_TOKEN"
        ) from None
    except RepositoryNotFoundError:
        raise HubError(f"the hub has no repository {repository} that this token may see") from None
    except RevisionNotFoundError:
        raise HubError(f"{repository} has no revision {revision!r}") from None
    except LocalEntryNotFoundError:
        raise HubError(
            f"{repository} is not in the cache and the hub cannot be reached; go online and try again"
        ) from None
    except Exception as error:  # transport errors have the types of the HTTP library that huggingface_hub uses
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise HubError(f"{repository} could not be fetched ({reason}); run the same command again to resume") from None
