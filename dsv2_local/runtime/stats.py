"""Statistics of one answer."""

from dataclasses import dataclass


@dataclass
class Stats:
    """Statistics of one generation, updated while it runs.

    Attributes:
        prompt_tokens: tokens of the prompt.
        reused_tokens: tokens of the prompt that were found in the prefix cache, or in the block store below it.
        restored_tokens: how many of these had to be brought back from RAM or from a file (`load(cache_dir=)`).
        prefill_seconds: time from the first chunk to the logits after the prompt.
        completion_tokens: generated tokens.
        decode_seconds: time of the model and the sampler for all generated tokens but the first; a step of several
            sequences counts for each of them.
        draft_tokens: draft tokens that were verified (speculative decoding).
        accepted_tokens: draft tokens that the sampler chose.
        context_used: tokens in the KV cache.
        context: maximum tokens of a sequence.
        finish_reason: "stop" (end token, stop string or the end of a grammar) or "length" (max_tokens or a full
            context); None while the generation runs, or if it was interrupted.
    """

    prompt_tokens: int = 0
    reused_tokens: int = 0
    restored_tokens: int = 0
    prefill_seconds: float = 0.0
    completion_tokens: int = 0
    decode_seconds: float = 0.0
    draft_tokens: int = 0
    accepted_tokens: int = 0
    context_used: int = 0
    context: int = 0
    finish_reason: str | None = None

    @property
    def prefill_tok_s(self) -> float:
        return (self.prompt_tokens - self.reused_tokens) / self.prefill_seconds if self.prefill_seconds else 0.0

    @property
    def decode_tok_s(self) -> float:
        """Tokens per second after the first token, whose time is part of the prefill."""
        return (self.completion_tokens - 1) / self.decode_seconds if self.decode_seconds else 0.0
