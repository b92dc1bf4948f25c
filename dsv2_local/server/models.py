"""GET /v1/models, in OpenAI's shape and in Anthropic's; /v1/embeddings is refused."""

from datetime import UTC, datetime
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request

from dsv2_local.server.errors import Problematic
from dsv2_local.server.service import Service, State

router = APIRouter(tags=["models"])


@router.get("/v1/models")
async def models(request: Request) -> dict[str, Any]:
    """List the one model."""
    described = await _described(request)
    if "anthropic-version" in request.headers:
        return {"data": [described], "has_more": False, "first_id": described["id"], "last_id": described["id"]}
    listed: dict[str, Any] = {"object": "list", "data": [described]}
    if "client_version" in request.query_params:  # Codex asks for its own list so
        listed["models"] = []
    return listed


@router.get("/v1/models/{model:path}")
async def model(request: Request, model: str) -> dict[str, Any]:
    """Describe the one model."""
    described = await _described(request)
    if model != described["id"]:
        raise Problematic(404, f"there is no model {model!r}; this server has {described['id']!r}", "model_not_found")
    return described


@router.post("/v1/embeddings")
async def embeddings() -> None:
    """Refused: the model computes no embeddings."""
    raise Problematic(
        404, "this model computes no embeddings; ask a server of an embedding model for them", "model_not_found"
    )


async def _described(request: Request) -> dict[str, Any]:
    service: Service = request.app.state.service
    if service.state is State.LOADING:
        await service.model()
    limits = {} if service.context is None else {"max_model_len": service.context, "context_length": service.context}
    if "anthropic-version" in request.headers:
        created = _rfc3339(service.started)
        return {"type": "model", "id": service.name, "display_name": service.name, "created_at": created, **limits}
    return {
        "id": service.name, "object": "model", "created": int(service.started), "owned_by": "dsv2-local", **limits,
    }  # fmt: skip


def _rfc3339(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
