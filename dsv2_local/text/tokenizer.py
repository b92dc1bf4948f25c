"""Text to token ids and back, with the checkpoint's tokenizer and chat template.

Special tokens that the chat template writes become special tokens; the same characters inside a message stay plain
text, so that a message cannot forge a turn. In a raw prompt, special tokens are parsed (fill-in-the-middle needs that).
"""

import base64
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as FastTokenizer

from dsv2_local import inlet
from dsv2_local.errors import CheckpointError, Dsv2Error, InputError
from dsv2_local.model_files import parse_object, read_object, read_text
from dsv2_local.text.added_tokens import AddedTokens
from dsv2_local.text.chat_template import ChatTemplates, Message
from dsv2_local.text.plain_text import PlainText
from dsv2_local.text.quoting import Quoter
from dsv2_local.values import Fields, Flag, Object, Text, shown

NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""The special tokens that have a role; chat templates know them by these names."""
MAX_GROWTH = 1000
"""How many times as long as a text its normalised form may be."""
FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
REASONING = ("reasoning_content", "thinking", "reasoning")
"""Names under which programs pass a message's reasoning; templates read the first two."""


class Tokenizer:
    """A checkpoint's `tokenizer.json` with the settings and chat templates of the files beside it.

    Attributes:
        special_tokens: the special tokens that have a role, by its name (`NAMED`).
    """

    def __init__(self, directory: Path) -> None:
        """Read the files in `directory`.

        Raises:
            CheckpointError: a file is missing or damaged, or names a token that the tokenizer lacks.
        """
        settings = _read(directory / "tokenizer_config.json")
        self._tokenizer = _load(directory / "tokenizer.json")
        named = _named_tokens(directory, settings)
        _add(self._tokenizer, directory, settings, named)
        self.special_tokens = {name: token.content for name, token in named.items()}
        self._add_bos = settings.get("add_bos_token", Flag()) is not False
        self._templates = ChatTemplates(_templates(directory, settings))
        self._added = AddedTokens(self._tokenizer)
        plain = _without_added_tokens(self._tokenizer)
        later = _not_at_the_beginning(plain)
        self._plain = PlainText(plain)
        self._plain_later = self._plain if later is plain else PlainText(later)

    @property
    def bos_token(self) -> str:
        """The beginning-of-sentence token; empty if there is none."""
        return self.special_tokens.get("bos_token", "")

    @property
    def eos_token(self) -> str:
        """The end-of-sentence token; empty if there is none."""
        return self.special_tokens.get("eos_token", "")

    @cached_property
    def eos_id(self) -> int | None:
        """Id of the end-of-sentence token; None if the checkpoint's files do not name one."""
        return self._added.ids.get(self.eos_token)

    def encode(self, text: str) -> list[int]:
        """Encode raw text. Special tokens in it are parsed, and BOS is prepended unless the text begins with it.

        Raises:
            InputError: the text is not Unicode.
        """
        if self.bos_token and self._add_bos and not text.startswith(self.bos_token):
            text = self.bos_token + text
        return self._encode(text)

    def encode_chat(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = True,
        *,
        tools: Sequence[Any] | None = None,
        documents: Sequence[Any] | None = None,
    ) -> list[int]:
        """Encode a conversation with the chat template.

        Args:
            messages: messages with `role` and `content`, and what else the template knows.
            add_generation_prompt: whether to end with the header of the assistant's next turn.
            tools: descriptions of functions that the model may call, as JSON schemas.
            documents: documents for the template, each with `title` and `text`.

        Raises:
            InputError: a message lacks a role or a content, or holds what is neither a value of JSON nor Unicode.
            TemplateError: the checkpoint has no chat template, or it rejects the messages.
        """
        quoter = Quoter(self._added.ids, ignore_case=self._added.normalizes)
        return self._encode(self._render(messages, add_generation_prompt, tools, documents, quoter), quoter)

    def render(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = True,
        *,
        tools: Sequence[Any] | None = None,
        documents: Sequence[Any] | None = None,
    ) -> str:
        """Render a conversation as text with the chat template; arguments and errors are those of `encode_chat`."""
        quoter = Quoter(self._added.ids)
        return quoter.remove(self._render(messages, add_generation_prompt, tools, documents, quoter))

    def require_chat_template(self) -> None:
        """Check that the checkpoint has a chat template.

        Raises:
            TemplateError: it has none.
        """
        self._templates.require()

    def decode(self, ids: Sequence[int]) -> str:
        """Decode ids to text, without special tokens; bytes that are not UTF-8 become U+FFFD."""
        with _failures_of("tokenizer.json"):
            return self._tokenizer.decode(ids, skip_special_tokens=True)

    def _render(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool,
        tools: Sequence[Any] | None,
        documents: Sequence[Any] | None,
        quoter: Quoter,
    ) -> str:
        """The conversation as text in which the special tokens of messages are quoted."""
        variables: dict[str, Any] = self.special_tokens | {
            "messages": [_message(message, quoter) for message in _sequence("messages", messages)],
            "tools": None if tools is None else quoter.data(_sequence("tools", tools)),
            "documents": None if documents is None else quoter.data(_sequence("documents", documents)),
        }
        return self._templates.render(quoter.size, add_generation_prompt=add_generation_prompt, **variables)

    def _encode(self, text: str, quoter: Quoter | None = None) -> list[int]:
        """Encode special tokens as their ids, and the text between them as plain text, with quotes removed."""
        ids: list[int] = []
        text = inlet.well_formed(text, "the prompt")
        with _failures_of("tokenizer.json"):
            for part in self._added.split(text):
                if part.token is not None:
                    ids.append(part.token)
                    continue
                plain = self._plain if part.first else self._plain_later
                ids += plain.encode(quoter.remove(part.text) if quoter else part.text)
        return ids


def _read(path: Path) -> Fields:
    """The settings in a JSON file; none if there is no such file."""
    return Fields(read_object(path, CheckpointError) or {}, str(path), CheckpointError)


def _load(path: Path) -> FastTokenizer:
    """The tokenizer in a tokenizer.json.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    text = read_text(path, CheckpointError)
    if text is None:
        raise CheckpointError(f"{path.parent} has no tokenizer.json; copy it from the model's release")
    _check_normalizer(parse_object(text, str(path), CheckpointError).get("normalizer"), str(path))
    with _failures_of(str(path)):
        tokenizer = FastTokenizer.from_str(text)
        tokenizer.decode(tokenizer.encode("A test, 1.").ids)
    return tokenizer


def _check_normalizer(value: Any, where: str) -> float:
    """How much longer the normaliser can make a text, at most.

    Raises:
        CheckpointError: the tokenizers library would end the process with it, or use all memory.
    """
    if isinstance(value, list):
        return prod(_check_normalizer(part, where) for part in value)
    if not isinstance(value, dict):
        return 1.0
    growth = 1.0
    if value.get("type") == "Precompiled":
        try:
            table = base64.b64decode(value.get("precompiled_charsmap") or "", validate=True)
        except (ValueError, TypeError):
            table = b""
        if len(table) < 8 or int.from_bytes(table[:4], "little") > len(table) - 4:
            raise CheckpointError(f"{where} is damaged: its normaliser's precompiled_charsmap is cut off")
    elif value.get("type") == "Replace":
        pattern, content = value.get("pattern"), value.get("content")
        if isinstance(pattern, dict) and pattern.get("String") == "":
            raise CheckpointError(f"{where} is damaged: its normaliser replaces an empty string")
        growth = float(max(1, len(content) if isinstance(content, str) else 1))
    growth *= prod(_check_normalizer(part, where) for part in value.values() if isinstance(part, dict | list))
    if growth > MAX_GROWTH:
        raise CheckpointError(f"{where} is refused: its normaliser makes text more than {MAX_GROWTH:,} times as long")
    return growth


@contextmanager
def _failures_of(where: str) -> Iterator[None]:
    """Turn what the tokenizers library raises (Exception and, after a panic, BaseException) into CheckpointError."""
    try:
        yield
    except (Dsv2Error, KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError):
        raise
    except BaseException as error:
        raise CheckpointError(f"{where} cannot be used: {error}; copy it from the model's release again") from None


def _named_tokens(directory: Path, settings: Fields) -> dict[str, AddedToken]:
    """The special tokens that have a role, from tokenizer_config.json and special_tokens_map.json.

    As in transformers, the latter wins unless the former lists all added tokens (as files of newer versions do).
    """
    older = _read(directory / "special_tokens_map.json")
    sources = [settings, older] if settings.raw.get("added_tokens_decoder") is not None else [older, settings]
    named = {}
    for name in NAMED:
        found = (_token(source, name) for source in sources if source.raw.get(name) is not None)
        if token := next(found, None):
            named[name] = token
    return named


def _token(source: Fields, name: str) -> AddedToken | None:
    """A special token, given as text or as an object with its flags; None if it is null or empty."""
    value = source.raw[name]
    if isinstance(value, dict):
        return _with_flags(Fields(value, f"{source.where}: {name}", CheckpointError))
    text = source.get(name, Text())
    return AddedToken(text, special=True, normalized=False) if text else None


def _with_flags(source: Fields, special: bool | None = True) -> AddedToken | None:
    """A token given as an object with its flags; `special`: what it is in any case, or None."""
    content = source.get("content", Text())
    flags = {name: flag for name in FLAGS if (flag := source.get(name, Flag())) is not None}
    if special is not None:
        flags["special"] = special
    return AddedToken(content, **flags) if content else None


def _add(tokenizer: FastTokenizer, directory: Path, settings: Fields, named: dict[str, AddedToken]) -> None:
    """Add what tokenizer.json lacks: the flags that tokenizer_config.json gives to added tokens, and special tokens.

    Raises:
        CheckpointError: the first or the last token of a text, BOS or EOS, is none that the tokenizer knows.
    """
    listed = settings.get("added_tokens_decoder", Object()) or {}
    tokens: list[AddedToken] = []
    for id in sorted(listed, key=lambda id: int(id) if id.isdecimal() else 0):
        where = f"{settings.where}: added_tokens_decoder {shown(id)}"
        entry = Fields(settings.read(f"added_tokens_decoder {shown(id)}", listed[id], Object()), where, CheckpointError)
        if token := _with_flags(entry, None):
            tokens.append(token)
    with _failures_of(str(directory / "tokenizer.json")):
        known = {token.content: token for token in tokenizer.get_added_tokens_decoder().values()}
        tokenizer.add_tokens([token for token in tokens if repr(token) != repr(known.get(token.content))])
        known |= {token.content: token for token in tokens}
        for name, token in [*named.items(), *(("", token) for token in _further_tokens(directory, settings))]:
            if token.content in known:
                continue
            if tokenizer.token_to_id(token.content) is not None:
                tokenizer.add_tokens([token])
            elif name in ("bos_token", "eos_token"):
                raise CheckpointError(
                    f"{directory}: {name} {shown(token.content)} is no token of tokenizer.json; copy the tokenizer's "
                    "files from one release"
                )


def _further_tokens(directory: Path, settings: Fields) -> Iterator[AddedToken]:
    """Special tokens without a role."""
    for source in (settings, _read(directory / "special_tokens_map.json")):
        for name in ("additional_special_tokens", "extra_special_tokens"):
            listed = source.raw.get(name)
            for entry in listed if isinstance(listed, list) else []:
                if token := _token(Fields({name: entry}, source.where, CheckpointError), name):
                    yield token


def _templates(directory: Path, settings: Fields) -> dict[str, str]:
    """The chat templates by their names: from chat_template.jinja, where transformers 5 writes it, or the settings.

    Raises:
        CheckpointError: they are neither text nor a list of names and texts.
    """
    own = read_text(directory / "chat_template.jinja", CheckpointError)
    others = sorted((directory / "additional_chat_templates").glob("*.jinja"))
    if own is not None or others:
        named = {path.stem: read_text(path, CheckpointError) for path in others}
        return {name: text for name, text in {**named, "default": own}.items() if text is not None}
    value = settings.raw.get("chat_template")
    if not isinstance(value, list):
        text = settings.get("chat_template", Text())
        return {} if text is None else {"default": text}
    entries = [
        Fields(settings.read("chat_template", entry, Object()), settings.where, CheckpointError) for entry in value
    ]
    pairs = [(entry.get("name", Text()), entry.get("template", Text())) for entry in entries]
    if any(name is None or text is None for name, text in pairs):
        raise CheckpointError(f"{settings.where}: each entry of chat_template needs a name and a template")
    return dict(pairs)


def _without_added_tokens(tokenizer: FastTokenizer) -> FastTokenizer:
    """A tokenizer with the same vocabulary for normalised text that must stay plain text."""
    plain = FastTokenizer(tokenizer.model)
    if tokenizer.pre_tokenizer is not None:
        plain.pre_tokenizer = tokenizer.pre_tokenizer
    return plain


def _not_at_the_beginning(plain: FastTokenizer) -> FastTokenizer:
    """`plain` for text that is not the first: the same, unless it puts a space before the first text alone."""
    if plain.pre_tokenizer is None:
        return plain
    state = plain.pre_tokenizer.__getstate__().decode()
    changed = re.sub(r'("prepend_scheme":\s*)"first"', r'\1"never"', state)
    if changed == state:
        return plain
    later = FastTokenizer(plain.model)
    later.pre_tokenizer = FastTokenizer.from_str(f'{{"model": {_NO_MODEL}, "pre_tokenizer": {changed}}}').pre_tokenizer
    return later


_NO_MODEL = '{"type": "BPE", "vocab": {}, "merges": []}'


def _sequence(name: str, given: Any) -> Sequence[Any]:
    if not isinstance(given, Sequence) or isinstance(given, str | bytes):
        raise InputError(f"{name} must be a list, not {shown(given)}")
    return given


def _message(message: Any, quoter: Quoter) -> dict[str, Any]:
    """A message for the template: quoted, without what is None, its reasoning under the names that templates read.

    Raises:
        InputError: it lacks a role or a content, or holds what is no value of JSON.
    """
    if not isinstance(message, Mapping):
        raise InputError(f"a message must be an object with a role and a content, not {shown(message)}")
    given = {key: value for key, value in message.items() if value is not None}
    content = given.get("content")
    if not isinstance(given.get("role"), str) or not (
        isinstance(content, str | list) or (content is None and given.get("tool_calls"))
    ):
        raise InputError(f"a message needs a role and a content, both text: {shown(dict(message))}")
    data: dict[str, Any] = quoter.data(given)
    reasoning = next((data[name] for name in REASONING if name in data), None)
    return data if reasoning is None else {"thinking": reasoning, **data, "reasoning_content": reasoning}
