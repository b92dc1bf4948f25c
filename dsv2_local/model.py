"""DeepSeek-V2: multi-head latent attention and a mixture of experts, over one sequence.

Shapes: `T` tokens of this step, `H` heads, `N` qk_nope_head_dim, `P` qk_rope_head_dim, `V` v_head_dim,
`C` kv_lora_rank, `D` hidden_size, `E` routed experts, `K` experts per token, `S` tokens in the cache.

Names are those of the checkpoint. The mathematics is that of arXiv 2405.04434 and of the model's own code.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from time import perf_counter
from typing import Protocol, cast

import torch
from torch import Tensor

from dsv2_local.cache import Allocate, LatentCache
from dsv2_local.config import ModelConfig
from dsv2_local.kernels import graphs, ops
from dsv2_local.kernels.cpu.recording import Recording
from dsv2_local.kernels.format import Cache
from dsv2_local.kernels.layout import Matrix
from dsv2_local.lookup import GUESSES
from dsv2_local.rope import Rope
from dsv2_local.sampling import Outcome, Outcomes, SamplingParams

# The two norms inside the attention ignore rms_norm_eps.
LATENT_NORM_EPS = 1e-6

Weights = dict[str, Matrix | Tensor]


class Experts(Protocol):
    """Whoever holds the routed experts, wherever they are.

    Attributes:
        replayable: whether a step is the same calls of kernels every time (`DecodeStep`).
    """

    replayable: bool

    def begin(self, layer: int, x: Tensor, ids: Tensor, weights: Tensor) -> Callable[[], Tensor]:
        """Σₖ weights[t, k] · expert[ids[t, k]](x[t]): x [T, D], ids int64 and weights fp32 [T, K] -> [T, D].

        What need not be waited for is started at once; the function that is returned gives the sum. It is called once,
        before the next `begin`.
        """
        ...


@dataclass(frozen=True)
class WeightView:
    """The weights under a prefix, so that a module names only its own."""

    weights: Weights
    prefix: str

    def matrix(self, name: str) -> Matrix:
        return cast(Matrix, self.weights[self.prefix + name])

    def tensor(self, name: str) -> Tensor:
        """A norm or router, in fp32."""
        return cast(Tensor, self.weights[self.prefix + name]).float()

    def under(self, prefix: str) -> "WeightView":
        return WeightView(self.weights, self.prefix + prefix)


class Attention:
    """Multi-head latent attention; the cache holds the normed latent and the rotated rope key, nothing else."""

    def __init__(self, config: ModelConfig, weights: WeightView, layer: int) -> None:
        self.config, self.layer = config, layer
        self.low_rank_query = config.q_lora_rank is not None
        if self.low_rank_query:
            self.q_a_proj = weights.matrix("q_a_proj.weight")
            self.q_a_layernorm = weights.tensor("q_a_layernorm.weight")
            self.q_b_proj = weights.matrix("q_b_proj.weight")
        else:
            self.q_proj = weights.matrix("q_proj.weight")
        self.kv_a_proj_with_mqa = weights.matrix("kv_a_proj_with_mqa.weight")
        self.kv_a_layernorm = weights.tensor("kv_a_layernorm.weight")
        self.w_uk = weights.matrix("kv_b_proj.w_uk")
        self.w_uv = weights.matrix("kv_b_proj.w_uv")
        self.o_proj = weights.matrix("o_proj.weight")

    def forward(self, x: Tensor, rotation: Tensor, cache: LatentCache) -> Tensor:
        """x [T, D] at the positions after `cache.length` -> [T, D]."""
        c, T = self.config, x.shape[0]
        q = self.query(x).view(T, c.num_attention_heads, c.qk_head_dim)  # [T, H, N + P]
        kv_a = ops.linear(x, self.kv_a_proj_with_mqa)  # [T, C + P]
        latents, sequence = cache.layers[self.layer], cache.sequences[self.layer]  # [pages, PAGE, …], [1 + pages]
        ops.write_latents(latents, sequence, kv_a, self.kv_a_layernorm, LATENT_NORM_EPS, rotation)
        out = ops.attention(q, rotation, latents, sequence, self.w_uk, self.w_uv, c.softmax_scale)  # [T, H·V]
        return ops.linear(out, self.o_proj)

    def query(self, x: Tensor) -> Tensor:
        """x [T, D] -> [T, H·(N + P)], with or without the low-rank step."""
        if not self.low_rank_query:
            return ops.linear(x, self.q_proj)
        return ops.linear(
            ops.rms_norm(ops.linear(x, self.q_a_proj), self.q_a_layernorm, LATENT_NORM_EPS), self.q_b_proj
        )


class MLP:
    """down(silu(gate(x)) · up(x)): the dense layers and the shared experts."""

    def __init__(self, weights: WeightView) -> None:
        self.gate_proj = weights.matrix("gate_proj.weight")
        self.up_proj = weights.matrix("up_proj.weight")
        self.down_proj = weights.matrix("down_proj.weight")

    def forward(self, x: Tensor) -> Tensor:
        """x [T, D] -> [T, D]."""
        return ops.swiglu(x, self.gate_proj, self.up_proj, self.down_proj)


class MoE:
    """Routed experts, chosen per token, and the shared experts that every token takes."""

    def __init__(self, config: ModelConfig, weights: WeightView, layer: int, experts: Experts) -> None:
        self.config, self.layer = config, layer
        self.gate = weights.tensor("gate.weight")  # [E, D]
        self.shared_experts = MLP(weights.under("shared_experts.")) if config.n_shared_experts else None
        self.routed_experts = experts

    def forward(self, x: Tensor) -> Tensor:
        """x [T, D] -> [T, D]."""
        ids, weights = ops.route(x, self.gate, self.config)
        routed = self.routed_experts.begin(self.layer, x, ids, weights)
        if not self.shared_experts:
            return routed()
        shared = self.shared_experts.forward(x)
        return ops.add(routed(), shared)


class Block:
    """One layer: attention, then MLP or mixture, each behind a norm and added to the residual stream."""

    def __init__(self, config: ModelConfig, weights: WeightView, layer: int, experts: Experts) -> None:
        self.eps = config.rms_norm_eps
        self.input_layernorm = weights.tensor("input_layernorm.weight")
        self.post_attention_layernorm = weights.tensor("post_attention_layernorm.weight")
        self.self_attn = Attention(config, weights.under("self_attn."), layer)
        mlp = weights.under("mlp.")
        self.mlp: MLP | MoE = MoE(config, mlp, layer, experts) if config.is_moe(layer) else MLP(mlp)

    @property
    def where(self) -> torch.device:
        """The device of its weights, and so of its activations."""
        return self.input_layernorm.device

    def forward(self, x: Tensor, rotation: Tensor, cache: LatentCache) -> Tensor:
        """x [T, D] -> [T, D]."""
        attended = self.self_attn.forward(ops.rms_norm(x, self.input_layernorm, self.eps), rotation, cache)
        x, normed = ops.add_rms_norm(x, attended, self.post_attention_layernorm, self.eps)
        return ops.add(x, self.mlp.forward(normed))


class Transformer:
    """The whole model. Activations go to the device of each layer's weights."""

    def __init__(
        self,
        config: ModelConfig,
        weights: Weights,
        experts: Experts,
        dtype: torch.dtype,
        allocate: Sequence[Allocate] | None = None,
    ) -> None:
        """`dtype`, float32 or bfloat16, is that of the activations; `allocate` makes each layer's cache (None: RAM)."""
        view = WeightView(weights, "")
        self.config, self.dtype, self._allocate = config, dtype, allocate
        self.rope = Rope(config)
        self.embed_tokens = view.matrix("model.embed_tokens.weight")
        tied = "lm_head.weight" not in weights  # a model in RAM needs no second copy
        self.lm_head = self.embed_tokens if tied else view.matrix("lm_head.weight")
        self.norm = view.tensor("model.norm.weight")
        layers = range(config.num_hidden_layers)
        self.layers = [Block(config, view.under(f"model.layers.{layer}."), layer, experts) for layer in layers]

    @property
    def replayable(self) -> bool:
        """Whether a step is the same calls every time, as far as the experts are concerned."""
        return all(layer.mlp.routed_experts.replayable for layer in self.layers if isinstance(layer.mlp, MoE))

    def new_cache(self, context: int, kind: Cache = Cache.BF16) -> LatentCache:
        """A cache of `context` tokens, empty, whose latents are kept as `ops.cache_kind` makes of `kind`."""
        first = self.layers[0]
        kept = ops.cache_kind(first.self_attn.w_uk.format, self.dtype, kind, first.where)
        return LatentCache(self.config, context, kept, self._allocate)

    @torch.inference_mode()
    def forward(self, ids: Tensor, cache: LatentCache) -> Tensor:
        """Run tokens ids (int64 [T]) after those in the cache, and add them to it -> hidden states [T, D].

        Raises:
            ContextLengthError: the cache has no room for them.
        """
        cache.make_room(len(ids))
        x = self.layers_of(ids, self.rotation(cache.length, len(ids)), cache)
        cache.advance(len(ids))
        return x

    def rotation(self, position: int, tokens: int) -> Tensor:
        """What rotates the rope parts of `tokens` from `position` on: complex64 [tokens, P/2]."""
        if tokens == 1:
            return self.rope.at(position)
        return self.rope.rotation(torch.arange(position, position + tokens))

    def layers_of(self, ids: Tensor, rotation: Tensor, cache: LatentCache) -> Tensor:
        """The step of `forward` but for counting its tokens: ids [T], rotation [T, P/2] -> [T, D]."""
        return self.through_layers(self.embed(ids), rotation, cache)

    def embed(self, ids: Tensor) -> Tensor:
        """ids [T] -> [T, D], in RAM."""
        return ops.embedding(ids, self.embed_tokens, self.dtype)

    def through_layers(self, x: Tensor, rotation: Tensor, cache: LatentCache, layers: int | None = None) -> Tensor:
        """x [T, D] through all layers, or the first so many -> [T, D], on the device of the last of them."""
        for layer in self.layers[:layers]:
            if x.device != layer.where:
                ops.use(layer.where)
                x, rotation = graphs.moved(x, layer.where), graphs.moved(rotation, layer.where)
            x = layer.forward(x, rotation, cache)
        return x

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states [T, D] -> fp32 logits [T, vocab_size], in RAM."""
        return self.head(hidden).cpu()

    def head(self, hidden: Tensor) -> Tensor:
        """Hidden states [T, D] -> fp32 logits [T, vocab_size], where the last layer is."""
        return ops.linear(ops.rms_norm(hidden, self.norm, self.config.rms_norm_eps), self.lm_head).float()


class DecodeStep:
    """One token after those in the cache, through the model and its head.

    The first run records what it calls, the others replay it (`kernels/cpu/recording.py`), with the same result to the
    last bit; where not all of it is native, every run is as the first.

    Attributes:
        recording: the calls; None before the first run, and for good where they cannot be replayed.
        ahead: False; a step is over when `begin` returns.
    """

    ahead = False

    def __init__(self, model: Transformer, cache: LatentCache) -> None:
        self.model, self.cache = model, cache
        self.recording: Recording | None = None
        self._recordable = model.replayable
        self._ids = torch.empty(1, dtype=torch.int64)
        self._rotation = torch.empty_like(model.rotation(0, 1))
        self._logits = torch.empty(0)  # where a replay leaves them

    @property
    def guesses(self) -> int:
        """How many tokens `begin` takes beside the first.

        Only where a step is all native is one of several tokens the same as one after the other, to the last bit.
        """
        return GUESSES if self.recording else 0

    def begin(self, tokens: list[int], params: SamplingParams) -> Outcomes:
        """Add tokens to the cache; the function that is returned tells what comes after each, and the seconds it took.

        Raises:
            ContextLengthError: the cache is full.
        """
        start = perf_counter()
        if len(tokens) == 1:
            logits = self.run(tokens[0])[None]
        else:
            logits = self.model.logits(self.model.forward(torch.tensor(tokens), self.cache))
        outcomes, seconds = [Outcome.known(row) for row in logits], perf_counter() - start
        return lambda: (outcomes, seconds)

    @torch.inference_mode()
    def run(self, token: int) -> Tensor:
        """Add `token` to the cache -> fp32 logits [vocab_size], which the next run may overwrite.

        Raises:
            ContextLengthError: the cache is full.
        """
        self.cache.make_room(1)
        self._ids.fill_(token)
        self._rotation.copy_(self.model.rotation(self.cache.length, 1))
        if self.recording:
            self.recording.replay()
        else:
            self._logits = self._record() if self._recordable else self._compute()
        self.cache.advance(1)
        return self._logits

    def _compute(self) -> Tensor:
        return self.model.logits(self.model.layers_of(self._ids, self._rotation, self.cache))[0]

    def _record(self) -> Tensor:
        recording = self.recording = ops.recording()
        try:
            with recording or nullcontext():
                logits = self._compute()
        except BaseException:  # half a step: the next run begins again
            self.recording = None
            raise
        self._recordable = recording is not None and recording.complete
        if not self._recordable:
            self.recording = None
        return logits
