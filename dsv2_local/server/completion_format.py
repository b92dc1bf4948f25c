"""Requests and answers in the shapes of OpenAI's /v1/completions."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dsv2_local.errors import InputError
from dsv2_local.server.openai_format import (
    MOST_LOGPROBS,
    OPTION_SCHEMAS,
    answer,
    finite,
    prompt_of,
    token_chunks,
    token_text,
    usage,
)
from dsv2_local.server.openai_tools import TOOL_SCHEMAS
from dsv2_local.text.detokenizer import Detokenizer
from dsv2_local.values import Number, TokenIds, checked

if TYPE_CHECKING:
    from dsv2_local.chunk import Chunk
    from dsv2_local.generation import Generation
    from dsv2_local.llm import LLM
    from dsv2_local.runtime.prompt_logprobs import TokenLogprob

MOST_PROMPTS = 1024
"""Prompts of one request."""
_IDS = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
_PROMPT = {"anyOf": [{"type": "string"}, _IDS]}
SCHEMA: dict[str, Any] = {
    "type": "object", "required": ["prompt"],
    "properties": {
        "model": {"type": "string"},
        "prompt": {
            "anyOf": [*_PROMPT["anyOf"], {"type": "array", "items": _PROMPT, "minItems": 1, "maxItems": MOST_PROMPTS}]
        },
        **OPTION_SCHEMAS, "echo": {"type": "boolean"}, "suffix": {"type": "string"},
        "best_of": {"type": "integer", "minimum": 1},
        "logprobs": {"type": "integer", "minimum": 0, "maximum": MOST_LOGPROBS},
        **{name: TOOL_SCHEMAS[name] for name in ("response_format", "structured_outputs", "grammar", "regex")},
    },
}  # fmt: skip


def default_tokens(echo: bool) -> int:
    """`max_tokens` if it is not given."""
    return 0 if echo else 16


def completion_logprobs(body: Mapping[str, Any]) -> dict[str, Any]:
    """The option `logprobs` of `LLM.generate`, which is a number in /v1/completions too."""
    asked = body.get("logprobs")
    if asked is None:
        return {}
    return {"logprobs": checked("logprobs", asked, Number(0, MOST_LOGPROBS, whole=True), InputError)}


def prompts_of(value: Any) -> list[str | list[int]]:
    """The prompts of a request: one or several, each text or token ids. Raises InputError if they are none of these."""
    if not isinstance(value, list) or not value or not isinstance(value[0], str | list):
        return [prompt_of(value)]
    if len(value) > MOST_PROMPTS:
        raise InputError(f"there are {len(value):,} prompts; a request may have {MOST_PROMPTS:,}")
    return [prompt_of(each) for each in value]


def only_prompt(value: Any) -> str | list[int]:
    """The prompt of a request that may have but one. Raises InputError if there are several."""
    prompts = prompts_of(value)
    if len(prompts) > 1:
        raise InputError(f"there are {len(prompts):,} prompts; write a line for each")
    return prompts[0]


@dataclass(frozen=True)
class Prompt:
    """A prompt as token ids and as the text that `echo` repeats."""

    ids: Sequence[int]
    text: str

    @classmethod
    def of(cls, llm: "LLM", given: str | list[int]) -> "Prompt":
        """A prompt that is given as text, before which BOS is put, or as token ids, which are used as they are.

        Raises:
            InputError: a token is outside the vocabulary.
        """
        if isinstance(given, str):
            return cls(llm.tokenizer.encode(given), given)
        ids = list(checked("prompt", given, TokenIds(llm.config.vocab_size), InputError))
        return cls(ids, llm.tokenizer.decode(ids))


class Logprobs:
    """The objects `logprobs` of one choice: of the prompt if it is repeated, then of the answer, whole or in pieces."""

    def __init__(self, llm: "LLM") -> None:
        self._llm, self._offset = llm, 0
        self._texts = dict[int, str]()  # by token: decoding takes longer than all else here
        self._detokenizer = Detokenizer(llm.tokenizer)

    def of_prompt(self, prompt: Prompt, entries: "Iterable[TokenLogprob | None]") -> dict[str, Any]:
        """Those of the tokens of the prompt; the first one has no log probability."""
        rows = [
            (token, entry and entry.logprob, entry and entry.top_logprobs)
            for token, entry in zip(prompt.ids, entries, strict=True)
        ]
        found = self._lists(rows)
        self._offset, self._detokenizer = len(prompt.text), Detokenizer(self._llm.tokenizer)
        return found

    def of_answer(self, chunks: "Iterable[Chunk]") -> dict[str, Any]:
        """Those of the next tokens of the answer."""
        return self._lists([(each.token_id, each.logprob, each.top_logprobs) for each in token_chunks(chunks)])

    def _lists(self, rows: Iterable[tuple[Any, float | None, Any]]) -> dict[str, Any]:
        found: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for token, logprob, top in rows:
            text = self._text(token)
            found["tokens"].append(text)
            found["token_logprobs"].append(None if logprob is None else finite(logprob))
            found["top_logprobs"].append(None if logprob is None else self._by_text(text, logprob, top))
            found["text_offset"].append(self._offset)
            self._offset += len(self._detokenizer.push(token))
        return found

    def _text(self, token: int) -> str:
        text = self._texts.get(token)
        if text is None:
            text = self._texts[token] = token_text(self._llm, token)
        return text

    def _by_text(self, text: str, logprob: float, top: Iterable[tuple[int, float]]) -> dict[str, float]:
        """The most likely tokens and the one that is there. If two have the same text, the more likely one counts."""
        found: dict[str, float] = {}
        for token, value in top:  # the most likely first
            found.setdefault(self._text(token), finite(value))
        found[text] = max(found.get(text, finite(logprob)), finite(logprob))
        return found


def merged_logprobs(first: dict[str, list[Any]], second: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """The log probabilities of two parts of a choice as one object."""
    return {name: values + second[name] for name, values in first.items()}


def completion_choice(
    llm: "LLM",
    generation: "Generation",
    chunks: "Iterable[Chunk]",
    index: int,
    *,
    logprobs: bool,
    echo: Prompt | None = None,
    entries: "Iterable[TokenLogprob | None]" = (),
) -> dict[str, Any]:
    """One of the `choices`.

    Args:
        llm: the model.
        generation: the answer.
        chunks: those of the answer.
        index: the number of the choice.
        logprobs: whether log probabilities are asked for.
        echo: the prompt, if it is to be repeated.
        entries: the log probabilities of its tokens, if these are asked for.
    """
    found = None
    if logprobs:
        parts = Logprobs(llm)
        before = parts.of_prompt(echo, entries) if echo else None
        found = parts.of_answer(chunks)
        found = merged_logprobs(before, found) if before else found
    return {
        "index": index, "text": (echo.text if echo else "") + generation.text, "logprobs": found,
        "finish_reason": generation.stats.finish_reason,
    }  # fmt: skip


def text_completion(
    llm: "LLM", generation: "Generation", id: str, *, logprobs: bool, echo: Prompt | None
) -> dict[str, Any]:
    """An answer of one choice."""
    choice = completion_choice(
        llm, generation, generation.chunks, 0, logprobs=logprobs, echo=echo, entries=generation.prompt_logprobs
    )
    return answer(llm, f"cmpl-{id}", "text_completion", [choice], usage(generation))
