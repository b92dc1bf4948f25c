"""Ollama's API: the version, and the one model that the server has. Requests that would change models are refused."""

import hashlib
from datetime import UTC, datetime
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from dsv2_local.errors import InputError
from dsv2_local.llm import LLM
from dsv2_local.quant import schema
from dsv2_local.server import ollama_messages, openai_format
from dsv2_local.server.body import read_json
from dsv2_local.server.errors import Problematic
from dsv2_local.server.service import Service
from dsv2_local.server.streaming import line

router = APIRouter(tags=["Ollama"])
API_VERSION = "0.14.0"
"""The release of Ollama whose API this is; clients refuse early ones."""
NEVER = "0001-01-01T00:00:00Z"
"""When a model is unloaded, if nobody knows."""
_FAMILY = "deepseek2"
_NAMED = {
    "type": "object",
    "properties": {"model": {"type": "string"}, "name": {"type": "string"}, "stream": {"type": "boolean"}},
}  # fmt: skip


def tagged(name: str) -> str:
    """A model's name with a tag, as Ollama's clients expect."""
    return name if ":" in name else f"{name}:latest"


@router.get("/api/version")
async def version() -> dict[str, str]:
    """The release of Ollama whose API this is."""
    return {"version": API_VERSION}


@router.get("/api/tags")
async def tags(request: Request) -> dict[str, Any]:
    """List the one model."""
    return {"models": [_listed(request.app.state.service)]}


@router.get("/api/ps")
async def ps(request: Request) -> dict[str, Any]:
    """List the one model if it is loaded."""
    service: Service = request.app.state.service
    llm = service.loaded
    if llm is None:
        return {"models": []}
    on_gpus = sum(share.used for share in llm.plan.gpus)
    return {"models": [_listed(service) | {"expires_at": NEVER, "size_vram": on_gpus, "context_length": llm.context}]}


@router.post("/api/show", openapi_extra=openai_format.documented(_NAMED))
async def show(request: Request) -> dict[str, Any]:
    """Describe the one model, whatever name the body has."""
    service: Service = request.app.state.service
    await read_json(request)
    llm = await service.model()
    config = llm.config
    capabilities = ["completion", "tools"]
    if _fills_in(llm):
        capabilities.append("insert")
    return {
        "modified_at": _time(service.started), "details": _details(llm), "capabilities": capabilities,
        "license": "", "modelfile": "", "parameters": "", "template": "",
        "model_info": {
            "general.architecture": _FAMILY, "general.basename": llm.name,
            "general.parameter_count": schema.parameters(config),
            f"{_FAMILY}.context_length": llm.context, f"{_FAMILY}.block_count": config.num_hidden_layers,
            f"{_FAMILY}.embedding_length": config.hidden_size, f"{_FAMILY}.vocab_size": config.vocab_size,
            f"{_FAMILY}.attention.head_count": config.num_attention_heads,
            f"{_FAMILY}.expert_count": config.n_routed_experts,
            f"{_FAMILY}.expert_used_count": config.num_experts_per_tok,
        },
    }  # fmt: skip


@router.post("/api/pull", openapi_extra=openai_format.documented(_NAMED))
async def pull(request: Request) -> Response:
    """Done at once for the model that is here; no other one is fetched."""
    service: Service = request.app.state.service
    body = await read_json(request)
    name = ollama_messages.text_of(body, "model") or ollama_messages.text_of(body, "name")
    if tagged(name) != tagged(service.name):
        raise InputError(
            f"this server has one model, {service.name}, and fetches none; use that name, or start dsv2 serve with "
            "another model"
        )
    done = {"status": "success"}
    stream = ollama_messages.streamed(body)
    return Response(line(done), media_type="application/x-ndjson") if stream else JSONResponse(done)


@router.post("/api/create")
@router.post("/api/copy")
@router.post("/api/push")
@router.delete("/api/delete")
@router.post("/api/blobs/{digest}")
async def change() -> None:
    """Refused: the server has the one model that it was started with."""
    raise InputError("this server has the one model that it was started with; it makes, copies and deletes none")


@router.post("/api/embed")
@router.post("/api/embeddings")
async def embed() -> None:
    """Refused: the model computes no embeddings."""
    raise Problematic(404, "this model computes no embeddings; ask a server of an embedding model for them")


def _listed(service: Service) -> dict[str, Any]:
    llm, name = service.loaded, tagged(service.name)
    size = sum(file.stat().st_size for file in llm.directory.glob("*.safetensors")) if llm else 0
    return {
        "name": name, "model": name, "modified_at": _time(service.started), "size": size,
        "digest": hashlib.sha256(name.encode()).hexdigest(), "details": _details(llm),
    }  # fmt: skip


def _details(llm: LLM | None) -> dict[str, Any]:
    known = (
        {"parameter_size": _short(schema.parameters(llm.config)), "quantization_level": llm.recipe.upper()}
        if llm
        else {"parameter_size": "", "quantization_level": ""}
    )
    return {"parent_model": "", "format": "safetensors", "family": _FAMILY, "families": [_FAMILY], **known}


def _short(count: int) -> str:
    return f"{count / 1e9:.1f}B" if count >= 1e9 else f"{count / 1e6:.0f}M"


def _fills_in(llm: LLM) -> bool:
    try:
        return bool(llm.tokenizer.encode_infill("", ""))
    except InputError:
        return False


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat().replace("+00:00", "Z")
