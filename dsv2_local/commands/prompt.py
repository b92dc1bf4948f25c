"""Reads the messages of a chat from the terminal, with history, completion and several lines."""

from collections.abc import Sequence
from contextlib import suppress

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import WordCompleter
from prompt_toolkit.filters import completion_is_selected
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.keys import Keys

from dsv2_local.commands.messages import as_typed
from dsv2_local.commands.terminal import Terminal
from dsv2_local.errors import InputError
from dsv2_local.machine import homes


class Prompt:
    """Asks the user for messages, and for choices."""

    def __init__(self, terminal: Terminal, commands: Sequence[str]) -> None:
        """Prepare the prompts; Tab completes `commands`."""
        self._terminal = terminal
        self._messages = PromptSession[str](
            history=_history(),
            completer=WordCompleter(list(commands), sentence=True),
            complete_while_typing=False,
            key_bindings=_keys(),
            multiline=True,
            prompt_continuation="  ",
            enable_suspend=True,
            input=terminal.input,
        )
        self._choices = PromptSession[str](enable_suspend=True, input=terminal.input)

    def read(self, prompt: str) -> str:
        """Read a message. Keys that were pressed before are its beginning, or all of it if Enter is among them."""
        with self._terminal.reading(queued=True):
            return self._messages.prompt(prompt)

    def ask(self, question: str) -> str:
        """Read a choice. What was typed before the question stays for the next message: it is no answer to it."""
        with self._terminal.reading(queued=False):
            return self._choices.prompt(question)


class _MessageHistory(FileHistory):
    def store_string(self, string: str) -> None:
        with suppress(OSError, UnicodeEncodeError):  # the chat goes on without it
            super().store_string(string)


def _history() -> History:
    """The history of messages: a file that only the user can read, or in memory if it cannot be written."""
    try:
        path = homes.state() / "history"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)
        return _MessageHistory(str(path))
    except (InputError, OSError):
        return InMemoryHistory()


def _keys() -> KeyBindings:
    """Key bindings: Enter sends unless a backslash was typed before it; Alt-Enter and Ctrl-J start a new line."""
    keys = KeyBindings()

    @keys.add("enter", filter=~completion_is_selected)
    def _(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        # A backslash at the end of pasted text, or of a message from the history, belongs to the text.
        typed = [press.key for press in event.previous_key_sequence] == ["\\"]
        if typed and buffer.document.text_before_cursor.endswith("\\"):
            buffer.delete_before_cursor()
            buffer.newline(copy_margin=False)
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter")
    @keys.add("c-j")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.newline(copy_margin=False)

    @keys.add(Keys.BracketedPaste)
    def _(event: KeyPressEvent) -> None:
        pasted = event.data.replace("\r\n", "\n").replace("\r", "\n")
        event.current_buffer.insert_text(pasted if event.current_buffer.cursor_position else as_typed(pasted))

    return keys
