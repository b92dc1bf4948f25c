"""`dsv2 chat`: a conversation in the terminal.

`Conversation` holds the messages and settings and knows nothing of terminals; `Chat` reads, shows and obeys the
commands.
"""

import difflib
import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import WordCompleter
from prompt_toolkit.filters import completion_is_selected
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from rich.console import Console

from dsv2_local.console import READING, Waiting, describe, describe_experts
from dsv2_local.errors import ContextLengthError, Dsv2Error, InputError
from dsv2_local.llm import LLM, Generation
from dsv2_local.markdown import MarkdownStream
from dsv2_local.sampling import SamplingParams

FILE_KIND = "dsv2-chat"
SETTINGS = {
    "max_tokens": int,
    **{f.name: int if f.name in ("top_k", "seed") else float for f in fields(SamplingParams) if f.name != "logit_bias"},
}
HELP = """\
/help              this text
/clear             forget the conversation
/undo              take back the last question and its answer
/retry             answer the last question again
/system [TEXT]     show or set the system message ("-" removes it)
/save FILE         write the conversation
/load FILE         read one
/set [NAME VALUE]  show or change how answers are made ("-" for the model's own)
/stats             figures of the last answer
/experts           where the routed experts are, and what happened to them
/exit              leave (so does Ctrl-D)

Enter sends; Alt-Enter or a \\ at the end of the line makes a new line. Ctrl-C stops an answer and keeps what came.
A message that begins with / is written with two: //like this."""


@dataclass
class Conversation:
    """What was said, and how answers are made. `messages` holds no system message; `system` does."""

    system: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    messages: list[dict[str, str]] = field(default_factory=list)

    def prompt(self) -> list[dict[str, str]]:
        """The messages as the model is given them."""
        head = [{"role": "system", "content": self.system}] if self.system else []
        return head + self.messages

    def ask(self, text: str) -> None:
        self.messages.append({"role": "user", "content": text})

    def answer(self, text: str) -> None:
        self.messages.append({"role": "assistant", "content": text})

    @property
    def unanswered(self) -> bool:
        """Whether the last message is a question."""
        return bool(self.messages) and self.messages[-1]["role"] == "user"

    def undo(self) -> str | None:
        """Take back the last question and what followed it; returns the question."""
        while self.messages:
            message = self.messages.pop()
            if message["role"] == "user":
                return message["content"]
        return None

    def drop_oldest(self) -> bool:
        """Forget the oldest question and its answer; False when only the last question is left."""
        later = [i for i, message in enumerate(self.messages) if message["role"] == "user" and i > 0]
        if not later:
            return False
        del self.messages[: later[0]]
        return True

    def set(self, name: str, value: str) -> None:
        """Change a setting; "-" returns it to the model's own. InputError for a wrong name or value."""
        if name not in SETTINGS:
            raise InputError(f"there is no setting {name}; the settings are {', '.join(SETTINGS)}")
        if value == "-":
            self.settings.pop(name, None)
            return
        try:
            number = SETTINGS[name](value)
        except ValueError:
            raise InputError(f"{name} must be a number, not {value}") from None
        if name == "max_tokens" and number < 1:
            raise InputError(f"max_tokens must be at least 1, not {number}")
        if name != "max_tokens":
            SamplingParams().override(**{name: number})  # checks the range
        self.settings[name] = number

    def save(self, path: Path, model: str) -> None:
        """Write a JSON file that only the user may read, whole or not at all; never over another kind of file."""
        if path.exists():
            self._read(path)
        text = json.dumps({"kind": FILE_KIND, "model": model, **asdict(self)}, indent=2, ensure_ascii=False)
        try:
            descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=path.name)  # made with mode 0600
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                file.write(text + "\n")
            Path(name).replace(path)
        except OSError as error:
            raise InputError(f"{path} cannot be written: {error.strerror}") from None

    def load(self, path: Path) -> None:
        """Replace this conversation by a saved one. InputError when the file is not one."""
        raw = self._read(path)
        try:
            messages = [{"role": str(m["role"]), "content": str(m["content"])} for m in raw["messages"]]
            if [m["role"] for m in messages] != ["user", "assistant"] * (len(messages) // 2):
                raise TypeError("questions and answers must alternate")
            loaded = Conversation(raw["system"])
            for name, value in raw["settings"].items():
                if name in SETTINGS:
                    loaded.set(name, str(value))
        except (KeyError, TypeError, AttributeError):
            raise InputError(f"{path} is a damaged conversation") from None
        self.system, self.settings, self.messages = loaded.system, loaded.settings, messages

    @staticmethod
    def _read(path: Path) -> dict[str, Any]:
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise InputError(f"{path} cannot be read: {error.strerror}") from None
        except ValueError:
            raw = None
        if not isinstance(raw, dict) or raw.get("kind") != FILE_KIND:
            raise InputError(f"{path} is not a saved conversation")
        return raw


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
    ) -> None:
        """`options` are those of `LLM.generate`.

        `read` reads a message after a prompt, `ask` a choice that does not belong in the history; they and `console`
        are the terminal's own by default.
        """
        self.llm = llm
        self._stop = options.pop("stop", None)
        self.conversation = Conversation(system, options)
        self.console = console or Console(highlight=False)
        self._read = read or _session().prompt
        self._ask = ask or PromptSession[str]().prompt
        self._last: Generation | None = None
        self._interrupted = False
        self._progress = Waiting(READING, self.console)
        self.commands: dict[str, Callable[[str], None]] = {
            name: getattr(self, f"_{name}")
            for name in ("help", "clear", "undo", "retry", "system", "save", "load", "set", "stats", "experts")
        }

    def loop(self) -> None:
        """Read and answer until the user leaves."""
        self._say(f"{self.llm.name} ({self.llm.recipe}), context {self.llm.context:,} tokens; /help lists commands")
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
        try:
            if text.startswith("/") and not text.startswith("//"):
                self.command(text)
            elif text:
                self.conversation.ask(text.removeprefix("/") if text.startswith("//") else text)
                self.respond()
        except (Dsv2Error, OSError, MemoryError) as error:
            self.console.print(f"error: {error}", style="red", markup=False)
        except KeyboardInterrupt:
            self._say("stopped")
        if self.conversation.unanswered:
            self.conversation.undo()
            self._say("the question is taken back; arrow up brings it again")

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
        self._say(f"the conversation has {error.prompt_tokens:,} tokens and the context holds {error.context:,}")
        try:
            choice = self._ask("[d]rop the oldest turns, or [k]eep all and take this question back? ")
        except (KeyboardInterrupt, EOFError):
            choice = "k"
        if choice.strip().lower().startswith("d") and self._make_room():
            self.respond()

    def _make_room(self) -> bool:
        """Forget whole turns until the prompt leaves room for an answer (an eighth of the context)."""
        before, dropped = list(self.conversation.messages), 0
        while self.llm.count_tokens(self.conversation.prompt()) > self.llm.context * 7 // 8:
            if not self.conversation.drop_oldest():
                self._say("this question alone is too long")
                self.conversation.messages = before
                return False
            dropped += 1
        self._say(f"dropped {dropped} turns")
        return True

    def _say(self, text: str) -> None:
        self.console.print(text, style="dim", markup=False)

    def _help(self, _: str) -> None:
        self.console.print(HELP, markup=False)

    def _clear(self, _: str) -> None:
        self.conversation.messages.clear()
        self._say("cleared")

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
        self.conversation.save(_path(name), self.llm.name)
        self._say(f"saved {len(self.conversation.messages)} messages")

    def _load(self, name: str) -> None:
        self.conversation.load(_path(name))
        self._say(f"loaded {len(self.conversation.messages)} messages")

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


def _path(name: str) -> Path:
    if not name:
        raise InputError("name a file")
    return Path(name).expanduser()


def _session() -> PromptSession[str]:
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
    base = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    path = Path(base) / "dsv2-local" / "history"
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
