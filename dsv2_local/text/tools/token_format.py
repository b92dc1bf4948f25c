"""Tools as DeepSeek-V2.5 and V3 write them, with tokens of their own.

Calls are between `<｜tool▁calls▁begin｜>` and `<｜tool▁calls▁end｜>`, with line feeds between them. Each is
`<｜tool▁call▁begin｜>function<｜tool▁sep｜>NAME`, a line feed, the arguments in a fence of Markdown and
`<｜tool▁call▁end｜>`. The results follow the end of that turn, and the answer follows the results, without a header.

The template of these models leaves tokens out: it closes no single call, and opens neither calls nor results for a
second time. So all of this becomes the content of one message of the assistant, which templates write as it is.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, auto

from dsv2_local.chunk import ToolCall
from dsv2_local.text.chat_template import Message
from dsv2_local.text.detokenizer import Detokenizer
from dsv2_local.text.quoting import Composed, Own
from dsv2_local.text.tokenizer import Tokenizer
from dsv2_local.text.tools.calls import AnswerParser, CallCounter, Event
from dsv2_local.text.tools.format import ANY_TEXT
from dsv2_local.text.tools.functions import Function, as_json
from dsv2_local.text.tools.history import Calls, Results, Turn, read_history

NAMES = {
    name: f"<｜tool▁{name.replace(' ', '▁')}｜>"
    for name in (
        "calls begin", "call begin", "sep", "call end", "calls end", "outputs begin", "output begin", "output end",
        "outputs end",
    )
}  # fmt: skip
PERSON = "You are a helpful Assistant."
"""The system text of a conversation that has none, as in the model card of DeepSeek-V2.5."""


@dataclass(frozen=True)
class Markers:
    """The tokens of this format, by what they mean (`NAMES`)."""

    ids: Mapping[str, int]

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> "Markers | None":
        """Those of a tokenizer; None if it lacks one of them."""
        ids = {name: id for name, text in NAMES.items() if (id := tokenizer.added_token(text)) is not None}
        return cls(ids) if len(ids) == len(NAMES) else None


class TokenFormat:
    """The `ToolFormat` described at the top of this file."""

    def __init__(self, tokenizer: Tokenizer, markers: Markers) -> None:
        self._tokenizer, self._markers = tokenizer, markers

    def definitions(self, functions: Sequence[Function], system: str) -> str:
        """See `ToolFormat`; as in the model card of DeepSeek-V2.5."""
        listed = [f"- `{each.name}`:\n```json\n{as_json(each.definition, indent=4)}\n```" for each in functions]
        heading = "## Tools\n\n### Function\n\nYou have the following functions available:"
        return "\n\n".join([system or PERSON, heading, *listed])

    def turns(self, messages: Sequence[Message]) -> tuple[list[Message], bool]:
        """See `ToolFormat`."""
        written = list[Message]()
        pieces, answers = list[str](), False  # of the message that goes on, and whether the answer may follow

        def end() -> None:
            if pieces:
                written.append({"role": "assistant", "content": Composed(pieces)})
                pieces.clear()

        for turn in read_history(messages):
            if isinstance(turn, Results):
                if pieces:
                    pieces.append(Own(self._tokenizer.eos_token))
                pieces += _results(turn.texts)
                answers = True
                continue
            goes_on, answers = answers, False
            if isinstance(turn, Calls):
                if not goes_on:
                    end()
                pieces += [turn.text, *_calls(turn.calls)]
            elif isinstance(turn, Turn) and turn.text is not None and goes_on:
                pieces.append(turn.text)
                end()
            else:
                end()
                written.append(turn.message)
        end()
        return written, answers

    def parser(self, most_calls: int | None) -> AnswerParser:
        """See `ToolFormat`."""
        return TokenParser(lambda: Detokenizer(self._tokenizer), self._markers, most_calls)

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
        token = {name: f"<[{id}]>" for name, id in self._markers.ids.items()}
        rules = [
            "start: calls" if answer is None else f"start: answer | {'answer? ' if answer == ANY_TEXT else ''}calls",
            *([] if answer is None else [f"answer: {answer}"]),
            f"calls: {token['calls begin']} call{' (NEW_LINE call)*' if parallel else ''} {token['calls end']}",
            'NEW_LINE: "\\n"',
            f'call: {token["call begin"]} "function" {token["sep"]} body {token["call end"]}',
            "body: " + " | ".join(f"body_{index}" for index in range(len(functions))),
        ]
        for index, function in enumerate(functions):
            rules += [
                f"body_{index}: {json.dumps(f'{function.name}{_FENCE}')} arguments_{index} {json.dumps(_FENCE_END)}",
                f"arguments_{index}: {schema(function)}",
            ]
        return "\n".join(rules) + "\n"


_FENCE, _FENCE_END = "\n```json\n", "\n```"


def _calls(calls: Sequence[ToolCall]) -> list[str]:
    pieces: list[str] = [Own(NAMES["calls begin"])]
    for index, call in enumerate(calls):
        pieces += ["\n"] if index else []
        pieces += [Own(NAMES["call begin"]), "function", Own(NAMES["sep"])]
        pieces += [f"{call.name}{_FENCE}{call.arguments}{_FENCE_END}", Own(NAMES["call end"])]
    return [*pieces, Own(NAMES["calls end"])]


def _results(texts: Sequence[str]) -> list[str]:
    pieces: list[str] = [Own(NAMES["outputs begin"])]
    for index, text in enumerate(texts):
        pieces += ["\n"] if index else []
        pieces += [Own(NAMES["output begin"]), text, Own(NAMES["output end"])]
    return [*pieces, Own(NAMES["outputs end"])]


class _In(Enum):
    """What the text between two markers is."""

    TEXT = auto()
    BETWEEN = auto()  # calls: white space
    KIND = auto()  # "function"
    NAME = auto()
    FENCE = auto()  # the beginning of the fence
    ARGUMENTS = auto()


_FENCE_BEGUN = re.compile(r"\s*```(?:json)?[ \t]*\n")
_FENCE_MAY_BEGIN = re.compile(r"\s*(?:`{1,2}|```(?:j(?:s(?:on?)?)?)?[ \t]*)?")
_FENCE_ENDED = re.compile(r"\n?```\s*\Z")
_FENCE_MAY_END = re.compile(r"(?:\n?```\s*|\n?`{0,2})\Z")
_LONGEST_KIND = 64


class TokenParser:
    """An `AnswerParser` of this format, which looks for the ids of the markers.

    Markers are never text. What is between them and is not a call is text, as is a call without a name.
    """

    def __init__(
        self, new_detokenizer: Callable[[], Detokenizer], markers: Markers, most_calls: int | None = None
    ) -> None:
        self.ended = False
        self._new_detokenizer, self._detokenizer = new_detokenizer, new_detokenizer()
        self._names = {id: name for name, id in markers.ids.items()}
        self._calls = CallCounter(most_calls)
        self._in, self._held, self._fenced = _In.TEXT, "", False

    def push(self, token: int) -> list[Event]:
        """See `AnswerParser`."""
        if self.ended:
            return []
        if (marker := self._names.get(token)) is None:
            return self._text(self._detokenizer.push(token))
        events = self._text(self._detokenizer.flush())
        self._detokenizer = self._new_detokenizer()
        return events + self._marker(marker)

    def flush(self) -> list[Event]:
        """See `AnswerParser`."""
        return [] if self.ended else self._text(self._detokenizer.flush()) + self._close()

    def _marker(self, marker: str) -> list[Event]:
        if marker == "sep":
            return self._separator()
        events = self._close()
        within = {"call begin": _In.KIND, "calls begin": _In.BETWEEN, "call end": _In.BETWEEN}
        self._in = within.get(marker, _In.TEXT)
        self.ended = self._calls.full
        return events

    def _separator(self) -> list[Event]:
        if self._in is not _In.KIND:
            return []
        kind, self._held = self._held.strip(), ""
        if kind in ("", "function"):
            self._in = _In.NAME
            return []
        self._in, self._fenced = _In.FENCE, False  # as V3.1 writes calls: the name, the separator, the arguments
        return [self._calls.begin(kind)]

    def _close(self) -> list[Event]:
        """What is still held back of the text before a marker, or before the end."""
        held, self._held = self._held, ""
        match self._in:
            case _In.NAME if name := held.strip():
                return [self._calls.begin(name)]
            case _In.FENCE if held.isspace():
                return []
            case _In.FENCE | _In.ARGUMENTS:
                return self._calls.arguments(_FENCE_ENDED.sub("", held) if self._fenced else held)
            case _:
                return [] if not held or held.isspace() else [held]

    def _text(self, text: str) -> list[Event]:
        if not text:
            return []
        self._held += text
        match self._in:
            case _In.TEXT:
                return [self._take(len(self._held))]
            case _In.BETWEEN:
                if self._held.isspace():
                    return []
                self._in = _In.TEXT
                return [self._take(len(self._held))]
            case _In.KIND:
                if len(self._held) <= _LONGEST_KIND:
                    return []
                self._in = _In.TEXT
                return [self._take(len(self._held))]
            case _In.NAME:
                return self._name()
            case _In.FENCE:
                return self._fence()
            case _In.ARGUMENTS:
                return self._arguments()

    def _name(self) -> list[Event]:
        name, line_feed, rest = self._held.partition("\n")
        if not line_feed:
            return []
        if not name.strip():
            self._in = _In.TEXT
            return [self._take(len(self._held))]
        self._in, self._held, self._fenced = _In.FENCE, rest, False
        return [self._calls.begin(name.strip()), *self._fence()]

    def _fence(self) -> list[Event]:
        if begun := _FENCE_BEGUN.match(self._held):
            self._take(begun.end())
            self._in, self._fenced = _In.ARGUMENTS, True
        elif _FENCE_MAY_BEGIN.fullmatch(self._held):
            return []
        self._in = _In.ARGUMENTS
        return self._arguments()

    def _arguments(self) -> list[Event]:
        held = _FENCE_MAY_END.search(self._held) if self._fenced else None
        return self._calls.arguments(self._take(held.start() if held else len(self._held)))

    def _take(self, length: int) -> str:
        taken, self._held = self._held[:length], self._held[length:]
        return taken
