"""`dsv2 bench --record-trace`: records which experts a model chooses for a text, to replay them or simulate caches."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from dsv2_local import llm
from dsv2_local.commands.bench.settings import BenchOptions
from dsv2_local.commands.bench.timing import StatusLine
from dsv2_local.commands.console import notice
from dsv2_local.errors import InputError
from dsv2_local.kernels.graphs import PiecewiseGraph
from dsv2_local.offload.trace import Trace
from dsv2_local.runtime.cpu_step import CpuStep
from dsv2_local.runtime.model import Experts, MoE

PASSAGE = 512  # tokens between two resets of the KV cache


class Watched:
    """Experts that note which experts each layer chose for the last token."""

    replayable = False

    def __init__(self, experts: Experts) -> None:
        self.chosen: dict[int, list[int]] = {}
        self._experts = experts

    def start(
        self, layer: int, x: Tensor, ids: Tensor, weights: Tensor, capture: PiecewiseGraph | None = None
    ) -> Callable[[], Tensor]:
        self.chosen[layer] = ids[-1].tolist()
        return self._experts.start(layer, x, ids, weights, capture)


def record(options: BenchOptions, text: str, file: Path, status: StatusLine) -> None:
    """Run the tokens of `text` one by one, as decoding would, and write the chosen experts to `file`.

    Raises:
        InputError: the model has no routed experts, or the file cannot be written.
    """
    if not file.absolute().parent.is_dir():
        raise InputError(f"{file} cannot be written: its directory does not exist")
    loaded = llm.load(
        options.model, device=options.device, experts=options.experts, vram=options.vram, threads=options.threads
    )
    if not loaded.config.moe_layers:
        raise InputError(f"{loaded.name} has no routed experts to trace")
    tokens = loaded.tokenizer.encode(text)
    network, cache = loaded.engine.model, loaded.engine.cache
    watched = Watched(loaded.experts)
    for layer in network.layers:
        if isinstance(layer.mlp, MoE):
            layer.mlp.routed_experts = watched
    trace = Trace(loaded.name, len(loaded.config.moe_layers), loaded.config.n_routed_experts, [])
    step, sequence = CpuStep(network, cache), cache.new_sequence()
    with torch.inference_mode():
        for done, token in enumerate(tokens):
            if done % min(PASSAGE, cache.context) == 0:
                sequence.truncate(0)
                status(f"tracing: {done:,} of {len(tokens):,} tokens")
            step.run([(sequence, [token])])
            trace.tokens.append([watched.chosen[layer] for layer in loaded.config.moe_layers])
    try:
        trace.save(file)
    except OSError as error:
        raise InputError(f"{file} cannot be written: {error.strerror}") from None
    notice(f"{file} has the experts of {len(tokens):,} tokens; benchmarks/expert_cache.py simulates caches with it")
