"""Sessions, which are saved chats: one file each, with the conversation and its KV cache (`runtime/saved_cache.py`)."""

import os
import re
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import IO, TYPE_CHECKING

from rich.markup import escape
from rich.table import Table

from dsv2_local import locks
from dsv2_local.commands.console import format_bytes, notice, report_console
from dsv2_local.commands.conversation import Conversation
from dsv2_local.errors import DamagedCacheError, Dsv2Error, InputError, SavedCacheError
from dsv2_local.machine import homes

if TYPE_CHECKING:
    from dsv2_local.commands.remote import AnyLLM
    from dsv2_local.runtime import saved_cache

SUFFIX = ".safetensors"
LONGEST_NAME = 200
"""Bytes. File systems allow 255, and the temporary name while a file is written is longer than the session's."""


def file(name: str) -> Path:
    """The path of a session's file, whether it exists or not.

    Raises:
        InputError: `name` is not a valid name.
    """
    if not _is_name(name):
        raise InputError(
            f"{name!r} cannot name a session: use up to {LONGEST_NAME} bytes of letters, digits, spaces and . _ + @ -, "
            "and begin with a letter or digit"
        )
    return _folder() / f"{name}{SUFFIX}"


def claim(name: str) -> IO[bytes]:
    """Lock a session, so that no other chat opens it and nobody deletes it, until the returned file is closed.

    Raises:
        InputError: another chat has the session open, or the name is not valid.
        SavedCacheError: the session's directory cannot be written.
    """
    from dsv2_local.runtime import saved_cache  # with torch, which a chat with a server does without

    path = file(name)
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = locks.take(_lock(path))
    except BlockingIOError:
        raise InputError(f"session {name} is open in another chat; leave that chat first") from None
    except OSError as error:
        raise SavedCacheError(f"{path} cannot be written: {error.strerror}") from None
    saved_cache.remove_abandoned(path)
    return os.fdopen(lock, "rb")


def _lock(path: Path) -> Path:
    return path.with_name(f".{path.name.removesuffix(SUFFIX)}.lock")


def save(name: str, llm: "AnyLLM", conversation: Conversation) -> None:
    """Write a session, which must be claimed. Its file is replaced atomically, and only the user can read it.

    Raises:
        InputError: the name is not valid.
        SavedCacheError: the file cannot be written.
    """
    llm.save_cache(file(name), conversation.to_text(llm.name))


def load(name: str, llm: "AnyLLM") -> Conversation:
    """Load a session: fill the model's KV cache from it, and return its conversation.

    Raises:
        InputError: there is no session of this name.
        SavedCacheError: the file is damaged, or belongs to another model; the KV cache is unchanged. If the
            conversation is whole, damaged rows are reported on stderr instead, and will be computed again.
    """
    path = file(name)
    if not path.exists():
        raise InputError(f"there is no session {name}; {_known()}")
    header, model, conversation = _read(path)
    try:
        llm.load_cache(path)
    except DamagedCacheError as error:
        if not header.sealed:
            raise
        notice(f"{str(error).removesuffix('; delete it')}; the conversation is whole, and will be read again")
    except SavedCacheError as error:
        if model != llm.name:
            raise SavedCacheError(
                f"{error} (the session's model is {model}, not {llm.name}; choose it with -m)"
            ) from None
        raise
    return conversation


def show() -> None:
    """List all sessions on stdout, the latest first: a table on a terminal, else tab-separated lines."""
    console, found = report_console(), _all()
    if not found:
        notice(f"there are no sessions in {_folder()}; start one with `dsv2 chat --session NAME`")
    elif console.is_terminal:
        console.print(_table(found))
    else:
        for session in found:
            print(session.name, *session.contents, session.nbytes, f"{session.written:%Y-%m-%dT%H:%M:%S}", sep="\t")
    sys.stdout.flush()


def check(names: Sequence[str]) -> None:
    """Check that all of these sessions exist.

    Raises:
        InputError: one does not, or its name is not valid.
    """
    if missing := [name for name in names if not os.path.lexists(file(name))]:
        raise InputError(f"there is no session {missing[0]}; {_known()}")


def delete(names: Sequence[str]) -> None:
    """Delete sessions; none if a chat has one of them open.

    Raises:
        InputError: a chat has one of them open.
        SavedCacheError: a file cannot be deleted.
    """
    with ExitStack() as claims:
        for name in dict.fromkeys(names):
            claims.enter_context(claim(name))
        for name in names:
            try:
                file(name).unlink(missing_ok=True)
                _lock(file(name)).unlink(missing_ok=True)
            except OSError as error:
                raise SavedCacheError(f"session {name} cannot be deleted: {error.strerror}") from None


@dataclass(frozen=True)
class _Session:
    """A row of the list; `contents` are model, turns and tokens, or the reason why the file cannot be read."""

    name: str
    contents: tuple[str, ...]
    nbytes: int
    written: datetime


def _folder() -> Path:
    return homes.state() / "sessions"


def _table(found: list[_Session]) -> Table:
    table = Table("session", "model", "turns", "tokens", "size", "written")
    for number in (2, 3, 4):
        table.columns[number].justify = "right"
    for session in found:
        model, turns, tokens = map(escape, session.contents)
        size, written = format_bytes(session.nbytes), f"{session.written:%Y-%m-%d %H:%M}"
        table.add_row(session.name, model, turns, tokens, size, written)
    return table


def _is_name(name: str) -> bool:
    return re.fullmatch(r"[^\W_][\w .+@-]*", name) is not None and len(os.fsencode(name)) <= LONGEST_NAME


def _known() -> str:
    names = [session.name for session in _all()]
    return f"the sessions are {', '.join(names)}" if names else "there are no sessions yet"


def _read(path: Path) -> "tuple[saved_cache.SavedHeader, str, Conversation]":
    """Read a session's header, model and conversation, without checking the rows."""
    from dsv2_local.runtime import saved_cache

    header = saved_cache.read_header(path)
    if not header.conversation:
        raise SavedCacheError(f"{path} is not a session: it has no conversation (`dsv2 run --cache` can read it)")
    try:
        return header, *Conversation.from_text(header.conversation)
    except InputError as error:
        raise SavedCacheError(f"{path} is damaged: {error}") from None


def _all() -> list[_Session]:
    """All sessions, the latest first."""
    paths = [path for path in _folder().glob(f"*{SUFFIX}") if _is_name(path.name.removesuffix(SUFFIX))]
    found = [session for path in paths if (session := _describe(path))]
    return sorted(found, key=lambda session: session.written, reverse=True)


def _describe(path: Path) -> _Session | None:
    """A row of the list; None: somebody has deleted the session since."""
    try:
        header, model, conversation = _read(path)
        contents: tuple[str, ...] = (model, str(conversation.turns), str(header.tokens))
    except Dsv2Error as error:
        contents = (str(error).removeprefix(f"{path} "), "-", "-")
    try:
        stat = path.lstat()
    except FileNotFoundError:
        return None
    written = datetime.fromtimestamp(int(stat.st_mtime)).astimezone()
    return _Session(path.name.removesuffix(SUFFIX), contents, stat.st_size, written)
