"""Saved chats: a file each, which holds the conversation and the cache of what was read (`saved.py`)."""

import fcntl
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import IO

from rich.markup import escape
from rich.table import Table

from dsv2_local.commands.console import human, notice, report_console
from dsv2_local.commands.conversation import Conversation
from dsv2_local.errors import Dsv2Error, InputError, SavedCacheError
from dsv2_local.llm import LLM
from dsv2_local.runtime import saved_cache

SUFFIX = ".safetensors"
LONGEST_NAME = 200
"""Bytes: a file's name has 255, and while it is written a longer one."""


def state() -> Path:
    """Where chats keep what they remember, under $XDG_STATE_HOME or ~/.local/state."""
    return Path(os.environ.get("XDG_STATE_HOME") or "~/.local/state").expanduser() / "dsv2-local"


def file(name: str) -> Path:
    """Where a session lies, there or not. InputError for a name that cannot be a session's."""
    if not _is_name(name):
        raise InputError(
            f"{name!r} cannot name a session: it takes up to {LONGEST_NAME} bytes of letters, digits, spaces and "
            ". _ + @ -, and begins with a letter or digit"
        )
    return _folder() / f"{name}{SUFFIX}"


def claim(name: str) -> IO[bytes]:
    """Keep other chats out of a session until the file that is returned is closed, or the process is gone.

    Raises:
        InputError: another chat has it, or it cannot be called so.
        SavedCacheError: nothing can be written there.
    """
    path = file(name)
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = path.with_name(f".{name}.lock").open("wb")
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        raise InputError(f"session {name} is open in another chat; leave that one first") from None
    except OSError as error:
        raise SavedCacheError(f"{path} cannot be written: {error.strerror}") from None
    return lock


def save(name: str, llm: LLM, conversation: Conversation) -> None:
    """Write a session that was claimed, for the user alone; its file appears whole or stays as it was.

    Raises:
        InputError: it cannot be called so.
        SavedCacheError: it cannot be written.
    """
    llm.save_cache(file(name), conversation.to_text(llm.name))


def load(name: str, llm: LLM) -> Conversation:
    """A session's conversation; the model's cache holds then what it had read.

    Raises:
        InputError: there is none of this name.
        SavedCacheError: it is damaged, or another model's; the model's cache is as it was then.
    """
    path = file(name)
    if not path.exists():
        raise InputError(f"there is no session {name}; {_known()}")
    model, conversation = _read(path)[1:]
    try:
        llm.load_cache(path)
    except SavedCacheError as error:
        if model != llm.name:
            raise SavedCacheError(f"{error} (it is a session of {model}, this is {llm.name}; see -m)") from None
        raise
    return conversation


def show() -> None:
    """List all sessions on stdout, the latest first: a table on a terminal, else tab-separated lines."""
    console, found = report_console(), _all()
    if not found:
        notice(f"there are no sessions in {_folder()}; `dsv2 chat --session NAME` begins one")
    elif console.is_terminal:
        console.print(_table(found))
    else:
        for session in found:
            print(session.name, *session.told, session.nbytes, f"{session.written:%Y-%m-%dT%H:%M:%S}", sep="\t")
    sys.stdout.flush()


def check(names: Sequence[str]) -> None:
    """InputError unless all of these are sessions."""
    if missing := [name for name in names if not file(name).exists()]:
        raise InputError(f"there is no session {missing[0]}; {_known()}")


def delete(names: Sequence[str]) -> None:
    """Delete sessions. SavedCacheError where one cannot be."""
    for name in names:
        try:
            file(name).unlink(missing_ok=True)
            file(name).with_name(f".{name}.lock").unlink(missing_ok=True)
        except OSError as error:
            raise SavedCacheError(f"session {name} cannot be deleted: {error.strerror}") from None


@dataclass(frozen=True)
class _Session:
    """What is told of a session: `told` is its model, turns and tokens, or why they are not known."""

    name: str
    told: tuple[str, ...]
    nbytes: int
    written: datetime


def _folder() -> Path:
    return state() / "sessions"


def _table(found: list[_Session]) -> Table:
    table = Table("session", "model", "turns", "tokens", "size", "written")
    for number in (2, 3, 4):
        table.columns[number].justify = "right"
    for session in found:
        model, turns, tokens = map(escape, session.told)
        table.add_row(session.name, model, turns, tokens, human(session.nbytes), f"{session.written:%Y-%m-%d %H:%M}")
    return table


def _is_name(name: str) -> bool:
    return re.fullmatch(r"[^\W_][\w .+@-]*", name) is not None and len(os.fsencode(name)) <= LONGEST_NAME


def _known() -> str:
    names = [session.name for session in _all()]
    return f"there are {', '.join(names)}" if names else "there are none yet"


def _read(path: Path) -> tuple[int, str, Conversation]:
    """Tokens, model and conversation of a session, of which only a load checks the checksum."""
    head = saved_cache.read_header(path)
    if not head.conversation:
        raise SavedCacheError(f"{path} is no session: it holds no conversation")
    try:
        return head.tokens, *Conversation.from_text(head.conversation)
    except InputError as error:
        raise SavedCacheError(f"{path} is damaged: {error}") from None


def _all() -> list[_Session]:
    """The latest first."""
    paths = [path for path in _folder().glob(f"*{SUFFIX}") if _is_name(path.name.removesuffix(SUFFIX))]
    return sorted(map(_describe, paths), key=lambda session: session.written, reverse=True)


def _describe(path: Path) -> _Session:
    try:
        tokens, model, conversation = _read(path)
        told: tuple[str, ...] = (model, str(conversation.turns), str(tokens))
    except Dsv2Error as error:
        told = (str(error).removeprefix(f"{path} "), "-", "-")
    facts = path.stat()
    written = datetime.fromtimestamp(int(facts.st_mtime)).astimezone()
    return _Session(path.name.removesuffix(SUFFIX), told, facts.st_size, written)
