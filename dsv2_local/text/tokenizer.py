"""Text to token ids and back, with the checkpoint's tokenizer and chat template.

Special tokens that the chat template writes become special tokens; the same characters inside a message stay plain
text, so that a message cannot forge a turn. In a raw prompt, special tokens are parsed (fill-in-the-middle needs that).
"""

import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as FastTokenizer

from dsv2_local import inlet
from dsv2_local.errors import InputError
from dsv2_local.text import tokenizer_files
from dsv2_local.text.added_tokens import AddedTokens
from dsv2_local.text.chat_template import ChatTemplates, Message
from dsv2_local.text.plain_text import PlainText
from dsv2_local.text.quoting import Quoter
from dsv2_local.text.tokenizer_files import failures_of
from dsv2_local.values import shown

REASONING = ("reasoning_content", "thinking", "reasoning")
"""Names under which programs pass a message's reasoning; templates read the first two."""


class Tokenizer:
    """A checkpoint's `tokenizer.json` with the settings and chat templates of the files beside it.

    Attributes:
        special_tokens: the special tokens that have a name, by it (see `TokenizerFiles`).
    """

    def __init__(self, directory: Path) -> None:
        """Read the files in `directory`.

        Raises:
            CheckpointError: a file is missing or damaged, or names a token that the tokenizer lacks.
        """
        files = tokenizer_files.read(directory)
        self._tokenizer, self.special_tokens, self._add_bos = files.tokenizer, files.special_tokens, files.add_bos
        self._templates = ChatTemplates(files.templates)
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
        with failures_of("tokenizer.json"):
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
        return self._templates.render(quoter, add_generation_prompt=add_generation_prompt, **variables)

    def _encode(self, text: str, quoter: Quoter | None = None) -> list[int]:
        """Encode special tokens as their ids, and the text between them as plain text, with quotes removed."""
        ids: list[int] = []
        text = inlet.well_formed(text, "the prompt")
        with failures_of("tokenizer.json"):
            for part in self._added.split(text):
                if part.token is not None:
                    ids.append(part.token)
                    continue
                plain = self._plain if part.first else self._plain_later
                ids += plain.encode(quoter.remove(part.text) if quoter else part.text)
        return ids


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
