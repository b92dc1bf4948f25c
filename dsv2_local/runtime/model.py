"""The architecture of DeepSeek-V2: multi-head latent attention (MLA) and mixture of experts (MoE).

Shapes: `T` tokens of this step, of one or several sequences, `H` heads, `N` qk_nope_head_dim, `P` qk_rope_head_dim,
`V` v_head_dim, `C` kv_lora_rank, `D` hidden_size, `E` routed experts, `K` experts per token.

Modules and weights have the checkpoint's names; the mathematics is that of the paper (arXiv 2405.04434) and of the
released modelling code. A `capture` argument is the piecewise CUDA graph that the step is being captured into; None:
the step runs now.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, cast

import torch
from torch import Tensor

from dsv2_local.architectures.config import ModelConfig
from dsv2_local.kernels import graphs, ops
from dsv2_local.kernels.format import CacheDtype
from dsv2_local.kernels.graphs import PiecewiseGraph
from dsv2_local.kernels.layout import Matrix
from dsv2_local.runtime.batch import Batch, Part
from dsv2_local.runtime.cache import Allocate, LatentCache
from dsv2_local.runtime.rope import Rope

# The released code has this constant in the norms of the query and the latent, whatever rms_norm_eps is.
LATENT_NORM_EPS = 1e-6

Weights = dict[str, Matrix | Tensor]


class Experts(Protocol):
    """The routed experts of all layers, wherever they are stored and computed.

    Attributes:
        replayable: whether every step makes the same kernel calls, so that a CPU step can be recorded and replayed.
    """

    replayable: bool

    def start(
        self, layer: int, x: Tensor, ids: Tensor, weights: Tensor, capture: PiecewiseGraph | None = None
    ) -> Callable[[], Tensor]:
        """Start the work that can overlap with the caller's; the returned function finishes it.

        Args:
            layer: index of the layer in the model.
            x: [T, D]; it and the other tensors are on the layer's device.
            ids: int64 [T, K], the experts that the router chose.
            weights: fp32 [T, K].
            capture: see the top of this file.

        Returns:
            A function that returns Σₖ weights[t, k] · expert[ids[t, k]](x[t]), [T, D]. It must be called once, before
            the next `start`.
        """
        ...


@dataclass(frozen=True)
class WeightView:
    """The weights whose names begin with a prefix, so that a module uses names relative to itself."""

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
    """Multi-head latent attention. The KV cache stores only the normed latent and the rotated rope key of a token."""

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

    def forward(self, x: Tensor, rotation: Tensor, batch: Batch) -> Tensor:
        """x [T, D], the tokens of a batch -> [T, D]."""
        c, T = self.config, x.shape[0]
        q = self.query(x).view(T, c.num_attention_heads, c.qk_head_dim)  # [T, H, N + P]
        kv_a = ops.linear(x, self.kv_a_proj_with_mqa)  # [T, C + P]
        latents, metadata = batch.layers[self.layer]  # [blocks, CACHE_BLOCK, …]
        ops.write_latents(latents, metadata, kv_a, self.kv_a_layernorm, LATENT_NORM_EPS, rotation)
        out = ops.attention(q, rotation, latents, metadata, self.w_uk, self.w_uv, c.softmax_scale)  # [T, H·V]
        return ops.linear(out, self.o_proj)

    def query(self, x: Tensor) -> Tensor:
        """x [T, D] -> [T, H·(N + P)], through the low-rank projection if the model has one."""
        if not self.low_rank_query:
            return ops.linear(x, self.q_proj)
        return ops.linear(
            ops.rms_norm(ops.linear(x, self.q_a_proj), self.q_a_layernorm, LATENT_NORM_EPS), self.q_b_proj
        )


class MLP:
    """down(silu(gate(x)) · up(x)): the feed-forward of a dense layer, or the shared experts of an MoE layer."""

    def __init__(self, weights: WeightView) -> None:
        self.gate_proj = weights.matrix("gate_proj.weight")
        self.up_proj = weights.matrix("up_proj.weight")
        self.down_proj = weights.matrix("down_proj.weight")

    def forward(self, x: Tensor) -> Tensor:
        """x [T, D] -> [T, D]."""
        return ops.swiglu(x, self.gate_proj, self.up_proj, self.down_proj)


class MoE:
    """Mixture of experts: routed experts, chosen for each token, plus the shared experts, which every token uses."""

    def __init__(self, config: ModelConfig, weights: WeightView, layer: int, experts: Experts) -> None:
        self.config, self.layer = config, layer
        self.gate = weights.tensor("gate.weight")  # [E, D]
        self.shared_experts = MLP(weights.under("shared_experts.")) if config.n_shared_experts else None
        self.routed_experts = experts

    def forward(self, x: Tensor, capture: PiecewiseGraph | None = None) -> Tensor:
        """x [T, D] -> [T, D]. The shared experts are computed while missing routed experts are copied to the GPU."""
        ids, weights = ops.route(x, self.gate, self.config)
        routed = self.routed_experts.start(self.layer, x, ids, weights, capture)
        if not self.shared_experts:
            return routed()
        shared = self.shared_experts.forward(x)
        return ops.add(routed(), shared)


class Block:
    """One layer: attention, then MLP or MoE, each with a norm before it and a residual connection around it."""

    def __init__(self, config: ModelConfig, weights: WeightView, layer: int, experts: Experts) -> None:
        self.eps = config.rms_norm_eps
        self.input_layernorm = weights.tensor("input_layernorm.weight")
        self.post_attention_layernorm = weights.tensor("post_attention_layernorm.weight")
        self.self_attn = Attention(config, weights.under("self_attn."), layer)
        mlp = weights.under("mlp.")
        self.mlp: MLP | MoE = MoE(config, mlp, layer, experts) if config.is_moe(layer) else MLP(mlp)

    @property
    def device(self) -> torch.device:
        """The device of the layer's weights and activations."""
        return self.input_layernorm.device

    def attend(self, x: Tensor, rotation: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """The first half, x [T, D] -> x after attention, and the input of the MLP."""
        attended = self.self_attn.forward(ops.rms_norm(x, self.input_layernorm, self.eps), rotation, batch)
        return ops.add_rms_norm(x, attended, self.post_attention_layernorm, self.eps)

    def feed_forward(self, x: Tensor, normed: Tensor, capture: PiecewiseGraph | None = None) -> Tensor:
        """The second half, from what `attend` returns -> [T, D]."""
        mlp = self.mlp.forward(normed, capture) if isinstance(self.mlp, MoE) else self.mlp.forward(normed)
        return ops.add(x, mlp)


class Transformer:
    """The whole model. Activations move to the device of each layer's weights."""

    def __init__(
        self,
        config: ModelConfig,
        weights: Weights,
        experts: Experts,
        dtype: torch.dtype,
        allocate: Sequence[Allocate] | None = None,
    ) -> None:
        """Assemble the layers from their weights.

        Args:
            config: the architecture.
            weights: all but the routed experts, by their names in the checkpoint.
            experts: the routed experts of all layers.
            dtype: type of the activations, float32 or bfloat16.
            allocate: for each layer, the function that allocates its part of a KV cache; None: RAM.
        """
        view = WeightView(weights, "")
        self.config, self.dtype, self._allocate = config, dtype, allocate
        self.rope = Rope(config)
        self.embed_tokens = view.matrix("model.embed_tokens.weight")
        tied = "lm_head.weight" not in weights  # in RAM; on a GPU the head is a copy, since the embedding stays in RAM
        self.lm_head = self.embed_tokens if tied else view.matrix("lm_head.weight")
        self.norm = view.tensor("model.norm.weight")
        layers = range(config.num_hidden_layers)
        self.layers = [Block(config, view.under(f"model.layers.{layer}."), layer, experts) for layer in layers]

    @property
    def replayable(self) -> bool:
        """Whether the routed experts allow a CPU step to be recorded and replayed (see `Experts`)."""
        return all(layer.mlp.routed_experts.replayable for layer in self.layers if isinstance(layer.mlp, MoE))

    def new_cache(self, context: int, dtype: CacheDtype) -> LatentCache:
        """An empty KV cache for `context` tokens; `dtype` is what `ops.cache_dtype` returns for this model."""
        return LatentCache(self.config, context, dtype, self._allocate)

    def new_batch(self, cache: LatentCache, counts: Sequence[int], chunks: Sequence[int] | None = None) -> Batch:
        """An empty batch for so many tokens of each sequence.

        Args:
            cache: the KV cache of the sequences.
            counts: tokens of each sequence.
            chunks: sizes of the chunks that the tokens belong to, which decide the form of attention; None: `counts`.
        """
        most = ops.most_absorbed(self.config)
        return Batch(cache, self.rope, counts, [chunk <= most for chunk in chunks or counts])

    @torch.inference_mode()
    def forward(self, cache: LatentCache, parts: Sequence[Part]) -> Tensor:
        """Run tokens of sequences after those that each has in the cache, and append them -> hidden states [T, D].

        Raises:
            ContextLengthError: the tokens of a sequence do not fit in the context.
            CacheFullError: there are not enough blocks.
        """
        batch = self.new_batch(cache, [len(tokens) for _, tokens in parts])
        batch.fill(parts)
        x = self.layers_of(batch)
        batch.advance()
        return x

    def layers_of(self, batch: Batch) -> Tensor:
        """The tokens of a filled batch through all layers -> [T, D]; it does not advance the sequences."""
        return self.through_layers(self.embed(batch.ids), batch.rotation, batch)

    def embed(self, ids: Tensor) -> Tensor:
        """ids [T] -> [T, D], in RAM."""
        return ops.embedding(ids, self.embed_tokens, self.dtype)

    def through_layers(
        self,
        x: Tensor,
        rotation: Tensor,
        batch: Batch,
        layers: int | None = None,
        capture: PiecewiseGraph | None = None,
    ) -> Tensor:
        """x [T, D] through all layers, or the first `layers` of them -> [T, D] on the last layer's device."""
        for output in self._outputs(x, rotation, batch, layers, capture):
            x = output
        return x

    def _outputs(
        self,
        x: Tensor,
        rotation: Tensor,
        batch: Batch,
        layers: int | None = None,
        capture: PiecewiseGraph | None = None,
    ) -> Iterator[Tensor]:
        """The output of each half of a layer in turn: [T, D] on its device."""
        for layer in self.layers[:layers]:
            ops.use(layer.device)
            if x.device != layer.device:
                x, rotation = (graphs.to_device(tensor, layer.device, capture) for tensor in (x, rotation))
            x, normed = layer.attend(x, rotation, batch)
            yield x
            ops.use(layer.device)
            x = layer.feed_forward(x, normed, capture)
            yield x

    @torch.inference_mode()
    def in_pieces(self, batch: Batch) -> Iterator[Tensor]:
        """`layers_of`, as an iterator that computes half a layer at a time: the last [T, D] is the result.

        Other batches, of other sequences, may be computed between two pieces.
        """
        yield from self._outputs(self.embed(batch.ids), batch.rotation, batch)

    @torch.inference_mode()
    def find_non_finite(self, cache: LatentCache, part: Part) -> str | None:
        """Run tokens as `forward` does; returns the first part whose output has NaN or infinity, or None."""
        batch = self.new_batch(cache, [len(part[1])])
        batch.fill([part])
        x = self.embed(batch.ids)
        if not x.isfinite().all():
            return "the embedding"
        for half, output in enumerate(self._outputs(x, batch.rotation, batch)):
            if not (x := output).isfinite().all():
                return f"layer {half // 2}"
        batch.advance()
        return None if self.head(x).isfinite().all() else "the last norm or the head"

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states [T, D] -> fp32 logits [T, vocab_size], in RAM."""
        return self.head(hidden).cpu()

    def head(self, hidden: Tensor) -> Tensor:
        """Hidden states [T, D] -> fp32 logits [T, vocab_size], on the device of the last layer."""
        return ops.linear(ops.rms_norm(hidden, self.norm, self.config.rms_norm_eps), self.lm_head).float()
