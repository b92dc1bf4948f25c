"""`dsv2 chat`: a conversation in the terminal.

`Chat` reads, shows and obeys the commands; the conversation itself (`conversation.py`) knows nothing of terminals.
"""

import difflib
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from shlex import quote
from typing import IO, Any

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import WordCompleter
from prompt_toolkit.filters import completion_is_selected
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from rich.console import Console

from dsv2_local.commands import sessions
from dsv2_local.commands.console import ProgressBar, describe, describe_experts, describe_stop, human, prompt_progress
from dsv2_local.commands.conversation import SETTINGS, Conversation
from dsv2_local.commands.markdown import CONTROL, MarkdownStream
from dsv2_local.commands.shortening import drop_oldest, summarise_oldest
from dsv2_local.errors import ContextLengthError, Dsv2Error, InputError
from dsv2_local.llm import LLM, Generation

PATIENCE = 20
"""A session is saved after a turn once this many times as long has passed as saving took: 5 % of a chat at most."""
HELP = """\
/help              this text
/clear             forget the conversation
/undo              take back the last question and its answer
/retry             answer the last question again
/system [TEXT]     show or set the system message ("-" removes it)
/save [NAME]       keep the conversation as a session: now, after turns and in the end
/load [NAME]       go on with a session; without a name: list them
/set [NAME VALUE]  show or change how answers are made ("-" for the model's own)
/stats             figures of the last answer
/experts           where the routed experts are, and what happened to them
/exit              leave (so does Ctrl-D)

Enter sends; Alt-Enter or a \\ at the end of the line makes a new line. Ctrl-C stops an answer and keeps what came.
A message that begins with / is written with two: //like this."""


class Chat:
    """The terminal's side of a conversation."""

    def __init__(
        self,
        llm: LLM,
        system: str | None,
        options: dict[str, Any],
        console: Console | None = None,
        read: Callable[[str], str] | None = None,
        ask: Callable[[str], str] | None = None,
        session: str | None = None,
    ) -> None:
        """`options` are those of `LLM.generate`.

        `read` reads a message after a prompt, `ask` a choice that does not belong in the history; they and `console`
        are the terminal's own by default. `session` is gone on with if it is there, and saved in any case; `system` and
        `options` go before its own.
        """
        self.llm = llm
        self._stop = options.pop("stop", None)
        self.conversation = Conversation(system, options)
        self.console = console or Console(highlight=False)
        self._read = read or _prompt_session().prompt
        self._ask = ask or PromptSession[str]().prompt
        self._last: Generation | None = None
        self._interrupted = False
        self._progress = prompt_progress(self.console)
        self._asked_for = session
        self._name: str | None = None
        self._claim: IO[bytes] | None = None
        self._saved: tuple[str, Generation | None] = ("", None)
        self._saved_at = self._saving_took = 0.0
        self.commands: dict[str, Callable[[str], None]] = {
            name: getattr(self, f"_{name}")
            for name in ("help", "clear", "undo", "retry", "system", "save", "load", "set", "stats", "experts")
        }

    def loop(self) -> None:
        """Read and answer until the user leaves.

        Raises:
            InputError: `session` cannot be one's name, or another chat has it.
            SavedCacheError: it is damaged, or another model's.
        """
        if self._asked_for:
            self._open_session(self._asked_for)
        self._say(f"{self.llm.name} ({self.llm.recipe}), context {self.llm.context:,} tokens; /help lists commands")
        if self._name:
            self._say(f"session {self._name}{self._size() if self.conversation.messages else ' begins'}")
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
                text = self._read("› ").strip()
            except KeyboardInterrupt:
                if not hinted:
                    self._say("Ctrl-D or /exit leaves")
                hinted = True
                continue
            except EOFError:
                return
            if text in ("/exit", "/quit"):
                return
            self._obey_or_ask(text)

    def _obey_or_ask(self, text: str) -> None:
        """Neither an error nor Ctrl-C in a turn ends the conversation; a question without an answer is taken back."""
        with self._surviving():
            if text.startswith("/") and not text.startswith("//"):
                self.command(text)
            elif text:
                self.conversation.ask(text.removeprefix("/") if text.startswith("//") else text)
                self.respond()
        if self.conversation.unanswered:
            self.conversation.undo()
            self._say("the question is taken back; arrow up brings it again")
        with self._surviving():
            if self._unsaved and time.monotonic() - self._saved_at >= PATIENCE * self._saving_took:
                self._write()

    @contextmanager
    def _surviving(self) -> Iterator[None]:
        try:
            yield
        except (Dsv2Error, OSError, MemoryError) as error:
            self.console.print(f"error: {error}", style="red", markup=False)
        except KeyboardInterrupt:
            self._say("stopped")

    def command(self, text: str) -> None:
        """Obey a line that begins with a slash."""
        name, _, argument = text[1:].partition(" ")
        if name not in self.commands:
            near = difflib.get_close_matches(name, [*self.commands, "exit"], n=1)
            hint = f"; did you mean /{near[0]}?" if near else "; /help lists them"
            raise InputError(f"there is no command /{name}{hint}")
        self.commands[name](argument.strip())

    def respond(self) -> None:
        """Answer the last question; what came before Ctrl-C or an error is kept."""
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
            self._say(f"{describe_stop(generation.stats)}; they are kept: send it again to go on")
        else:
            self._stats("")

    def _show(self, generation: Generation) -> bool:
        """Print the answer as it comes; whether Ctrl-C stopped it."""
        try:
            with self._progress, MarkdownStream(self.console) as stream:
                for chunk in generation:
                    stream.push(chunk.text)
        except KeyboardInterrupt:
            generation.close()
            return True
        return False

    def _offer_room(self, error: ContextLengthError) -> None:
        """The conversation has outgrown the context: let the user choose, and lose nothing unasked."""
        alone = self.llm.count_tokens(self.conversation.prompt(self.conversation.messages[-1:]))
        if alone >= error.context:
            system = " with the system message" if self.conversation.system else ""
            self._say(f"this question alone has {alone:,} tokens{system} and the context holds {error.context:,}")
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
        """Ctrl-C and errors go to the caller, and the conversation is as it was."""
        with self._progress, ProgressBar("writing a summary", self.console, "tokens") as writing:
            options = {"progress": self._progress, **self.conversation.settings}
            replaced = summarise_oldest(self.conversation, self.llm, writing, **options)
        self._say(f"a summary stands for {_turns(replaced)}, the oldest: {self.conversation.messages[1]['content']}")

    def _choose(self, question: str, letters: str) -> str:
        """One of `letters`; the last where the user leaves the question."""
        while True:
            try:
                choice = self._ask(question).strip().lower()[:1]
            except (KeyboardInterrupt, EOFError):
                return letters[-1]
            if choice and choice in letters:
                return choice

    def _say(self, text: str) -> None:
        self.console.print(text.translate(CONTROL), style="dim", markup=False)

    def _help(self, _: str) -> None:
        self.console.print(HELP, markup=False)

    def _clear(self, _: str) -> None:
        self.conversation.messages.clear()
        self._say(f"cleared; session {self._name} is as it was until the next answer" if self._name else "cleared")

    def _undo(self, _: str) -> None:
        question = self.conversation.undo()
        self._say("there is nothing to take back" if question is None else f"taken back: {question}")

    def _retry(self, _: str) -> None:
        """Answer again; the old answer goes only when there is a new one."""
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
        """From now on the conversation is this session."""
        name = name or self._name or ""
        if not name:
            raise InputError("name the session: /save NAME")
        if (
            name != self._name
            and sessions.file(name).exists()
            and self._choose(f"replace session {name}? [y/n] ", "yn") == "n"
        ):
            self._say("nothing is saved")
            return
        with self._claiming(name):
            self._write()
        self._say(f"saved session {name}{self._size()}")

    def _load(self, name: str) -> None:
        """From now on the conversation is that of a session; this one is saved if it is one, else given up if asked."""
        if not name:
            sessions.show()
            return
        sessions.check([name])
        if self._unsaved:
            self._write()
        elif (
            not self._name
            and self.conversation.messages
            and self._choose("this conversation is not saved; give it up? [y/n] ", "yn") == "n"
        ):
            return
        with self._claiming(name):
            self._resume(name)
        self._say(f"session {name}{self._size()}")

    @contextmanager
    def _claiming(self, name: str) -> Iterator[None]:
        """Make `name` the chat's session, which no other chat may have meanwhile, unless the block fails."""
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
        """Go on with a session if it is there, with the system message and the settings that were given."""
        given = self.conversation
        with self._claiming(name):
            if sessions.file(name).exists():
                self._resume(name)
                self.conversation.settings |= given.settings
                if given.system is not None:
                    self.conversation.system = given.system

    def _resume(self, name: str) -> None:
        start = time.monotonic()
        with ProgressBar("reading the session", self.console) as progress:
            progress(0, sessions.file(name).stat().st_size)
            self.conversation = sessions.load(name, self.llm)
        self._note_saved(start)

    def _write(self) -> None:
        """Save the session. Ctrl-C and errors leave its file as it was."""
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
        """Whether there is a session and it has something that its file has not."""
        now = (self.conversation.to_text(self.llm.name), self._last)
        return bool(self._name and self.conversation.messages and self._saved != now)

    def _end(self) -> None:
        """Save the session, if it is one. A terminal that is gone cannot be told."""
        try:
            if self._unsaved:
                self._write()
        except KeyboardInterrupt:
            self._say(f"session {self._name} is not saved; its file is as it was")
            raise
        if self._name and self.conversation.messages:
            again = f"dsv2 chat --session {quote(self._name)}"
            with suppress(OSError):
                self._say(f"saved session {self._name}{self._size()}; `{again}` goes on")

    def _size(self) -> str:
        """What the session holds: turns, and its file's bytes."""
        assert self._name
        return f": {_turns(self.conversation.turns)}, {human(sessions.file(self._name).stat().st_size)}"

    def _set(self, argument: str) -> None:
        if argument:
            name, _, value = argument.partition(" ")
            if not value:
                raise InputError("/set takes a name and a value")
            self.conversation.set(name, value.strip())
        for name in SETTINGS:
            default = getattr(self.llm.defaults, name, None)
            self._say(f"{name} = {self.conversation.settings.get(name, default)}")

    def _stats(self, _: str) -> None:
        if self._last is None:
            self._say("no answer yet")
        else:
            self._say(describe(self._last.stats, self._interrupted))

    def _experts(self, _: str) -> None:
        for line in describe_experts(self.llm):
            self._say(line)


def _turns(count: int) -> str:
    return f"{count:,} turn{'' if count == 1 else 's'}"


class _Hangups:
    """SIGTERM, and SIGHUP of a terminal that was closed: the first raises SystemExit, later ones change nothing.

    A closed terminal makes writing fail too, before or after the signal comes.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
        self._before = {number: handler for number, handler in before.items() if handler != signal.SIG_IGN}  # nohup
        for number in self._before:
            signal.signal(number, self._leave)

    def ignore(self) -> None:
        """Change nothing from now on."""
        for number in self._before:
            signal.signal(number, signal.SIG_IGN)

    def restore(self) -> None:
        """What was before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _leave(self, number: int, _: object) -> None:
        self.ignore()
        if number == signal.SIGHUP:
            self._console.file = Path(os.devnull).open("w")  # noqa: SIM115 (until the end)
        raise SystemExit(128 + number)


def _prompt_session() -> PromptSession[str]:
    commands = WordCompleter([line.split()[0] for line in HELP.splitlines() if line.startswith("/")], sentence=True)
    return PromptSession(
        history=_history(),
        completer=commands,
        complete_while_typing=False,
        key_bindings=_keys(),
        multiline=True,
        prompt_continuation="  ",
    )


def _history() -> History:
    """Kept between runs and readable by the user alone; in memory where it cannot be written."""
    path = sessions.state() / "history"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)
        return FileHistory(str(path))
    except OSError:
        return InMemoryHistory()


def _keys() -> KeyBindings:
    """Enter sends, unless the line ends in a backslash; Alt-Enter and Ctrl-J make a new line."""
    keys = KeyBindings()

    @keys.add("enter", filter=~completion_is_selected)
    def _(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.document.text_before_cursor.endswith("\\"):
            buffer.delete_before_cursor()
            buffer.newline(copy_margin=False)
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter")
    @keys.add("c-j")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.newline(copy_margin=False)

    return keys
