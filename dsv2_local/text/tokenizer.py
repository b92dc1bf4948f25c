"""Text to token ids and back, with the checkpoint's tokenizer and chat template.

Special tokens that the chat template writes become special tokens; the same characters inside a message stay plain
text, so that a message cannot forge a turn. In a raw prompt, special tokens are parsed (fill-in-the-middle needs that).
"""

import re
import secrets
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as FastTokenizer

from dsv2_local import inlet
from dsv2_local.errors import CheckpointError, InputError, TemplateError
from dsv2_local.model_files import read_object
from dsv2_local.text.chat_template import Message, render


class Tokenizer:
    """A checkpoint's `tokenizer.json` with the settings and chat template of its `tokenizer_config.json`."""

    def __init__(self, directory: Path) -> None:
        """Read the files in `directory`.

        Raises:
            CheckpointError: a file is missing or damaged.
        """
        path = directory / "tokenizer.json"
        try:
            text = inlet.decoded(path.read_bytes(), str(path))
            self._tokenizer = FastTokenizer.from_str(text)
            self._plain = _without_added_tokens(self._tokenizer)
            self._settings = _read_settings(directory)
        except FileNotFoundError:
            raise CheckpointError(f"{directory} has no tokenizer.json; copy it from the model's release") from None
        except Exception as error:  # tokenizers raises bare Exception
            raise CheckpointError(f"the tokenizer in {directory} cannot be read: {error}") from None
        self._added = {token.content: id for id, token in self._tokenizer.get_added_tokens_decoder().items()}
        self.bos_token = _token_text(self._settings.get("bos_token"))
        self.eos_token = _token_text(self._settings.get("eos_token"))
        self._template = self._settings.get("chat_template")

    @cached_property
    def eos_id(self) -> int | None:
        """Id of the end-of-sentence token; None if the checkpoint's files do not name one."""
        return self._added.get(self.eos_token)

    def encode(self, text: str) -> list[int]:
        """Encode raw text. Special tokens in it are parsed, and BOS is prepended unless the text begins with it.

        Raises:
            InputError: the text is not Unicode.
        """
        if self.bos_token and self._settings.get("add_bos_token", True) and not text.startswith(self.bos_token):
            text = self.bos_token + text
        return self._encode_pieces(text)

    def encode_chat(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> list[int]:
        """Encode a conversation with the chat template.

        Args:
            messages: messages with `role` and `content`.
            add_generation_prompt: whether to end with the header of the assistant's next turn.

        Raises:
            InputError: a message lacks a role or a content, or one is not Unicode text.
            TemplateError: the checkpoint has no chat template, or it rejects the messages.
        """
        for message in messages:
            if not isinstance(message.get("role"), str) or not isinstance(message.get("content"), str):
                raise InputError(f"a message needs a role and a content, both strings: {dict(message)!r}")
        named = [(message, f"the {message['role']} message") for message in messages]
        unicode = [{**message, "content": inlet.text(message["content"], name)} for message, name in named]
        mark = _unused_mark(unicode)
        quoted = [{**message, "content": self._quote(message["content"], mark)} for message in unicode]
        return self._encode_pieces(self.render(quoted, add_generation_prompt), mark)

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> str:
        """Render a conversation as text with the chat template."""
        template = self.require_chat_template()
        special = {"bos_token": self.bos_token, "eos_token": self.eos_token}
        return render(template, messages, add_generation_prompt=add_generation_prompt, **special)

    def require_chat_template(self) -> str:
        """Return the checkpoint's chat template.

        Raises:
            TemplateError: it has none.
        """
        if not isinstance(self._template, str):
            raise TemplateError(
                "this checkpoint has no chat template; `dsv2 run --raw` and LLM.generate() continue text without one"
            )
        return self._template

    def decode(self, ids: Sequence[int]) -> str:
        """Decode ids to text, without special tokens; bytes that are not UTF-8 become U+FFFD."""
        return self._tokenizer.decode(ids, skip_special_tokens=True)

    @cached_property
    def _special(self) -> re.Pattern[str]:
        longest_first = sorted(self._added, key=len, reverse=True)
        return (
            re.compile("(" + "|".join(map(re.escape, longest_first)) + ")") if longest_first else re.compile("(?!)()")
        )

    def _quote(self, text: str, mark: str) -> str:
        """Insert `mark` into every special token in `text`, so that it is not parsed as one."""
        return self._special.sub(lambda found: found[0][0] + mark + found[0][1:], text)

    def _encode_pieces(self, text: str, mark: str = "") -> list[int]:
        """Encode special tokens as their ids, and the text between them as plain text with `mark` removed."""
        ids: list[int] = []
        for piece in self._special.split(inlet.well_formed(text, "the prompt")):
            if piece in self._added:
                ids.append(self._added[piece])
            elif piece:
                plain = piece.replace(mark, "") if mark else piece
                ids.extend(self._plain.encode(plain, add_special_tokens=False).ids)
        return ids


def _without_added_tokens(tokenizer: FastTokenizer) -> FastTokenizer:
    """A tokenizer with the same vocabulary but no special tokens, for text that must stay plain text."""
    plain = FastTokenizer(tokenizer.model)
    for part in ("normalizer", "pre_tokenizer"):
        if (value := getattr(tokenizer, part)) is not None:
            setattr(plain, part, value)
    return plain


def _read_settings(directory: Path) -> dict[str, Any]:
    path = directory / "tokenizer_config.json"
    settings: dict[str, Any] = read_object(path, CheckpointError) or {}
    template = directory / "chat_template.jinja"  # where transformers 5 writes it
    if template.is_file():
        settings["chat_template"] = inlet.decoded(template.read_bytes(), str(template))
    return settings


def _token_text(value: Any) -> str:
    """The text of a special token, given as a string or as a serialised AddedToken; empty if there is none."""
    return str(value.get("content", "")) if isinstance(value, dict) else str(value or "")


def _unused_mark(messages: Sequence[Message]) -> str:
    """A random string, between private-use characters, that occurs in no message."""
    while True:
        mark = f"\ue000{secrets.token_hex(8)}\ue001"
        if not any(mark in message["content"] for message in messages):
            return mark
