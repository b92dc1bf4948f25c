"""POST /tokenize, POST /detokenize, GET /tokenizer_info: the tokenizer, in vLLM's shapes."""

from typing import Any

from fastapi import APIRouter
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request

from dsv2_local.errors import InputError
from dsv2_local.llm import LLM
from dsv2_local.server import openai_format
from dsv2_local.server.body import read_json
from dsv2_local.server.service import Service
from dsv2_local.values import Number, checked

router = APIRouter(tags=["tokenizer"])
_FLAG = {"anyOf": [{"type": "boolean"}, {"type": "null"}]}
_TOKENIZE: dict[str, Any] = {
    "type": "object",
    "properties": {
        "prompt": {"type": "string"}, "messages": openai_format.CHAT_SCHEMA["properties"]["messages"],
        "add_special_tokens": _FLAG, "add_generation_prompt": _FLAG, "return_token_strs": _FLAG,
    },
}  # fmt: skip
_DETOKENIZE = {
    "type": "object", "required": ["tokens"],
    "properties": {"tokens": {"type": "array", "items": {"type": "integer", "minimum": 0}}},
}  # fmt: skip


@router.post("/tokenize", openapi_extra=openai_format.documented(_TOKENIZE))
async def tokenize(request: Request) -> dict[str, Any]:
    """The token ids of a text, in which special tokens are parsed, or of a conversation."""
    service: Service = request.app.state.service
    body = await read_json(request)
    return await run_in_threadpool(_tokenize, await service.model(), body)


def _tokenize(llm: LLM, body: dict[str, Any]) -> dict[str, Any]:
    prompt, messages = body.get("prompt"), body.get("messages")
    if (prompt is None) == (messages is None):
        raise InputError("a request needs a prompt or messages, and not both")
    tokenizer = llm.tokenizer
    if messages is None:
        if not isinstance(text := openai_format.prompt_of(prompt), str):
            raise InputError("prompt must be text")
        ids = tokenizer.encode(text, bos=openai_format.flag(body, "add_special_tokens", default=True))
    else:
        ids = tokenizer.encode_chat(
            openai_format.messages(messages), openai_format.flag(body, "add_generation_prompt", default=True)
        )
    strings = openai_format.flag(body, "return_token_strs")
    return {
        "count": len(ids), "max_model_len": llm.context, "tokens": ids,
        "token_strs": [tokenizer.decode([id], special=True) for id in ids] if strings else None,
    }  # fmt: skip


@router.post("/detokenize", openapi_extra=openai_format.documented(_DETOKENIZE))
async def detokenize(request: Request) -> dict[str, str]:
    """The text of token ids, with special tokens."""
    service: Service = request.app.state.service
    body = await read_json(request)
    return await run_in_threadpool(_detokenize, await service.model(), body)


def _detokenize(llm: LLM, body: dict[str, Any]) -> dict[str, str]:
    tokens = body.get("tokens")
    if not isinstance(tokens, list):
        raise InputError("tokens must be a list of token ids")
    one = Number(0, llm.config.vocab_size - 1, whole=True)
    ids = [checked("a token id of tokens", each, one, InputError) for each in tokens]
    return {"prompt": llm.tokenizer.decode(ids, special=True)}


@router.get("/tokenizer_info")
async def tokenizer_info(request: Request) -> dict[str, Any]:
    """The special tokens and the chat template."""
    service: Service = request.app.state.service
    llm = await service.model()
    tokenizer = llm.tokenizer
    return {
        "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": llm.context,
        "chat_template": tokenizer.chat_template, "bos_token": tokenizer.bos_token or None,
        "eos_token": tokenizer.eos_token or None, **tokenizer.special_tokens,
    }  # fmt: skip
