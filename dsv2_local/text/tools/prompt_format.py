"""Tools for models whose tokenizers have no tokens for them: everything is text, and the system message explains it.

A call is `<tool_call>{"name": "NAME", "arguments": {…}}</tool_call>`; the next one follows on a new line. Results are a
message of the user, each as `<tool_response>…</tool_response>`. docs/design.md shows a whole prompt.
"""

import json
import re
from collections.abc import Callable, Sequence

from dsv2_local.chunk import ToolCall
from dsv2_local.text.chat_template import Message
from dsv2_local.text.detokenizer import Detokenizer, possible_beginning
from dsv2_local.text.tokenizer import Tokenizer
from dsv2_local.text.tools.calls import AnswerParser, CallCounter, Event
from dsv2_local.text.tools.format import ANY_TEXT
from dsv2_local.text.tools.functions import Function, as_json
from dsv2_local.text.tools.history import Calls, Results, read_history

OPEN, CLOSE = "<tool_call>", "</tool_call>"
INSTRUCTIONS = """\
## Tools

You may call these functions:

{definitions}

To call a function, write its name and its arguments as JSON, exactly in this form:

<tool_call>{{"name": "function_name", "arguments": {{"parameter": "value"}}}}</tool_call>

To call several, write each on a line of its own. Stop after the last one: the results come in the next message. If no \
function is needed, answer without one."""


class PromptFormat:
    """The `ToolFormat` described at the top of this file."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def definitions(self, functions: Sequence[Function], system: str) -> str:
        """See `ToolFormat`."""
        listed = "\n".join(as_json(function.definition) for function in functions)
        return "\n\n".join(filter(None, [system, INSTRUCTIONS.format(definitions=listed)]))

    def turns(self, messages: Sequence[Message]) -> tuple[list[Message], bool]:
        """See `ToolFormat`."""
        written = list[Message]()
        for turn in read_history(messages):
            if isinstance(turn, Calls):
                content = turn.text + "\n".join(map(_written, turn.calls))
                written.append({"role": "assistant", "content": content})
            elif isinstance(turn, Results):
                content = "\n".join(f"<tool_response>{text}</tool_response>" for text in turn.texts)
                written.append({"role": "user", "content": content})
            else:
                written.append(turn.message)
        return written, False

    def parser(self, most_calls: int | None) -> AnswerParser:
        """See `ToolFormat`."""
        return PromptParser(Detokenizer(self._tokenizer), most_calls)

    def grammar(
        self,
        functions: Sequence[Function],
        *,
        answer: str | None,
        parallel: bool,
        schema: Callable[[Function], str],
        lead: str | None,
    ) -> str:
        """See `ToolFormat`."""
        before = '" "? ' if lead is None else f"{json.dumps(lead)} " if lead else ""
        calls = 'body ("\\n" "<tool_call>" body)*' if parallel else "body"
        rules = [
            "start: " + ("" if answer is None else "answer | ") + f"beginning {calls}",
            # What the template writes before an answer is what models have learnt to write, and what will come back.
            "beginning[lazy]: /(.|\\n)*<tool_call>/" if answer == ANY_TEXT else f'beginning: {before}"<tool_call>"',
            *([] if answer is None else [f"answer: {answer}"]),
            "body: " + " | ".join(f"body_{index}" for index in range(len(functions))),
        ]
        for index, function in enumerate(functions):
            head = json.dumps(f'{{"name": "{function.name}", "arguments": ')
            rules += [
                f"body_{index}: {head} arguments_{index} {json.dumps('}' + CLOSE)}",
                f"arguments_{index}: {schema(function)}",
            ]
        return "\n".join(rules) + "\n"


def _written(call: ToolCall) -> str:
    return f'{OPEN}{{"name": {as_json(call.name)}, "arguments": {call.arguments}}}{CLOSE}'


def _partly(parts: Sequence[str]) -> "re.Pattern[str]":
    """Matches beginnings of texts that consist of these parts: of all, of the first few, or of none."""
    pattern = ""
    for part in reversed(parts):
        pattern = f"(?:{part}{pattern})?"
    return re.compile(pattern, re.DOTALL)


_SPACE = r"\s{0,64}"
_STRING = r'(?:[^"\\]|\\.){0,256}'
_HEAD = [
    *OPEN, _SPACE, r"\{", _SPACE, *'"name"', _SPACE, ":", _SPACE, '"', _STRING, '"', _SPACE, ",", _SPACE,
    *'"arguments"', _SPACE, ":", _SPACE, r"\{",
]  # fmt: skip
_BEGUN = re.compile("".join(_HEAD).replace(_STRING, f"({_STRING})"), re.DOTALL)
_MAY_BEGIN = _partly([part + r"(?:\\\Z)?" if part == _STRING else part for part in _HEAD])
_TAIL = [_SPACE, r"\}?", _SPACE, *CLOSE]
_ENDED, _MAY_END = re.compile("".join(_TAIL)), _partly(_TAIL)
_OF_INTEREST = re.compile(r'[{}\[\]"<]')
_IN_STRING = re.compile(r'["\\]')


class PromptParser:
    """An `AnswerParser` of this format.

    What begins like a call and is none stays text. A call whose JSON is broken ends at the closing tag, with its
    arguments as they are. White space between calls, and after the last one, is left out.
    """

    def __init__(self, detokenizer: Detokenizer, most_calls: int | None = None) -> None:
        self.ended = False
        self._detokenizer, self._calls = detokenizer, CallCounter(most_calls)
        self._state = self._in_text
        self._held, self._after_call = "", False
        self._depth, self._in_quotes = 0, False

    def push(self, token: int) -> list[Event]:
        """See `AnswerParser`."""
        return self.push_text(self._detokenizer.push(token))

    def flush(self) -> list[Event]:
        """See `AnswerParser`."""
        return self.push_text(self._detokenizer.flush()) + self._rest()

    def push_text(self, text: str) -> list[Event]:
        """Add a piece of text; returns what is final with it."""
        self._held += text
        events: list[Event] = []
        while not self.ended and self._held and self._state(events):
            pass
        return events

    def _rest(self) -> list[Event]:
        rest, self._held = self._held, ""
        if self.ended or not rest:
            return []
        if self._state == self._in_arguments:
            return self._calls.arguments(rest)
        if self._state == self._at_end or (self._after_call and rest.isspace()):
            return []
        return [rest]

    def _take(self, length: int) -> str:
        taken, self._held = self._held[:length], self._held[length:]
        return taken

    # Each state takes what it can from the held text, and returns whether the next one goes on with the rest.

    def _in_text(self, events: list[Event]) -> bool:
        start = self._held.find(OPEN)
        end = start if start >= 0 else len(self._held) - possible_beginning(self._held, [OPEN])
        if self._after_call and self._held[:end].isspace():
            if start < 0:
                return False
            self._take(end)
        elif text := self._take(end):
            events.append(text)
            self._after_call = False
        if start < 0:
            return False
        self._state = self._at_name
        return True

    def _at_name(self, events: list[Event]) -> bool:
        if begun := _BEGUN.match(self._held):
            self._take(begun.end() - 1)
            events.append(self._calls.begin(_string(begun[1])))
            self._state = self._in_arguments
            self._depth, self._in_quotes = 0, False
            return True
        if _MAY_BEGIN.fullmatch(self._held):
            return False
        events.append(self._take(len(OPEN)))
        self._state, self._after_call = self._in_text, False
        return True

    def _in_arguments(self, events: list[Event]) -> bool:
        place, held = 0, self._held
        while found := (_IN_STRING if self._in_quotes else _OF_INTEREST).search(held, place):
            place, letter = found.end(), found[0]
            if letter == '"':
                self._in_quotes = not self._in_quotes
            elif letter == "\\":
                if place == len(held):
                    place -= 1
                    break
                place += 1
            elif letter == "<":
                if held.startswith(CLOSE, place - 1):
                    events += self._calls.arguments(self._take(place - 1))
                    self._state = self._at_end
                    return True
                if CLOSE.startswith(held[place - 1 :]):
                    place -= 1
                    break
            else:
                self._depth += 1 if letter in "{[" else -1
                if self._depth == 0:
                    events += self._calls.arguments(self._take(place))
                    self._state = self._at_end
                    return True
        else:
            place = len(held)
        events += self._calls.arguments(self._take(place))
        return False

    def _at_end(self, events: list[Event]) -> bool:
        if ended := _ENDED.match(self._held):
            self._take(ended.end())
        elif _MAY_END.fullmatch(self._held):
            return False
        self._after_call = ended is not None
        self._state, self.ended = self._in_text, self._calls.full
        return True


def _string(quoted: str) -> str:
    try:
        return str(json.loads(f'"{quoted}"', strict=False))
    except ValueError:
        return quoted
