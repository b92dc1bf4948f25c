"""The lines of a batch: from the bytes of a file to requests, whatever the bytes are.

A line that is no request is one with an error; nothing here ends a batch but a file that cannot be read.
"""

import codecs
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from enum import Enum
from hashlib import blake2b
from typing import Any, BinaryIO

from dsv2_local import inlet
from dsv2_local.errors import Dsv2Error, InputError
from dsv2_local.json_object import read_object
from dsv2_local.runtime.sampling_params import VALUES
from dsv2_local.server import completion_format, openai_format, openai_tools
from dsv2_local.values import Number, Object, Text, checked, shown

LONGEST = 1 << 24
"""Bytes of the longest line that is read: 128K tokens as text have about half a million, as escapes three."""
SEEDS = 2**64
IDS = ("id", "custom_id")
STRUCTURES = "schema", "grammar", "regex"
OPTIONS = (
    *VALUES, "logit_bias", "stop", "max_tokens", "max_completion_tokens", "logprobs", "top_logprobs", *STRUCTURES,
    "strict", "response_format",
)  # fmt: skip
_DIGEST = 8  # bytes
_PIECE = 1 << 20
_MARGIN = 8  # bytes: a byte order mark and a line end


class Style(Enum):
    """What a line looks like, and so its result."""

    UNREADABLE = "unreadable"
    SIMPLE = "simple"
    CHAT = "/v1/chat/completions"
    COMPLETION = "/v1/completions"


@dataclass(frozen=True)
class Line:
    """One line of the file.

    Attributes:
        number: the first one is 1.
        key: a number of 64 bits, computed from the bytes of the line and the options; never 0.
        data: its bytes without the line end; None if they are more than `LONGEST`.
    """

    number: int
    key: int
    data: bytes | None


@dataclass
class Request:
    """What a line asks, as far as it could be read.

    Attributes:
        number, key: those of the line.
        style: what the line looks like.
        ids: the names that the line gives itself, which its result repeats.
        prompt: text or token ids to continue; None if there are `messages`.
        messages: a conversation to answer.
        options: those of `LLM.generate`.
        echo: whether the answer repeats the prompt.
        error: why there is no answer.
        result: what is written for it, once it is known.
    """

    number: int
    key: int
    style: Style = Style.UNREADABLE
    ids: dict[str, Any] = field(default_factory=dict)
    prompt: str | list[int] | None = None
    messages: list[Any] | None = None
    options: dict[str, Any] = field(default_factory=dict)
    echo: bool = False
    error: Dsv2Error | None = None
    result: dict[str, Any] | None = None


def read_lines(file: BinaryIO, where: str, fingerprint: bytes) -> Iterator[Line]:
    """Read a file line by line, and never more than `LONGEST` bytes at once.

    Args:
        file: the file.
        where: what errors call it.
        fingerprint: what else the keys of the lines depend on.

    Raises:
        InputError: the file cannot be read, or is UTF-16 or UTF-32, whose lines are others.
    """
    number = 0
    try:
        while piece := file.readline(LONGEST + _MARGIN):
            number += 1
            if number == 1:
                piece = _without_mark(piece, where)
            whole = piece.endswith(b"\n")
            data = piece.removesuffix(b"\n").removesuffix(b"\r")
            digest = blake2b(fingerprint + b"\0" + data, digest_size=_DIGEST)
            long = len(data) > LONGEST
            while long and not whole and (piece := file.readline(_PIECE)):
                digest.update(piece)
                whole = piece.endswith(b"\n")
            yield Line(number, int.from_bytes(digest.digest()) or 1, None if long else data)
    except OSError as error:
        raise InputError(f"{where} cannot be read: {error.strerror}") from None


def _without_mark(piece: bytes, where: str) -> bytes:
    if piece.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE)):
        raise InputError(f"{where} is UTF-16 or UTF-32 text; {inlet.REMEDY}")
    return piece.removeprefix(codecs.BOM_UTF8)


class Parser:
    """Makes requests of lines; knows the custom_ids of earlier ones, by their hashes."""

    def __init__(self, defaults: Mapping[str, Any], system: str | None) -> None:
        """Prepare to parse.

        Args:
            defaults: options for lines that do not have their own. A seed is that of the first line; every further line
                gets the next one, so that equal lines have different answers.
            system: the system message of conversations without one.
        """
        self._defaults, self._system = dict(defaults), system
        self._known = set[int]()

    def parse(self, line: Line) -> Request:
        """The request of a line; if it is none, it has an error."""
        request = Request(line.number, line.key)
        try:
            fields = self._identify(request, line)
            if request.style is Style.SIMPLE:
                self._read_simple(request, fields)
            else:
                self._read_openai(request, fields)
        except InputError as error:
            request.error = error
        return request

    def skip(self, line: Line) -> None:
        """Know the custom_id of a line whose result is there already, and is an error if this one is."""
        with suppress(InputError):
            self._identify(Request(line.number, line.key), line)

    def _identify(self, request: Request, line: Line) -> dict[str, Any]:
        """Find out the style and the names of a line; returns its fields."""
        fields = _fields(line)
        openai = not {"body", "url", "method"}.isdisjoint(fields)
        request.style = Style.CHAT if openai else Style.SIMPLE  # so that an error of the rest has its shape
        for name in ("custom_id",) if openai else IDS:
            if fields.get(name) is not None:
                request.ids[name] = _id(name, fields[name])
        own = request.ids.get("custom_id")
        if own is not None:
            known = hash(own)
            if known in self._known:
                raise InputError(f"custom_id {shown(own)} is that of an earlier line, too")
            self._known.add(known)
        if openai:
            request.style = _endpoint(fields)
            if own is None:
                raise InputError("custom_id is missing")
        return fields

    def _read_simple(self, request: Request, fields: Mapping[str, Any]) -> None:
        names = ("prompt", "messages", *OPTIONS)
        if unknown := [name for name in fields if name not in (*names, *IDS)]:
            raise InputError(f"there is no option {shown(unknown[0])}; a line may have {', '.join((*IDS, *names))}")
        prompt, messages = fields.get("prompt"), fields.get("messages")
        if (prompt is None) == (messages is None):
            raise InputError("a line needs a prompt or messages, and not both")
        if messages is None:
            request.prompt = openai_format.prompt_of(prompt)
        else:
            request.messages = self._with_system(openai_format.list_of("messages", messages))
        given = openai_format.sampling(fields) | _logprobs(fields) | openai_tools.answer_form(fields)
        given |= {name: fields[name] for name in (*STRUCTURES, "strict") if fields.get(name) is not None}
        request.options = self._options(request.number, given)

    def _read_openai(self, request: Request, fields: Mapping[str, Any]) -> None:
        body = checked("body", fields.get("body"), Object(), InputError)
        if request.style is Style.CHAT:
            openai_format.refuse_unsupported(body)
            tools = openai_tools.chat_tools(body)
            given = openai_format.sampling(body) | openai_tools.answer_form(body)
            given |= tools.options | openai_tools.template_options(body)
            request.messages = self._with_system(openai_format.messages(body.get("messages")))
            given |= openai_format.chat_logprobs(body)
            request.options = self._options(request.number, given)
        else:
            openai_format.refuse_unsupported(body, but=["echo"])
            given = openai_format.sampling(body, empty=True) | openai_tools.answer_form(body)
            given |= completion_format.completion_logprobs(body)
            request.prompt = completion_format.only_prompt(body.get("prompt"))
            request.echo = openai_format.flag(body, "echo")
            options = request.options = self._options(request.number, given)
            options.setdefault("max_tokens", completion_format.default_tokens(request.echo))
            if request.echo and options.get("logprobs") is not None:
                options["prompt_logprobs"] = options["logprobs"]

    def _options(self, number: int, given: dict[str, Any]) -> dict[str, Any]:
        options = self._defaults | given
        if not given.keys().isdisjoint(STRUCTURES):  # they exclude each other
            options = {name: value for name, value in options.items() if name in given or name not in STRUCTURES}
        if "seed" in self._defaults and "seed" not in given:
            options["seed"] = (self._defaults["seed"] + number - 1) % SEEDS
        return options

    def _with_system(self, messages: list[Any]) -> list[Any]:
        roles = [each.get("role") for each in messages if isinstance(each, dict)]
        if not self._system or not messages or "system" in roles:
            return messages
        return [{"role": "system", "content": self._system}, *messages]


def _fields(line: Line) -> dict[str, Any]:
    """The object of JSON that a line is."""
    if line.data is None:
        raise InputError(f"the line has more than {LONGEST >> 20} MiB")
    return read_object(line.data, "the line")


def _endpoint(fields: Mapping[str, Any]) -> Style:
    method, url = fields.get("method", "POST"), fields.get("url")
    if method != "POST":
        raise InputError(f"method must be POST, not {shown(method)}")
    style = next((each for each in (Style.CHAT, Style.COMPLETION) if each.value == url), None)
    if style is None:
        raise InputError(f"url must be {Style.CHAT.value} or {Style.COMPLETION.value}, not {shown(url)}")
    return style


def _id(name: str, value: Any) -> str | int:
    if isinstance(value, int | float):
        return int(checked(name, value, Number(whole=True), InputError))
    return inlet.well_formed(checked(name, value, Text(), InputError), name)


def _logprobs(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Log probabilities as in Python, a number, or as in OpenAI's API, true and `top_logprobs`."""
    if isinstance(fields.get("logprobs"), bool | None):
        return openai_format.chat_logprobs(fields)
    if fields.get("top_logprobs") is not None:
        raise InputError("top_logprobs needs logprobs: true")
    return {"logprobs": fields["logprobs"]}
