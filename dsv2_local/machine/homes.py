"""Where files of this user are kept: measurements under ~/.cache, sessions under ~/.local/state."""

import os
import pwd
from contextlib import suppress
from pathlib import Path

from dsv2_local.errors import InputError

FOLDER = "dsv2-local"


def cache() -> Path:
    """The directory of what can be measured again: under $XDG_CACHE_HOME or ~/.cache.

    Without a home directory it is one that cannot exist: nothing is found there, and nothing can be kept.
    """
    try:
        return _directory("XDG_CACHE_HOME", ".cache")
    except InputError:
        return Path(os.devnull) / FOLDER


def state() -> Path:
    """The directory of what must be kept: under $XDG_STATE_HOME or ~/.local/state.

    Raises:
        InputError: there is no home directory.
    """
    return _directory("XDG_STATE_HOME", ".local/state")


def _directory(variable: str, below_home: str) -> Path:
    """The program's folder in the directory that `variable` names; a relative one is ignored, as its standard says."""
    named = Path(os.environ.get(variable) or "")
    if not named.is_absolute():
        with suppress(KeyError):  # no $HOME, and a user whom the system does not know
            named = Path(os.environ.get("HOME") or pwd.getpwuid(os.getuid()).pw_dir) / below_home
    if not named.is_absolute():
        raise InputError(f"there is no home directory; set $HOME or ${variable}")
    return named / FOLDER


def expanded(path: Path) -> Path:
    """`path` with a home directory for "~" at its beginning, which shells leave in quotes and after "=".

    Raises:
        InputError: there is no such home directory.
    """
    try:
        return path.expanduser()
    except RuntimeError:
        raise InputError(f"{path} names a home directory that does not exist") from None
