"""Requests and answers in the shapes of OpenAI's API: bodies of /v1/chat/completions and /v1/completions.

Unknown fields are ignored, as servers do. Fields that would change the answer and are not supported are refused.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from dsv2_local import inlet
from dsv2_local.errors import ContextLengthError, Dsv2Error, InputError, TemplateError
from dsv2_local.runtime.sampling_params import VALUES
from dsv2_local.values import Flag, Number, Text, checked, shown

if TYPE_CHECKING:
    from dsv2_local.generation import Chunk, Generation
    from dsv2_local.llm import LLM

COMPLETION_TOKENS = 16
"""`max_tokens` of /v1/completions if it is not given."""
MOST_LOGPROBS = 20
CREATED = 0
"""The time of every answer: the real one would make equal runs differ, and clients need the field."""
NO_PROBABILITY = -9999.0
"""The logarithm of 0, which JSON lacks."""
_SINGLE = ("n", "best_of")
_OFF: dict[str, tuple[Any, ...]] = {"echo": (False,), "suffix": ("",), "tools": ([],), "functions": ([],)}
_IMPOSSIBLE = "image_url", "input_audio", "file"


def refuse_unsupported(body: Mapping[str, Any]) -> None:
    """Refuse what is not supported, and would be missed.

    Raises:
        InputError: the body asks for several answers, a format, tools, or its own prompt back.
    """
    for name in _SINGLE:
        if body.get(name) is not None and checked(name, body[name], Number(1, whole=True), InputError) > 1:
            raise InputError(f"{name} must be 1; write a line for every answer")
    for name, off in _OFF.items():
        unused = name in ("tools", "functions") and body.get("tool_choice", body.get("function_call")) == "none"
        if not unused and body.get(name) is not None and body[name] not in off:
            raise InputError(f"{name} is not supported")
    wanted = body.get("response_format")
    if wanted is not None and not (isinstance(wanted, dict) and wanted.get("type") == "text"):
        raise InputError(f"response_format {shown(wanted)} is not supported, only text")


def sampling(body: Mapping[str, Any]) -> dict[str, Any]:
    """The options of `LLM.generate` in a body, without log probabilities; null is as good as missing."""
    given = {name: body[name] for name in (*VALUES, "stop") if body.get(name) is not None}
    for name in ("max_tokens", "max_completion_tokens"):  # the second, newer one wins
        if body.get(name) is not None:
            given["max_tokens"] = checked(name, body[name], Number(whole=True), InputError)
    if (bias := body.get("logit_bias")) is not None:
        given["logit_bias"] = _logit_bias(bias)
    return given


def _logit_bias(bias: Any) -> dict[int, Any]:
    """Biases by token id, which is text in JSON."""
    if not isinstance(bias, dict):
        raise InputError(f"logit_bias must map token ids to numbers, not be {shown(bias)}")
    if wrong := [token for token in bias if not (token.isascii() and token.isdecimal() and len(token) < 10)]:
        raise InputError(f"logit_bias must map token ids to numbers; {shown(wrong[0])} is no token id")
    return {int(token): value for token, value in bias.items()}


def chat_logprobs(body: Mapping[str, Any]) -> dict[str, Any]:
    """The option `logprobs` of `LLM.generate`, of `logprobs: true` and `top_logprobs`."""
    asked, top = body.get("logprobs"), body.get("top_logprobs")
    wanted = asked is not None and checked("logprobs", asked, Flag(), InputError)
    if top is not None and not wanted:
        raise InputError("top_logprobs needs logprobs: true")
    if not wanted:
        return {} if asked is None else {"logprobs": None}
    return {"logprobs": checked("top_logprobs", top or 0, Number(0, MOST_LOGPROBS, whole=True), InputError)}


def completion_logprobs(body: Mapping[str, Any]) -> dict[str, Any]:
    """The option `logprobs` of `LLM.generate`, which is a number in /v1/completions too."""
    asked = body.get("logprobs")
    if asked is None:
        return {}
    return {"logprobs": checked("logprobs", asked, Number(0, MOST_LOGPROBS, whole=True), InputError)}


def list_of(name: str, value: Any) -> list[Any]:
    """A list that is not empty. Raises InputError if it is none."""
    if not isinstance(value, list) or not value:
        raise InputError(f"{name} must be a list that is not empty, not {shown(value)}")
    return value


def prompt_of(value: Any) -> str | list[int]:
    """A prompt: text, or token ids. Raises InputError if it is neither."""
    if isinstance(value, str):
        return inlet.well_formed(value, "prompt")
    if not isinstance(value, list) or not value:
        raise InputError(f"prompt must be text or a list of token ids, not {shown(value)}")
    return [checked("a token id of prompt", each, Number(0, whole=True), InputError) for each in value]


def only_prompt(value: Any) -> str | list[int]:
    """The prompt of /v1/completions, which may stand in a list. Raises InputError if there are several."""
    if isinstance(value, list) and value and isinstance(value[0], str | list):
        if len(value) > 1:
            raise InputError(f"there are {len(value):,} prompts; write a line for each")
        return prompt_of(value[0])
    return prompt_of(value)


def messages(value: Any) -> list[dict[str, Any]]:
    """Messages as chat templates know them: content is text, and there is one system message, the first.

    Raises:
        InputError: they are no list of messages, or hold images, audio or files.
    """
    found = [_message(each) for each in list_of("messages", value)]
    system = [each["content"] for each in found if each["role"] == "system"]
    rest = [each for each in found if each["role"] != "system"]
    return [{"role": "system", "content": "\n\n".join(system)}, *rest] if system else rest


def _message(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InputError(f"a message must be an object with a role and a content, not {shown(value)}")
    role = checked("the role of a message", value.get("role"), Text(), InputError)
    content = value.get("content")
    if content is None and role == "assistant":
        content = ""
    if isinstance(content, list):
        content = "\n".join(map(_text_part, content))
    content = checked("the content of a message", content, Text(), InputError)
    return {**value, "role": "system" if role == "developer" else role, "content": content}


def _text_part(value: Any) -> str:
    kind = value.get("type") if isinstance(value, dict) else None
    if kind in _IMPOSSIBLE:
        raise InputError(f"a message has a part of type {kind}, and the model reads text alone")
    if kind != "text":
        raise InputError(f"a part of a message must be of type text, not {shown(value)}")
    return checked("the text of a message", value.get("text"), Text(), InputError)  # type: ignore[no-any-return]


def usage(generation: "Generation") -> dict[str, int]:
    """Tokens of prompt and answer.

    Tokens that were reused are not told apart: they depend on what else the model computed, and equal runs would
    differ.
    """
    prompt, completion = generation.stats.prompt_tokens, generation.stats.completion_tokens
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def chat_completion(llm: "LLM", generation: "Generation", id: str, logprobs: bool) -> dict[str, Any]:
    """An answer as /v1/chat/completions gives it."""
    found = {"content": [_chat_logprob(llm, each) for each in _tokens(generation)]} if logprobs else None
    message = {"role": "assistant", "content": generation.text, "refusal": None}
    choice = {"index": 0, "message": message, "logprobs": found, "finish_reason": generation.stats.finish_reason}
    return _answer(llm, f"chatcmpl-{id}", "chat.completion", choice, generation)


def text_completion(llm: "LLM", generation: "Generation", id: str, logprobs: bool) -> dict[str, Any]:
    """An answer as /v1/completions gives it."""
    choice = {
        "index": 0, "text": generation.text, "logprobs": _completion_logprobs(llm, generation) if logprobs else None,
        "finish_reason": generation.stats.finish_reason,
    }  # fmt: skip
    return _answer(llm, f"cmpl-{id}", "text_completion", choice, generation)


def _answer(llm: "LLM", id: str, kind: str, choice: dict[str, Any], generation: "Generation") -> dict[str, Any]:
    return {
        "id": id, "object": kind, "created": CREATED, "model": llm.name, "choices": [choice],
        "usage": usage(generation),
    }  # fmt: skip


def _tokens(generation: "Generation") -> list["Chunk"]:
    return [chunk for chunk in generation.chunks if chunk.token_id is not None]


def _text(llm: "LLM", token: int | None) -> str:
    return "" if token is None else llm.tokenizer.decode([token])


def _finite(logprob: float | None) -> float:
    return NO_PROBABILITY if logprob is None else max(logprob, NO_PROBABILITY)


def _named(llm: "LLM", token: int | None, logprob: float | None) -> dict[str, Any]:
    text = _text(llm, token)
    # A part of a character is no text; its bytes are not known here.
    return {"token": text, "logprob": _finite(logprob), "bytes": None if "\ufffd" in text else list(text.encode())}


def _chat_logprob(llm: "LLM", chunk: "Chunk") -> dict[str, Any]:
    top = [_named(llm, token, logprob) for token, logprob in chunk.top_logprobs]
    return {**_named(llm, chunk.token_id, chunk.logprob), "top_logprobs": top}


def _completion_logprobs(llm: "LLM", generation: "Generation") -> dict[str, Any]:
    found: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    offset = 0
    for chunk in _tokens(generation):
        text = _text(llm, chunk.token_id)
        top: dict[str, float] = {}
        for token, logprob in chunk.top_logprobs:  # the most likely first: it stays if two have the same text
            top.setdefault(_text(llm, token), _finite(logprob))
        top.setdefault(text, _finite(chunk.logprob))
        found["tokens"].append(text)
        found["token_logprobs"].append(_finite(chunk.logprob))
        found["top_logprobs"].append(top)
        found["text_offset"].append(offset)
        offset += len(text)
    return found


def error_of(error: Dsv2Error) -> tuple[int, dict[str, Any]]:
    """An error as the status and the `error` object of a response."""
    code = "context_length_exceeded" if isinstance(error, ContextLengthError) else None
    wrong_request = isinstance(error, InputError | TemplateError)
    kind = "invalid_request_error" if wrong_request else "server_error"
    return 400 if wrong_request else 500, {"message": str(error), "type": kind, "param": None, "code": code}
