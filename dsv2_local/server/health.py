"""GET /health: what the server is doing. GET /metrics: its figures, for Prometheus."""

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from dsv2_local.server.metrics import Metrics
from dsv2_local.server.service import Service, State

router = APIRouter(tags=["operation"])


@router.get("/health")
async def health(request: Request) -> Response:
    """200 if requests are answered (an unloaded model is loaded for them), else 503."""
    service: Service = request.app.state.service
    good = service.state in (State.READY, State.UNLOADED)
    return JSONResponse({"status": service.state.value}, 200 if good else 503)


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    """Counters, gauges and histograms in Prometheus' text format."""
    found: Metrics = request.app.state.metrics
    return Response(found.text(), media_type=found.content_type)
