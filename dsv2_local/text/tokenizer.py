"""Text to token ids and back, with the checkpoint's own tokenizer and chat template.

Special tokens are control characters: those that the template writes are honoured, while the same letters inside a
message stay text. Raw prompts may contain them (fill-in-the-middle needs that).
"""

import json
import re
import secrets
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as FastTokenizer

from dsv2_local.errors import CheckpointError, InputError, TemplateError
from dsv2_local.text.chat_template import Message, render


class Tokenizer:
    """A checkpoint's `tokenizer.json`, `tokenizer_config.json` and template."""

    def __init__(self, directory: Path) -> None:
        """Raises CheckpointError when a file is missing or damaged."""
        path = directory / "tokenizer.json"
        try:
            text = path.read_text(encoding="utf-8")
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
        """The id of the end-of-sentence token, None where the files name none."""
        return self._added.get(self.eos_token)

    def encode(self, text: str) -> list[int]:
        """Ids of raw text. Special tokens in it are honoured; BOS is put in front unless it is there."""
        if self.bos_token and self._settings.get("add_bos_token", True) and not text.startswith(self.bos_token):
            text = self.bos_token + text
        return self._encode_pieces(text)

    def encode_chat(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> list[int]:
        """Ids of a conversation in the model's own format.

        Args:
            messages: each with `role` and `content`.
            add_generation_prompt: whether the next to speak is the assistant.

        Raises:
            InputError: a message is not of that form.
            TemplateError: there is no template, or it refuses the messages.
        """
        for message in messages:
            if not isinstance(message.get("role"), str) or not isinstance(message.get("content"), str):
                raise InputError(f"a message needs a role and a content, both text: {dict(message)!r}")
        mark = _unused_mark(messages)
        quoted = [{**message, "content": self._quote(message["content"], mark)} for message in messages]
        return self._encode_pieces(self.render(quoted, add_generation_prompt), mark)

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> str:
        """The conversation as the template writes it."""
        if not isinstance(self._template, str):
            raise TemplateError("this checkpoint has no chat template; use --raw, or generate() with plain text")
        special = {"bos_token": self.bos_token, "eos_token": self.eos_token}
        return render(self._template, messages, add_generation_prompt=add_generation_prompt, **special)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, without special tokens. Bytes that are not UTF-8 become U+FFFD."""
        return self._tokenizer.decode(ids, skip_special_tokens=True)

    @cached_property
    def _special(self) -> re.Pattern[str]:
        longest_first = sorted(self._added, key=len, reverse=True)
        return (
            re.compile("(" + "|".join(map(re.escape, longest_first)) + ")") if longest_first else re.compile("(?!)()")
        )

    def _quote(self, text: str, mark: str) -> str:
        """Put `mark` inside everything that looks like a special token, so that it no longer does."""
        return self._special.sub(lambda found: found[0][0] + mark + found[0][1:], text)

    def _encode_pieces(self, text: str, mark: str = "") -> list[int]:
        """Special tokens by their id, and what lies between them as plain text, without `mark`."""
        ids: list[int] = []
        for piece in self._special.split(text):
            if piece in self._added:
                ids.append(self._added[piece])
            elif piece:
                plain = piece.replace(mark, "") if mark else piece
                ids.extend(self._plain.encode(plain, add_special_tokens=False).ids)
        return ids


def _without_added_tokens(tokenizer: FastTokenizer) -> FastTokenizer:
    """The same tokenizer knowing no special tokens, for text that must stay text; both share one vocabulary."""
    plain = FastTokenizer(tokenizer.model)
    for part in ("normalizer", "pre_tokenizer"):
        if (value := getattr(tokenizer, part)) is not None:
            setattr(plain, part, value)
    return plain


def _read_settings(directory: Path) -> dict[str, Any]:
    path = directory / "tokenizer_config.json"
    settings: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    template = directory / "chat_template.jinja"  # where transformers 5 writes it
    if template.is_file():
        settings["chat_template"] = template.read_text(encoding="utf-8")
    return settings


def _token_text(value: Any) -> str:
    """A special token's text, from a string or an AddedToken's object; empty where there is none."""
    return str(value.get("content", "")) if isinstance(value, dict) else str(value or "")


def _unused_mark(messages: Sequence[Message]) -> str:
    """A string of private-use characters that is in no message."""
    while True:
        mark = f"\ue000{secrets.token_hex(8)}\ue001"
        if not any(mark in message["content"] for message in messages):
            return mark
