"""Requests and answers in the shapes of OpenAI's API: what its endpoints have in common, and /v1/chat/completions.

Unknown fields are ignored, as servers do. Fields that would change the answer and are not supported are refused.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dsv2_local import inlet
from dsv2_local.errors import ContextLengthError, Dsv2Error, InputError, TemplateError
from dsv2_local.runtime.sampling_params import VALUES, SamplingParams
from dsv2_local.server import openai_tools
from dsv2_local.values import Flag, Number, Object, Text, checked, shown

if TYPE_CHECKING:
    from dsv2_local.chunk import CallDelta, Chunk
    from dsv2_local.generation import Generation
    from dsv2_local.llm import LLM

MOST_LOGPROBS = 20
CREATED = 0
"""The time of every answer: the real one would make equal runs differ, and clients need the field."""
NO_PROBABILITY = -9999.0
"""The logarithm of 0, which JSON lacks."""
_SINGLE = ("n", "best_of")
_OFF: dict[str, tuple[Any, ...]] = {"echo": (False,), "suffix": ("",)}
_IMPOSSIBLE = "image_url", "input_audio", "file", "input_image", "input_file"
_TEXTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
"""The types of parts that are text, those of /v1/responses too, and the names of the text in them."""


_ROLES = "system", "developer", "user", "assistant", "tool", "function"
_TEXT_PART = {
    "type": "object", "required": ["type", "text"],
    "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
}  # fmt: skip
_MESSAGE = {
    "type": "object", "required": ["role"],
    "properties": {
        "role": {"enum": list(_ROLES)},
        "content": {"anyOf": [{"type": "string"}, {"type": "array", "items": _TEXT_PART}, {"type": "null"}]},
        "tool_calls": {"type": ["array", "null"], "items": {"type": "object"}},
        "tool_call_id": {"type": ["string", "null"]},
    },
}  # fmt: skip
_OPTIONAL: dict[str, dict[str, Any]] = {
    "temperature": {"type": "number", "minimum": 0}, "top_p": {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
    "top_k": {"type": "integer", "minimum": -1}, "min_p": {"type": "number", "minimum": 0, "maximum": 1},
    "repetition_penalty": {"type": "number", "minimum": 1e-3, "maximum": 1e3},
    "presence_penalty": {"type": "number"}, "frequency_penalty": {"type": "number"},
    "seed": {"type": "integer", "minimum": -1},
    "stop": {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]},
    "logit_bias": {"type": "object", "additionalProperties": {"type": "number"}},
    "max_tokens": {"type": "integer", "minimum": -1}, "stream": {"type": "boolean"},
    "stream_options": {"type": "object", "properties": {"include_usage": {"type": "boolean"}}},
    "n": {"type": "integer", "minimum": 1},
}  # fmt: skip
OPTION_SCHEMAS = {name: {"anyOf": [schema, {"type": "null"}]} for name, schema in _OPTIONAL.items()}
"""The options of all of OpenAI's endpoints, as JSON schemas for the documentation."""
CHAT_SCHEMA: dict[str, Any] = {
    "type": "object", "required": ["messages"],
    "properties": {
        "model": {"type": "string"}, "messages": {"type": "array", "items": _MESSAGE, "minItems": 1},
        **OPTION_SCHEMAS, "max_completion_tokens": {"type": "integer"}, "logprobs": {"type": "boolean"},
        "top_logprobs": {"type": "integer", "minimum": 0, "maximum": MOST_LOGPROBS},
        **openai_tools.TOOL_SCHEMAS,
    },
}  # fmt: skip


def documented(schema: Mapping[str, Any]) -> dict[str, Any]:
    """What a route tells FastAPI of its body, which the route reads itself."""
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def refuse_unsupported(body: Mapping[str, Any], but: Collection[str] = ()) -> None:
    """Refuse what is not supported, and would be missed; `but` are fields that the endpoint supports.

    Raises:
        InputError: the body asks for several answers, or its own prompt back.
    """
    for name in _SINGLE:
        if body.get(name) is not None and checked(name, body[name], Number(1, whole=True), InputError) > 1:
            raise InputError(f"{name} must be 1; write a line for every answer")
    for name, off in _OFF.items():
        if name in but:
            continue
        if body.get(name) is not None and body[name] not in off:
            raise InputError(f"{name} is not supported")


def sampling(body: Mapping[str, Any], *, empty: bool = False) -> dict[str, Any]:
    """The options of `LLM.generate` in a body, without log probabilities; null is as good as missing.

    `empty`: whether `max_tokens` may be 0.
    """
    given = {name: body[name] for name in (*VALUES, "stop") if body.get(name) is not None}
    for name in ("max_tokens", "max_completion_tokens"):  # the second, newer one wins
        if body.get(name) is not None:
            given["max_tokens"] = checked(name, body[name], Number(whole=True), InputError)
            if not (empty or given["max_tokens"]):
                raise InputError(f"{name} must be at least 1, not 0")
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


def messages(value: Any) -> list[dict[str, Any]]:
    """Messages as `LLM.chat` takes them: content is text, and calls of tools are in their new form.

    Raises:
        InputError: they are no list of messages, or hold images, audio or files.
    """
    return [_message(each) for each in openai_tools.modern(list_of("messages", value))]


def _message(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InputError(f"a message must be an object with a role and a content, not {shown(value)}")
    role = checked("the role of a message", value.get("role"), Text(), InputError)
    if role not in _ROLES:
        raise InputError(f"the role of a message must be one of {', '.join(_ROLES)}, not {shown(role)}")
    content = value.get("content")
    if content is None and role in ("assistant", "tool"):
        content = ""
    found = {**value, "role": "system" if role == "developer" else role, "content": text_of(content)}
    calls = openai_tools.message_calls(value) if role == "assistant" else []
    found.pop("tool_calls", None)
    return found | {"content": found["content"] or None, "tool_calls": calls} if calls else found


def text_of(content: Any) -> str:
    """The content of a message: text, or parts of text, which are joined by line feeds.

    Raises:
        InputError: it is something else, or holds images, audio or files.
    """
    if isinstance(content, list):
        return "\n".join(map(_text_part, content))
    return checked("the content of a message", content, Text(), InputError)  # type: ignore[no-any-return]


def _text_part(value: Any) -> str:
    kind = value.get("type") if isinstance(value, dict) else None
    if kind in _IMPOSSIBLE:
        raise InputError(f"a message has a part of type {kind}, and the model reads text alone")
    if not isinstance(kind, str) or kind not in _TEXTS:
        raise InputError(f"a part of a message must be of type text, not {shown(value)}")
    return checked("the text of a message", value.get(_TEXTS[kind]), Text(), InputError)  # type: ignore[no-any-return]


def usage(generation: "Generation") -> dict[str, int]:
    """Tokens of prompt and answer.

    Tokens that were reused are not told apart: they depend on what else the model computed, and equal runs would
    differ.
    """
    prompt, completion = generation.stats.prompt_tokens, generation.stats.completion_tokens
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def server_usage(generations: Sequence["Generation"]) -> dict[str, Any]:
    """Tokens of the prompt, once, and of all answers to it, with those of the prompt that were reused."""
    prompt = generations[0].stats.prompt_tokens if generations else 0
    completion = sum(each.stats.completion_tokens for each in generations)
    cached = min((each.stats.reused_tokens for each in generations), default=0)
    return {
        "prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
    }  # fmt: skip


def total_usage(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The sum of what `server_usage` gives for several prompts."""
    total: dict[str, Any] = {
        name: sum(part[name] for part in parts) for name in ("prompt_tokens", "completion_tokens", "total_tokens")
    }
    cached = sum(part["prompt_tokens_details"]["cached_tokens"] for part in parts)
    return total | {"prompt_tokens_details": {"cached_tokens": cached}}


def choices(body: Mapping[str, Any], most: int) -> int:
    """How many answers a body asks for (`n`). Raises InputError if it is no number, or above `most`."""
    asked = body.get("n")
    return 1 if asked is None else int(checked("n", asked, Number(1, most, whole=True), InputError))


def seeded(options: Mapping[str, Any], count: int) -> list[dict[str, Any]]:
    """The options of each of `count` answers to one prompt: each has the seed after that of the one before."""
    if options.get("seed") is None or count == 1:
        return [dict(options)] * count
    first = SamplingParams().override(seed=options["seed"]).seed
    return [dict(options) | {"seed": None if first is None else (first + index) % 2**64} for index in range(count)]


def flag(body: Mapping[str, Any], name: str, *, default: bool = False) -> bool:
    """A field that is true or false. Raises InputError if it is neither."""
    value = body.get(name)
    return default if value is None else bool(checked(name, value, Flag(), InputError))


def include_usage(body: Mapping[str, Any]) -> bool:
    """Whether a stream is to end with the usage. Raises InputError if `stream_options` is no object."""
    options = body.get("stream_options")
    return options is not None and flag(checked("stream_options", options, Object(), InputError), "include_usage")


def chat_completion(llm: "LLM", generation: "Generation", id: str, logprobs: bool) -> dict[str, Any]:
    """An answer as /v1/chat/completions gives it."""
    choice = chat_choice(llm, generation, generation.chunks, 0, logprobs)
    return answer(llm, f"chatcmpl-{id}", "chat.completion", [choice], usage(generation))


def chat_choice(
    llm: "LLM", generation: "Generation", chunks: Iterable["Chunk"], index: int, logprobs: bool, legacy: bool = False
) -> dict[str, Any]:
    """One of the `choices` of /v1/chat/completions; `chunks` are those of the answer.

    `legacy`: a call is a `function_call`.
    """
    found = {"content": [chat_logprob(llm, each) for each in token_chunks(chunks)]} if logprobs else None
    message: dict[str, Any] = {"role": "assistant", "content": generation.text, "refusal": None}
    if calls := generation.tool_calls:
        message["content"] = generation.text or None
        named = [{"name": each.name, "arguments": each.arguments} for each in calls]
        if legacy:
            message["function_call"] = named[0]
        else:
            message["tool_calls"] = [
                {"id": each.id, "type": "function", "function": function}
                for each, function in zip(calls, named, strict=True)
            ]
    return {
        "index": index, "message": message, "logprobs": found, "finish_reason": finish_reason(generation, legacy),
    }  # fmt: skip


def finish_reason(generation: "Generation", legacy: bool = False) -> str | None:
    """Why an answer ended, in the words of /v1/chat/completions."""
    reason = generation.stats.finish_reason
    if reason == "stop" and generation.tool_calls:
        return "function_call" if legacy else "tool_calls"
    return reason


def call_delta(delta: "CallDelta", legacy: bool = False) -> dict[str, Any]:
    """A piece of a call as the `delta` of a stream: id and name stand in the first piece alone, clients append them."""
    function = {"name": delta.name, "arguments": delta.arguments} if delta.id else {"arguments": delta.arguments}
    if legacy:
        return {"function_call": function}
    new = {"id": delta.id, "type": "function"} if delta.id else {}
    return {"tool_calls": [{"index": delta.index, **new, "function": function}]}


def answer(
    llm: "LLM", id: str, kind: str, choices: list[dict[str, Any]], usage: dict[str, Any], created: int = CREATED
) -> dict[str, Any]:
    """The object around the choices."""
    return {"id": id, "object": kind, "created": created, "model": llm.name, "choices": choices, "usage": usage}


def token_chunks(chunks: Iterable["Chunk"]) -> list["Chunk"]:
    """Those chunks that are tokens, and not the rest of the text."""
    return [chunk for chunk in chunks if chunk.token_id is not None]


def token_text(llm: "LLM", token: int | None) -> str:
    """The text of a token; empty for a special one."""
    return "" if token is None else llm.tokenizer.decode([token])


def finite(logprob: float | None) -> float:
    """A log probability as JSON can hold it."""
    return NO_PROBABILITY if logprob is None else max(logprob, NO_PROBABILITY)


def _named(llm: "LLM", token: int | None, logprob: float | None) -> dict[str, Any]:
    text = token_text(llm, token)
    # A part of a character is no text; its bytes are not known here.
    return {"token": text, "logprob": finite(logprob), "bytes": None if "\ufffd" in text else list(text.encode())}


def chat_logprob(llm: "LLM", chunk: "Chunk") -> dict[str, Any]:
    """One of the `logprobs.content` of /v1/chat/completions."""
    top = [_named(llm, token, logprob) for token, logprob in chunk.top_logprobs]
    return {**_named(llm, chunk.token_id, chunk.logprob), "top_logprobs": top}


def error_of(error: Dsv2Error) -> tuple[int, dict[str, Any]]:
    """An error as the status and the `error` object of a response."""
    code = "context_length_exceeded" if isinstance(error, ContextLengthError) else None
    wrong_request = isinstance(error, InputError | TemplateError)
    kind = "invalid_request_error" if wrong_request else "server_error"
    return 400 if wrong_request else 500, {"message": str(error), "type": kind, "param": None, "code": code}
