"""The decode step on GPUs: launched as graphs, with one wait for the device, for the logits."""

from collections.abc import Callable

import torch
from torch import Tensor

from dsv2_local.cache import LatentCache
from dsv2_local.kernels import ops
from dsv2_local.kernels.graphs import Graphs
from dsv2_local.model import DecodeStep, Transformer

PROMPTS = (3, 12, 48, 200, 1000)  # tokens: one length for each set of kernels that some length needs


class GraphStep:
    """One token after those in the cache, through a model on GPUs and its head; see `model.DecodeStep`.

    The first run launches kernel by kernel, which compiles and tunes them, and is captured; the others are replays.

    Attributes:
        recording: None; there are no native calls to be timed or to compute several tokens to the same bit.
    """

    recording: None = None

    def __init__(self, model: Transformer, cache: LatentCache) -> None:
        self.model, self.cache = model, cache
        self._graphs: Graphs | None = None
        self._ids = torch.empty(1, dtype=torch.int64)
        where = model.layers[0].where
        x, rotation = model.embed(torch.zeros(1, dtype=torch.int64)), model.rotation(0, 1)
        self._host_inputs = x.pin_memory(), rotation.pin_memory()
        self._inputs = x.to(where), rotation.to(where)
        self._logits = torch.empty(0)  # where a replay leaves them
        self._host_logits = torch.empty(model.config.vocab_size, pin_memory=True)

    @torch.inference_mode()
    def run(self, token: int) -> Tensor:
        """Add `token` to the cache -> fp32 logits [vocab_size], which the next run overwrites.

        Raises:
            ContextLengthError: the cache is full.
        """
        self.cache.make_room(1)
        self._ids.fill_(token)
        x, rotation = self._host_inputs
        x.copy_(self.model.embed(self._ids))
        rotation.copy_(self.model.rotation(self.cache.length, 1))
        for device_input, host_input in zip(self._inputs, self._host_inputs, strict=True):
            device_input.copy_(host_input, non_blocking=True)
        if self._graphs:
            self._graphs.replay()
            self._host_logits.copy_(self._logits)
        else:
            self._host_logits.copy_(self._launch())
            graphs = Graphs()
            self._logits = graphs.capture(self._launch)
            self._graphs = graphs
        self.cache.advance(1)
        return self._host_logits

    @torch.inference_mode()
    def warm_up(self, progress: Callable[[int, int], None]) -> None:
        """Compile and tune the kernels, and capture the step, before the first prompt; the cache is empty then.

        Kernels are kept on disk, so that only the first time on a machine takes long. Prompts run through one layer of
        each kind, which is enough to compile for. `progress` is called with the prompts done and all of them.
        """
        cache, moe = self.cache, self.model.config.moe_layers
        layers = 1 + next(iter(moe), 0)  # the first of each kind among them
        for done, tokens in enumerate(PROMPTS):
            progress(done, len(PROMPTS))
            if tokens < cache.context:
                cache.make_room(tokens)
                x = self.model.embed(torch.zeros(tokens, dtype=torch.int64))
                self.model.through_layers(x, self.model.rotation(0, tokens), cache, layers)
        for _ in range(2):
            self.run(0)
        cache.clear()
        progress(len(PROMPTS), len(PROMPTS))

    def _launch(self) -> Tensor:
        return self.model.head(self.model.through_layers(*self._inputs, self.cache))[0]


def decode_step(model: Transformer, cache: LatentCache) -> DecodeStep | GraphStep:
    """What decodes for this model: graphs where all of it is on GPUs with Triton's kernels."""
    graphs = all(ops.capturable(layer.where) for layer in model.layers)
    return GraphStep(model, cache) if graphs else DecodeStep(model, cache)
