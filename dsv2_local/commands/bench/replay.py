"""`--trace`: decodes with the routing of a recorded trace, so that hits and misses are those of a real text."""

from collections.abc import Callable

import torch
from torch import Tensor

from dsv2_local.kernels.graphs import PiecewiseGraph
from dsv2_local.offload.trace import Trace
from dsv2_local.runtime.model import Experts, MoE, Transformer


class ReplayedRouting:
    """Experts that take the choice of one-token steps from a trace; prefill keeps the router's choice.

    The choice is in device tensors of fixed address, which `advance` fills before each step, so that steps can be
    captured. The router's weights are used as they are, though they belong to other experts: their time is the same.

    Attributes:
        replayable: see `model.Experts`.
        tokens: number of tokens in the trace.
        position: the token of the trace whose routing the current step has.
    """

    replayable = False

    def __init__(self, model: Transformer, trace: Trace) -> None:
        """Put the trace between the model's routers and its experts; its layers are the model's MoE layers in order."""
        self._experts: Experts
        self.position, self.tokens = -1, len(trace.tokens)
        every = torch.tensor(trace.tokens)  # [tokens, layers, K]
        devices = dict.fromkeys(layer.device for layer in model.layers)
        self._trace = {device: every.to(device) for device in devices}
        self._now = {device: tokens[0].clone() for device, tokens in self._trace.items()}  # [layers, K]
        self._index = {layer: number for number, layer in enumerate(model.config.moe_layers)}
        for layer in model.layers:
            if isinstance(layer.mlp, MoE):
                self._experts = layer.mlp.routed_experts
                layer.mlp.routed_experts = self

    def advance(self) -> None:
        """Route the next step like the next token of the trace; after the last one comes the first again."""
        self.position = (self.position + 1) % self.tokens
        for device, now in self._now.items():
            now.copy_(self._trace[device][self.position])

    def start(
        self, layer: int, x: Tensor, ids: Tensor, weights: Tensor, capture: PiecewiseGraph | None = None
    ) -> Callable[[], Tensor]:
        """See `model.Experts`."""
        if len(ids) == 1:
            index = self._index[layer]
            ids = self._now[x.device][index : index + 1]
        return self._experts.start(layer, x, ids, weights, capture)
