"""Reads the files of a tokenizer: tokenizer.json, and what the files beside it say of special tokens and templates.

Whatever they contain, the result is a tokenizer or a typed error: the tokenizers library itself may raise what is no
`Exception`, end the process or use all memory.
"""

import base64
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as FastTokenizer

from dsv2_local.errors import CheckpointError, Dsv2Error
from dsv2_local.model_files import parse_object, read_object, read_text
from dsv2_local.values import Fields, Flag, Object, Text, shown

NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""The special tokens that have a role; chat templates know them by these names."""
FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
MAX_GROWTH = 1000
"""How many times as long as a text its normalised form may be."""


@dataclass(frozen=True)
class TokenizerFiles:
    """What the files say.

    Attributes:
        tokenizer: the tokenizer with all its added tokens.
        special_tokens: the special tokens that have a name, by it: a role (`NAMED`), or another that templates know.
        add_bos: whether raw text begins with BOS.
        templates: the chat templates by their names.
    """

    tokenizer: FastTokenizer
    special_tokens: dict[str, str]
    add_bos: bool
    templates: dict[str, str]


def read(directory: Path) -> TokenizerFiles:
    """Read the files in `directory`.

    Raises:
        CheckpointError: a file is missing or damaged, has an impossible value, or names a BOS or EOS token that the
            tokenizer lacks.
    """
    settings, older = _read(directory / "tokenizer_config.json"), _read(directory / "special_tokens_map.json")
    tokenizer = _load(directory / "tokenizer.json")
    named, further = _named_tokens(settings, older), [*_further_tokens(settings), *_further_tokens(older)]
    with failures_of(str(directory / "tokenizer.json")):
        _add_flagged(tokenizer, settings)
        _add_special(tokenizer, [*(token for token, _ in named.values()), *(token for _, token in further)])
        for name in ("bos_token", "eos_token"):
            if name in named and tokenizer.token_to_id((token := named[name])[0].content) is None:
                raise CheckpointError(
                    f"{token[1]}: {name} {shown(token[0].content)} is no token of tokenizer.json; copy the tokenizer's "
                    "files from one release"
                )
    return TokenizerFiles(
        tokenizer,
        {name: token.content for name, token in further if name}
        | {name: token.content for name, (token, _) in named.items()},
        settings.get("add_bos_token", Flag()) is not False,
        _templates(directory, settings),
    )


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
    with failures_of(str(path)):
        tokenizer = FastTokenizer.from_str(text)
        tokenizer.decode(tokenizer.encode("A test, 1.", add_special_tokens=False).ids)
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
def failures_of(where: str) -> Iterator[None]:
    """Turn what the tokenizers library raises (Exception and, after a panic, BaseException) into CheckpointError."""
    try:
        yield
    except (Dsv2Error, KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError):
        raise
    except BaseException as error:
        raise CheckpointError(f"{where} cannot be used: {error}; copy it from the model's release again") from None


def _named_tokens(settings: Fields, older: Fields) -> dict[str, tuple[AddedToken, str]]:
    """The special tokens that have a role, each with the file that names it.

    As in transformers, special_tokens_map.json (`older`) wins unless tokenizer_config.json (`settings`) lists all added
    tokens, as files of newer versions do.
    """
    sources = [settings, older] if settings.raw.get("added_tokens_decoder") is not None else [older, settings]
    named = {}
    for name in NAMED:
        for source in sources:
            if name in source.raw:
                if token := _token(source, name, source.raw[name]):
                    named[name] = (token, source.where)
                break
    return named


def _token(source: Fields, name: str, value: Any) -> AddedToken | None:
    """A special token, given as text or as an object with its flags; None if it is null or empty."""
    if isinstance(value, dict):
        return _with_flags(Fields(value, f"{source.where}: {name}", CheckpointError), special=True)
    text = None if value is None else source.read(name, value, Text())
    return AddedToken(text, special=True, normalized=False) if text else None


def _with_flags(source: Fields, **known: bool) -> AddedToken | None:
    """A token given as an object with its flags; `known` are those that it has in any case."""
    content = source.get("content", Text())
    flags = {name: flag for name in FLAGS if (flag := source.get(name, Flag())) is not None}
    return AddedToken(content, **{**flags, **known}) if content else None


def _further_tokens(source: Fields) -> Iterator[tuple[str, AddedToken]]:
    """Special tokens without a role, each with its name: those of a list have none, those of an object its keys.

    As in transformers, what is called `image_token` or otherwise so is one, too.
    """
    named = {name: value for name, value in source.raw.items() if name.endswith("_token") and name not in NAMED}
    entries = [(name, name, value) for name, value in named.items() if isinstance(value, str | dict)]
    for key in ("additional_special_tokens", "extra_special_tokens"):
        listed = source.raw.get(key)
        if isinstance(listed, list):
            entries += [(key, "", value) for value in listed]
        else:
            entries += [(key, name, value) for name, value in (source.get(key, Object()) or {}).items()]
    for key, name, value in entries:
        if token := _token(source, key, value):
            yield name, token


def _add_flagged(tokenizer: FastTokenizer, settings: Fields) -> None:
    """Give added tokens the flags that tokenizer_config.json has for them."""
    listed, tokens = settings.get("added_tokens_decoder", Object()) or {}, []
    for id in sorted(listed, key=lambda id: (len(id), id)):  # in the order of the numbers
        name = f"added_tokens_decoder {shown(id)}"
        entry = Fields(settings.read(name, listed[id], Object()), f"{settings.where}: {name}", CheckpointError)
        if token := _with_flags(entry):
            tokens.append(token)
    known = {token.content: repr(token) for token in tokenizer.get_added_tokens_decoder().values()}
    tokenizer.add_tokens([token for token in tokens if repr(token) != known.get(token.content)])


def _add_special(tokenizer: FastTokenizer, tokens: Iterable[AddedToken]) -> None:
    """Make special tokens of those in the vocabulary that are no added tokens yet."""
    known = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    missing = (token for token in tokens if token.content not in known)
    tokenizer.add_tokens([token for token in missing if tokenizer.token_to_id(token.content) is not None])


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
