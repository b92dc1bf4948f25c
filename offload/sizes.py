"""Bytes that each part of a model takes. Pure, no torch."""

from dataclasses import dataclass
from functools import cached_property, lru_cache
from math import prod

from dsv2_local.architectures.tensors import Kind, TensorSpec
from dsv2_local.kernels.format import CACHE_BLOCK, REBUILT_NUMBERS, blocks_for
from dsv2_local.offload.plan_request import PlanRequest
from dsv2_local.quant.schema import active_weights, dense_files, expert_layout, stored_bytes

GB, GIB, MIB = 10**9, 1 << 30, 1 << 20

STAGING_BUFFERS = 3
STAGING_BYTES = 320 * MIB  # maximum of one buffer: large enough for copies at the full speed of the PCIe link
PAIRS_AT_ONCE = 8192  # token-expert pairs whose outputs are in memory at a time if experts are offloaded
KEY_BLOCK = 4096  # cached positions whose keys and values the CPU rebuilds at a time
GPU_ACTIVATION_BYTES = 2
RECORDED_ROWS = 16  # the most sequences of a decode step that is recorded on the CPU
GRAPH_ROWS = (1, 2, 4, 8, 16)  # sequences of the decode steps that are captured in CUDA graphs
DRAFT_ROWS = 5  # rows of the one with draft tokens (`runtime/gpu_step.py: DRAFT`)
GRAPH_BYTES = 64 * MIB  # workspace of these graphs, which share their memory; their logits come on top


@dataclass(frozen=True)
class Sizes:
    """Sizes of a request's parts, in bytes unless stated otherwise."""

    request: PlanRequest

    @cached_property
    def expert(self) -> int:
        """One routed expert; 0 if the model has none."""
        return expert_layout(self.request.config, self.request.recipe).nbytes if self.request.config.moe_layers else 0

    @cached_property
    def _files(self) -> list[list[TensorSpec]]:
        """Tensors outside the layers, then the tensors of each layer."""
        return list(dense_files(self.request.config).values())

    @cached_property
    def layers(self) -> list[int]:
        """Dense weights of each layer."""
        return [self._stored(specs) for specs in self._files[1:]]

    @cached_property
    def embedding(self) -> int:
        return self._stored([spec for spec in self._files[0] if spec.kind is Kind.EMBEDDING])

    @cached_property
    def head(self) -> int:
        """Final norm and LM head; a head that is tied to the embedding is a second copy on a GPU."""
        head = self._stored([spec for spec in self._files[0] if spec.kind is not Kind.EMBEDDING])
        return head + (self.embedding if self.request.config.tie_word_embeddings else 0)

    @property
    def experts_per_token(self) -> int:
        """The routed experts that one token uses."""
        return len(self.request.config.moe_layers) * self.request.config.num_experts_per_tok * self.expert

    @cached_property
    def flops(self) -> float:
        """FLOPs per token: two for each active weight. Products of queries with the KV cache are not counted."""
        return 2.0 * active_weights(self.request.config)

    def _stored(self, specs: list[TensorSpec]) -> int:
        """Bytes in memory, where norms and routers are converted to fp32."""
        recipe = self.request.recipe
        return sum(stored_bytes(spec, recipe) if spec.quantised else 4 * prod(spec.shape) for spec in specs)

    def latent_cache(self, layers: int) -> int:
        """KV cache of `layers` layers for the whole context, in whole blocks."""
        tokens = blocks_for(self.request.context) * CACHE_BLOCK
        return layers * tokens * self.request.cache_dtype.bytes_per_token_and_layer(self.request.config)

    def workspace(self, where: str, chunk: int, staged: bool = False) -> int:
        """Peak of a step beside weights and KV cache: activations of a chunk, rebuilt keys and values, and logits.

        Args:
            where: "cpu" or "gpu".
            chunk: tokens per prefill step.
            staged: whether experts are offloaded, so that outputs of single experts are stored too.
        """
        tokens = min(chunk, self.request.context)
        return self._on_gpu(tokens, staged) if where == "gpu" else self._on_cpu(tokens)

    def _on_cpu(self, tokens: int) -> int:
        c, positions = self.request.config, min(KEY_BLOCK, self.request.context)
        hidden = 6 * tokens * c.hidden_size
        attention = (tokens + positions) * c.num_attention_heads * (c.qk_head_dim + c.v_head_dim)
        experts = 2 * tokens * max(c.num_experts_per_tok * c.moe_intermediate_size, c.intermediate_size)
        recorded = sum(range(1 + min(self.request.parallel, RECORDED_ROWS)))  # rows of the logits of all steps
        return 4 * (hidden + attention + experts + c.vocab_size * (1 + recorded))

    def _on_gpu(self, tokens: int, staged: bool) -> int:
        """The larger of what attention and what an MLP holds at its peak."""
        c, heads, size = self.request.config, self.request.config.num_attention_heads, GPU_ACTIVATION_BYTES
        head_numbers = c.qk_nope_head_dim + c.v_head_dim  # that are rebuilt for a position
        rebuilt = min(REBUILT_NUMBERS, self.request.context * heads * head_numbers)
        up_projections = heads * c.kv_lora_rank * head_numbers  # of latents, dequantised
        queries = tokens * heads * (c.qk_head_dim + c.v_head_dim)
        attention = size * (2 * tokens * c.hidden_size + queries + rebuilt + up_projections)
        pairs = min(tokens * c.num_experts_per_tok, PAIRS_AT_ONCE if staged else 1 << 62)
        outputs = pairs * (4 * c.hidden_size + size * c.moe_intermediate_size)
        inner = size * tokens * c.intermediate_size
        mlp = size * 6 * tokens * c.hidden_size + max(inner, outputs)
        # Of a prompt, and of each captured step: those of up to `parallel` sequences, and of the next larger number.
        captured = sum(rows for rows in GRAPH_ROWS if rows < 2 * self.request.parallel)
        logits = 4 * c.vocab_size * (1 + captured + DRAFT_ROWS)
        return max(attention, mlp) + GRAPH_BYTES + logits

    @property
    def staging_experts(self) -> int:
        """Experts that one staging buffer holds: a layer's experts, or as many as fit in `STAGING_BYTES`."""
        return min(self.request.config.n_routed_experts, max(1, STAGING_BYTES // self.expert)) if self.expert else 0

    @property
    def staging(self) -> int:
        """All staging buffers of a GPU."""
        return STAGING_BUFFERS * self.staging_experts * self.expert


@lru_cache(256)
def sizes_of(request: PlanRequest) -> Sizes:
    """The sizes of a request, cached because plans are made many times while remedies are tried."""
    return Sizes(request)
