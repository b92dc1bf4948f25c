"""`dsv2 chat`: a conversation in the terminal.

`Chat` reads messages, shows answers and runs the /commands; `conversation.py` has the conversation itself, without any
terminal.
"""

import difflib
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from shlex import quote
from typing import IO, TYPE_CHECKING, Any

from rich.console import Console

from dsv2_local import inlet
from dsv2_local.commands import sessions
from dsv2_local.commands.console import (
    ProgressBar,
    Stopwatch,
    describe_experts,
    describe_stats,
    describe_stop,
    format_bytes,
    prompt_progress,
    without_control_characters,
)
from dsv2_local.commands.conversation import SETTINGS, Conversation
from dsv2_local.commands.markdown import MarkdownStream
from dsv2_local.commands.messages import as_message, is_command
from dsv2_local.commands.shortening import drop_oldest, summarise_oldest
from dsv2_local.commands.terminal import Terminal
from dsv2_local.errors import ContextLengthError, Dsv2Error, InputError

if TYPE_CHECKING:
    from dsv2_local.commands.remote import AnyGeneration, AnyLLM

PATIENCE = 20
"""A session is saved after a turn if this many times the duration of the last save has passed: 5 % of the time."""
HELP = """\
/help              show this text
/clear             forget the conversation
/undo              remove the last question and its answer
/retry             answer the last question again
/system [TEXT]     show or set the system message ("-" removes it)
/save [NAME]       save the conversation as a session: now, after turns and at the end
/load [NAME]       continue a saved session; without a name: list the sessions
/set [NAME VALUE]  show or change sampling settings ("-" for the model's default)
/stats             show the statistics of the last answer
/experts           show where the routed experts are, and how they were used
/exit              leave the chat (so does Ctrl-D)

Enter sends the message; Alt-Enter, or a \\ typed at the end of the line, starts
a new line. Ctrl-C stops an answer and keeps what was written; Ctrl-Z suspends
the chat. What is typed during an answer becomes the next message.

A command is a / and one word. To send a message that looks like a command, type
two: //like this. Pasted text is always a message."""
COMMANDS = [line.split()[0] for line in HELP.splitlines() if line.startswith("/")]
LEAVING = ("/exit", "/quit")


class Chat:
    """A conversation in the terminal: reads messages and commands, shows answers, and saves the session."""

    def __init__(
        self,
        llm: "AnyLLM",
        system: str | None,
        options: dict[str, Any],
        console: Console | None = None,
        read: Callable[[str], str] = input,
        ask: Callable[[str], str] = input,
        session: str | None = None,
        terminal: Terminal | None = None,
    ) -> None:
        """Prepare the chat; `loop` runs it.

        Args:
            llm: answers.
            system: the system message.
            options: options of `LLM.generate`.
            console: where to print; None: the terminal.
            read: prints a prompt and reads a message.
            ask: prints a question and reads a choice.
            session: name of the session to continue, or to begin if it does not exist. `system` and `options` override
                what it has saved.
            terminal: the terminal, if the messages come from one that is owned.
        """
        self.llm = llm
        self._stop = options.pop("stop", None)
        self.conversation = Conversation(system, options)
        self.console = console or Console(highlight=False)
        self._read, self._ask, self._terminal = read, ask, terminal
        self._last: AnyGeneration | None = None
        self._interrupted, self._waited = False, 0.0  # seconds that the last answer took after its first token
        self._progress = prompt_progress(self.console)
        self._requested = session
        self._name: str | None = None  # of the session that this chat is
        self._claim: IO[bytes] | None = None  # the lock on the session
        self._saved: tuple[str, AnyGeneration | None] = ("", None)  # conversation and last answer of the last save
        self._saved_at = self._saving_took = 0.0  # time of that save, and its duration in seconds
        self.commands: dict[str, Callable[[str], None]] = {
            name: getattr(self, f"_{name}")
            for name in ("help", "clear", "undo", "retry", "system", "save", "load", "set", "stats", "experts")
        }

    def loop(self) -> None:
        """Read and answer until the user leaves.

        Raises:
            InputError: the session's name is not valid, or another chat has it open.
            SavedCacheError: the session is damaged, or belongs to another model.
        """
        if self._requested:
            self._open_session(self._requested)
        self._say(f"{self.llm.name} ({self.llm.recipe}), context {self.llm.context:,} tokens; /help lists commands")
        if self._name:
            known = bool(self.conversation.messages)
            self._say(f"session {self._name}{self._size()}" if known else f"new session {self._name}")
        hangups = _Hangups(self.console)
        try:
            try:
                self._talk()
            finally:
                hangups.ignore()
        finally:
            self._end()
            hangups.restore()
            if self._claim:
                self._claim.close()

    def _talk(self) -> None:
        hinted = False
        while True:
            try:
                text = self._read("› ")
                if is_command(text) and text.split()[0] in LEAVING:
                    return
                self._take_turn(text)
            except KeyboardInterrupt:
                if self.conversation.unanswered:
                    self.conversation.undo()
                if not hinted:
                    self._say("leave with Ctrl-D or /exit")
                hinted = True
            except EOFError:
                return

    def _take_turn(self, text: str) -> None:
        """Run a command or answer a message.

        Neither an error nor Ctrl-C ends the chat; a question that got no answer is removed from the conversation.
        """
        with self._surviving():
            text = inlet.text(text, "the message")
            if is_command(text):
                self.command(text)
            elif text.strip():
                self.conversation.ask(as_message(text))
                self.respond()
        if self.conversation.unanswered:
            self.conversation.undo()
            self._say("the question is taken back; press arrow up to edit it")
        with self._surviving():
            if self._unsaved and time.monotonic() - self._saved_at >= PATIENCE * self._saving_took:
                self._write()

    @contextmanager
    def _surviving(self) -> Iterator[None]:
        """Print an error, or that Ctrl-C was pressed, instead of ending the chat."""
        try:
            yield
        except (Dsv2Error, OSError, MemoryError) as error:
            self._say(f"error: {error}", style="red")
        except KeyboardInterrupt:
            self._say("stopped")

    def command(self, text: str) -> None:
        """Run a line that begins with a slash.

        Raises:
            InputError: there is no such command, or its argument is wrong.
        """
        name, argument = ([*text[1:].split(maxsplit=1), "", ""])[:2]
        if name not in self.commands:
            near = difflib.get_close_matches(name, [*self.commands, "exit"], n=1)
            hint = f"did you mean /{near[0]}?" if near else "/help lists the commands"
            raise InputError(f"there is no command /{name}; {hint} (a message begins with two: //{name})")
        self.commands[name](argument.strip())

    def respond(self) -> None:
        """Answer the last question. After Ctrl-C or an error, the part of the answer that was written is kept."""
        if self._terminal:
            self._terminal.check_interrupt()
        prompt = self.conversation.prompt()
        count = self.llm.count_tokens(prompt)
        if count >= self.llm.context:
            self._offer_room(ContextLengthError(count, self.llm.context))
            return
        generation = self.llm.chat(prompt, stop=self._stop, progress=self._progress, **self.conversation.settings)
        self._last = generation
        try:
            self._interrupted = self._show(generation)
        finally:
            if generation.text:
                self.conversation.answer(generation.text)
        if generation.stats.context_used < generation.stats.prompt_tokens:
            self._say(f"{describe_stop(generation.stats)}; they stay in the cache: send the message again to continue")
        else:
            self._stats("")

    def _show(self, generation: "AnyGeneration") -> bool:
        """Print the answer while it is generated; returns whether Ctrl-C stopped it."""
        watch = Stopwatch()
        try:
            with self._progress, MarkdownStream(self.console, self._stops) as stream:
                for chunk in watch.over(generation):
                    stream.push(chunk.text)
        except KeyboardInterrupt:
            generation.close()
            return True
        finally:
            self._waited = watch.seconds
        return False

    def _stops(self) -> int:
        """How often the chat was suspended."""
        return self._terminal.stops if self._terminal else 0

    def _offer_room(self, error: ContextLengthError) -> None:
        """Ask the user what to do about a conversation that no longer fits in the context."""
        alone = self.llm.count_tokens(self.conversation.prompt(self.conversation.messages[-1:]))
        if alone >= error.context:
            system = " with the system message" if self.conversation.system else ""
            self._say(
                f"this question alone has {alone:,} tokens{system} and the context holds {error.context:,}; "
                "shorten it, or start the chat with a larger --context"
            )
            return
        self._say(f"the conversation has {error.prompt_tokens:,} tokens and the context holds {error.context:,}")
        choice = self._choose("[d]rop the oldest turns, [s]ummarise them, or take this question [b]ack? ", "dsb")
        if choice == "d":
            dropped = drop_oldest(self.conversation, self.llm)
            self._say(f"dropped {_turns(dropped)}, the oldest")
        elif choice == "s":
            self._summarise()
        if choice != "b":
            self.respond()

    def _summarise(self) -> None:
        """Replace the oldest turns with a summary. On Ctrl-C or an error the conversation is unchanged."""
        with self._progress, ProgressBar("writing a summary", self.console, "tokens") as writing:
            options = {"progress": self._progress, **self.conversation.settings}
            replaced = summarise_oldest(self.conversation, self.llm, writing, **options)
        summary = self.conversation.messages[1]["content"]
        self._say(f"replaced {_turns(replaced)}, the oldest, with a summary: {summary}")

    def _choose(self, question: str, letters: str) -> str:
        """Ask until the answer begins with one of `letters`; Ctrl-C and Ctrl-D choose the last of them."""
        while True:
            try:
                choice = self._ask(question).strip().lower()[:1]
            except (KeyboardInterrupt, EOFError):
                return letters[-1]
            if choice and choice in letters:
                return choice

    def _say(self, text: str, style: str = "dim") -> None:
        self.console.print(without_control_characters(text), style=style, markup=False, emoji=False)

    def _help(self, _: str) -> None:
        self.console.print(HELP, markup=False)

    def _clear(self, _: str) -> None:
        self.conversation.messages.clear()
        kept = f"; the file of session {self._name} stays as it is until the next answer" if self._name else ""
        self._say(f"the conversation is cleared{kept}")

    def _undo(self, _: str) -> None:
        question = self.conversation.undo()
        self._say("there is nothing to take back" if question is None else f"taken back: {question}")

    def _retry(self, _: str) -> None:
        """Answer the last question again; the old answer is removed only once there is a new one."""
        before = list(self.conversation.messages)
        question = self.conversation.undo()
        if question is None:
            raise InputError("there is no question to answer again")
        self.conversation.ask(question)
        try:
            self.respond()
        finally:
            if self.conversation.unanswered:
                self.conversation.messages = before

    def _system(self, text: str) -> None:
        if text:
            self.conversation.system = None if text == "-" else text
        self._say(f"system: {self.conversation.system or '(none)'}")

    def _save(self, name: str) -> None:
        """Save the conversation; from now on it belongs to this session."""
        name = name or self._name or ""
        if not name:
            raise InputError("name the session: /save NAME")
        if (
            name != self._name
            and sessions.file(name).exists()
            and self._choose(f"replace session {name}? [y/n] ", "yn") == "n"
        ):
            self._say(f"not saved; session {name} is unchanged")
            return
        with self._claiming(name):
            self._write()
        self._say(f"saved session {name}{self._size()}")

    def _load(self, name: str) -> None:
        """Continue a session. The current conversation is saved if it is a session, else discarded after asking."""
        if not name:
            sessions.show()
            return
        sessions.check([name])
        if self._unsaved:
            self._write()
        elif (
            not self._name
            and self.conversation.messages
            and self._choose("this conversation is not saved; discard it? [y/n] ", "yn") == "n"
        ):
            return
        with self._claiming(name):
            self._resume(name)
        self._say(f"session {name}{self._size()}")

    @contextmanager
    def _claiming(self, name: str) -> Iterator[None]:
        """Lock session `name` and make it the chat's; if the block fails, the chat keeps its former session."""
        if name == self._name:
            yield
            return
        claim, before = sessions.claim(name), self._name
        self._name = name
        try:
            yield
        except BaseException:
            self._name = before
            claim.close()
            raise
        if self._claim:
            self._claim.close()
        self._claim = claim

    def _open_session(self, name: str) -> None:
        """Continue a session if it exists; the command line's system message and settings override its own."""
        given = self.conversation
        with self._claiming(name):
            if sessions.file(name).exists():
                self._resume(name)
                self.conversation.settings |= given.settings
                if given.system is not None:
                    self.conversation.system = given.system

    def _resume(self, name: str) -> None:
        start = time.monotonic()
        with ProgressBar("loading the session", self.console) as progress:
            progress(0, sessions.file(name).stat().st_size)
            self.conversation = sessions.load(name, self.llm)
        self._note_saved(start)

    def _write(self) -> None:
        """Save the session. On Ctrl-C or an error its file is unchanged."""
        assert self._name
        start = time.monotonic()
        with ProgressBar("saving the session", self.console) as progress:
            progress(0, self.llm.cache_nbytes)
            sessions.save(self._name, self.llm, self.conversation)
        self._note_saved(start)

    def _note_saved(self, start: float) -> None:
        self._saved = (self.conversation.to_text(self.llm.name), self._last)
        self._saved_at = time.monotonic()
        self._saving_took = self._saved_at - start

    @property
    def _unsaved(self) -> bool:
        """Whether the chat is a session that has changed since it was saved."""
        now = (self.conversation.to_text(self.llm.name), self._last)
        return bool(self._name and self.conversation.messages and self._saved != now)

    def _end(self) -> None:
        """Save the session at the end of the chat, and print how to continue it, if the terminal still exists."""
        try:
            if self._unsaved:
                self._write()
        except KeyboardInterrupt:
            self._say(f"session {self._name} is not saved; its file is unchanged")
            raise
        if self._name and self.conversation.messages:
            again = f"dsv2 chat --session {quote(self._name)}"
            with suppress(OSError):
                self._say(f"saved session {self._name}{self._size()}; continue with `{again}`")

    def _size(self) -> str:
        """The session's turns and the size of its file, as text."""
        assert self._name
        return f": {_turns(self.conversation.turns)}, {format_bytes(sessions.file(self._name).stat().st_size)}"

    def _set(self, argument: str) -> None:
        if argument:
            name, _, value = argument.partition(" ")
            if not value:
                raise InputError("/set needs a name and a value: /set temperature 0.7")
            self.conversation.set(name, value.strip())
        for name in SETTINGS:
            default = getattr(self.llm.defaults, name, None)
            self._say(f"{name} = {self.conversation.settings.get(name, default)}")

    def _stats(self, _: str) -> None:
        if self._last is None:
            self._say("no answer yet")
        else:
            self._say(describe_stats(self._last.stats, self._waited, self._interrupted))

    def _experts(self, _: str) -> None:
        for line in describe_experts(self.llm):
            self._say(line)


def _turns(count: int) -> str:
    return f"{count:,} turn{'' if count == 1 else 's'}"


class _Hangups:
    """Handles SIGTERM, and SIGHUP from a closed terminal: the first raises SystemExit, later ones are ignored.

    The chat can then save its session. A closed terminal also makes writes fail, before or after the signal arrives.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
        self._before = {number: handler for number, handler in before.items() if handler != signal.SIG_IGN}  # nohup
        for number in self._before:
            signal.signal(number, self._leave)

    def ignore(self) -> None:
        """Ignore the signals from now on."""
        for number in self._before:
            signal.signal(number, signal.SIG_IGN)

    def restore(self) -> None:
        """Restore the handlers that were set before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _leave(self, number: int, _: object) -> None:
        self.ignore()
        if number == signal.SIGHUP:
            self._console.file = Path(os.devnull).open("w")  # noqa: SIM115 (stays open until the process ends)
        raise SystemExit(128 + number)
