"""Text to token ids and back, with the checkpoint's tokenizer and chat template.

Special tokens that the chat template writes become special tokens; the same characters inside a message stay plain
text, so that a message cannot forge a turn. In a raw prompt, special tokens are parsed (fill-in-the-middle needs that).
"""

import re
import secrets
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as FastTokenizer

from dsv2_local import inlet
from dsv2_local.errors import ContextLengthError, InputError, TemplateError
from dsv2_local.text import tokenizer_files
from dsv2_local.text.added_tokens import AddedTokens
from dsv2_local.text.answer_ids import AnswerIds
from dsv2_local.text.chat_template import ChatTemplates, Message
from dsv2_local.text.plain_text import PlainText
from dsv2_local.text.quoting import Composed, Own, Quoter
from dsv2_local.text.tokenizer_files import failures_of
from dsv2_local.values import shown

REASONING = ("reasoning_content", "thinking", "reasoning")
"""Names under which programs pass a message's reasoning; templates read the first two."""
INFILL = "<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"
"""DeepSeek-Coder's tokens around the text before a hole and the text after it; the model goes on with what belongs
there."""


class Tokenizer:
    """A checkpoint's `tokenizer.json` with the settings and chat templates of the files beside it.

    Attributes:
        special_tokens: the special tokens that have a name, by it (see `TokenizerFiles`).
        answers: the ids of answers by their text, which conversations are encoded with.
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
        self.answers = AnswerIds(
            self._tokenizer, frozenset(self._added.ids.values()), self._plain.encode, self._plain_later.encode
        )

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

    @property
    def chat_template(self) -> str | None:
        """The source of the default chat template; None if the checkpoint has none."""
        return self._templates.default

    @cached_property
    def _longest(self) -> int | None:
        """The most characters of a token; None if there is no such number, since a token stands for unknown text."""
        if getattr(self._tokenizer.model, "unk_token", None) is not None:
            return None
        return max(map(len, self._tokenizer.get_vocab()))  # a letter there is a character, or a byte of one

    def encode(self, text: str, *, bos: bool = True, context: int | None = None) -> list[int]:
        """Encode raw text. Special tokens in it are parsed, and BOS is prepended unless the text begins with it.

        Args:
            text: the text.
            bos: whether to prepend BOS, if the tokenizer's settings do not say otherwise.
            context: refuse text that is longer than any of so many tokens, before time is spent on it.

        Raises:
            InputError: the text is not Unicode.
            ContextLengthError: it cannot fit in the context.
        """
        if bos and not text.startswith(self._begin):
            text = self._begin + text
        return self._encode(text, context=context)

    def encode_infill(self, before: str, after: str) -> list[int]:
        """Encode two texts so that the model writes what belongs between them (fill in the middle).

        Special tokens in them stay text.

        Raises:
            InputError: a text is not Unicode, or the tokenizer has no tokens for this.
        """
        if missing := [token for token in INFILL if token not in self._added.ids]:
            raise InputError(f"this model does not fill in text: its tokenizer has no token {missing[0]}")
        quoter = Quoter(self._added.ids, ignore_case=self._added.normalizes)
        begin, hole, end = INFILL
        return self._encode(self._begin + begin + quoter.text(before) + hole + quoter.text(after) + end, quoter)

    def encode_chat(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = True,
        *,
        tools: Sequence[Any] | None = None,
        documents: Sequence[Any] | None = None,
        continue_final: bool = False,
        context: int | None = None,
    ) -> list[int]:
        """Encode a conversation with the chat template; what the model wrote, in the tokens that it wrote (`answers`).

        Args:
            messages: messages with `role` and `content`, and what else the template knows.
            add_generation_prompt: whether to end with the header of the assistant's next turn.
            tools: descriptions of functions that the model may call, as JSON schemas.
            documents: documents for the template, each with `title` and `text`.
            continue_final: whether to end with the content of the last message, so that it goes on, instead.
            context: as for `encode`.

        Raises:
            InputError: a message lacks a role or a content, or holds what is neither a value of JSON nor Unicode.
            TemplateError: the checkpoint has no chat template, or it rejects the messages.
            ContextLengthError: see `encode`.
        """
        quoter = Quoter(self._added.ids, ignore_case=self._added.normalizes)
        rendered = self._render(messages, add_generation_prompt, tools, documents, continue_final, quoter)
        return self._encode(rendered, quoter, self.answers, context)

    def render(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = True,
        *,
        tools: Sequence[Any] | None = None,
        documents: Sequence[Any] | None = None,
        continue_final: bool = False,
    ) -> str:
        """Render a conversation as text with the chat template; arguments and errors are those of `encode_chat`."""
        quoter = Quoter(self._added.ids)
        rendered = self._render(messages, add_generation_prompt, tools, documents, continue_final, quoter)
        return quoter.remove(rendered)

    @property
    def knows_tools(self) -> bool:
        """Whether the chat template writes the definitions of tools itself."""
        return self._templates.know_tools

    @cached_property
    def lead(self) -> str | None:
        """White space that the chat template writes between the header of the assistant's turn and its text; None if
        that cannot be told."""
        mark = f"{secrets.randbelow(10**24) + 10**24}"
        asked, answer = {"role": "user", "content": "a"}, {"role": "assistant", "content": mark}
        try:
            begun, whole = self.render([asked]), self.render([asked, answer], add_generation_prompt=False)
        except TemplateError:
            return None
        lead, found, _ = whole.removeprefix(begun).partition(mark)
        return lead if whole.startswith(begun) and found and not lead.strip() else None

    def added_token(self, text: str) -> int | None:
        """The id of the added token with this text; None if there is none."""
        return self._added.ids.get(text)

    def to_json(self) -> str:
        """The tokenizer as a tokenizer.json, with the added tokens and flags that the files beside it name."""
        with failures_of("tokenizer.json"):
            return self._tokenizer.to_str()

    def require_chat_template(self) -> None:
        """Check that the checkpoint has a chat template.

        Raises:
            TemplateError: it has none.
        """
        self._templates.require()

    def decode(self, ids: Sequence[int], *, special: bool = False) -> str:
        """Decode ids to text; bytes that are not UTF-8 become U+FFFD. `special`: with special tokens."""
        with failures_of("tokenizer.json"):
            return self._tokenizer.decode(ids, skip_special_tokens=not special)

    @property
    def _begin(self) -> str:
        """What raw text begins with."""
        return self.bos_token if self._add_bos else ""

    def _render(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool,
        tools: Sequence[Any] | None,
        documents: Sequence[Any] | None,
        continue_final: bool,
        quoter: Quoter,
    ) -> str:
        """The conversation as text in which the special tokens of messages are quoted."""
        messages, end = _sequence("messages", messages), ""
        if continue_final:
            end = f"{secrets.randbelow(10**24) + 10**24} "
            messages = [*messages[:-1], _ending_with(end, messages[-1])]
        variables: dict[str, Any] = self.special_tokens | {
            "messages": [_message(message, quoter) for message in messages],
            "tools": None if tools is None else quoter.data(_sequence("tools", tools)),
            "documents": None if documents is None else quoter.data(_sequence("documents", documents)),
        }
        add_generation_prompt = add_generation_prompt and not continue_final
        rendered = self._templates.render(quoter, add_generation_prompt=add_generation_prompt, **variables)
        return _cut(rendered, end) if continue_final else rendered

    def _encode(
        self,
        text: str,
        quoter: Quoter | None = None,
        answers: AnswerIds | None = None,
        context: int | None = None,
    ) -> list[int]:
        """Encode special tokens as their ids, and the text between them as plain text, with quotes removed."""
        ids: list[int] = []
        if context is not None and len(text) > context and self._longest:  # reads the whole vocabulary, once
            least = len(quoter.remove(text) if quoter else text) // self._longest
            if least > context:
                raise ContextLengthError(least, context, at_least=True)
        text = inlet.well_formed(text, "the prompt")
        with failures_of("tokenizer.json"):
            for part in self._added.split(text):
                if part.token is not None:
                    ids.append(part.token)
                    continue
                plain = quoter.remove(part.text) if quoter else part.text
                written = answers.find(plain, first=part.first) if answers else None
                ids += written or (self._plain if part.first else self._plain_later).encode(plain)
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


def _ending_with(end: str, message: Any) -> Any:
    """A message whose text ends with `end`. Raises InputError if it has no text."""
    content = message.get("content") if isinstance(message, Mapping) else None
    if isinstance(content, Composed):
        return {**message, "content": Composed((*content, Own(end)))}
    if isinstance(content, str):
        return {**message, "content": Composed((content, Own(end)))}
    if isinstance(content, list) and content and isinstance(content[-1], Mapping):
        text = content[-1].get("text")
        if isinstance(text, str):
            return {**message, "content": [*content[:-1], {**content[-1], "text": Composed((text, Own(end)))}]}
    raise InputError(f"a message without text cannot be continued: {shown(message)}")


def _cut(rendered: str, end: str) -> str:
    """What comes before `end`; without white space if the template has removed that of the message, as it seems."""
    place = rendered.rfind(end.strip())
    if place < 0:
        raise TemplateError("the chat template does not write the last message, so that it cannot be continued")
    return rendered[:place] if rendered.startswith(end, place) else rendered[:place].rstrip()


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
        isinstance(content, str | list | Composed) or (content is None and given.get("tool_calls"))
    ):
        raise InputError(f"a message needs a role and a content, both text: {shown(dict(message))}")
    data: dict[str, Any] = quoter.data(given)
    reasoning = next((data[name] for name in REASONING if name in data), None)
    return data if reasoning is None else {"thinking": reasoning, **data, "reasoning_content": reasoning}
