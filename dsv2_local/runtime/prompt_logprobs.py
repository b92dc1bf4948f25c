"""Log probabilities of the tokens of a prompt, which a prefill pass computes from its hidden states.

The logits of a whole prompt would take gigabytes, so they are reduced to what was asked for a few rows at a time. What
the prefix cache has of a prompt is computed again, since latents do not have logits.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from dsv2_local.kernels import ops

Head = Callable[[Tensor], Tensor]
"""Hidden states [T, D] -> logits [T, vocab_size]; see `runtime.model.Transformer.head`."""
ROWS = 64
"""Rows of logits that exist at a time: 26 MB for a vocabulary of 102,400, and as much for their logarithms."""


class TokenLogprob(NamedTuple):
    """How likely a token was after those before it.

    Attributes:
        token_id: the token.
        logprob: natural logarithm of its probability, before temperature and truncation.
        top_logprobs: the most likely tokens in its place as (token id, log probability), the most likely first. If it
            is one of them, both log probabilities are the same float.
    """

    token_id: int
    logprob: float
    top_logprobs: tuple[tuple[int, float], ...] = ()


class PromptLogprobs:
    """The log probabilities of one prompt, as far as it is computed.

    Attributes:
        entries: one for each token; the first one is None, since nothing is before it.
        finite: whether no logit was NaN or infinite so far.
    """

    def __init__(self, prompt: Sequence[int], top: int) -> None:
        """Nothing is computed yet; `top` is how many of the most likely tokens to note in each place."""
        self.entries: list[TokenLogprob | None] = [None]
        self.finite = True
        self._prompt, self._top = prompt, top
        self._computed = list[TokenLogprob]()  # by the pass in flight

    @property
    def read(self) -> int:
        """How many tokens, the first ones, have given their hidden states, which are not needed any more."""
        return len(self.entries) - 1

    @property
    def complete(self) -> bool:
        """Whether every token of the prompt has its entry."""
        return len(self.entries) == len(self._prompt)

    def pieces(self, head: Head, start: int, rows: slice) -> list[Callable[[Tensor], None]]:
        """The work to do with the hidden states [T, D] of a pass, in pieces; `take` it when all are done.

        Args:
            head: computes the logits.
            start: the place in the prompt of the first token that the pass computes.
            rows: where the pass has the tokens of this sequence.
        """
        self._computed = []
        first, end = max(start, self.read), min(start + rows.stop - rows.start, len(self._prompt) - 1)
        places = (range(at, min(at + ROWS, end)) for at in range(first, end, ROWS))
        return [partial(self._compute, head, places=each, offset=rows.start - start) for each in places]

    def take(self) -> None:
        """The pass is complete: keep what it has computed."""
        self.entries += self._computed
        self._computed = []

    @torch.inference_mode()
    def _compute(self, head: Head, hidden: Tensor, *, places: range, offset: int) -> None:
        """Compute the entries of the tokens that follow `places`, which are the rows `offset` further of `hidden`."""
        following = self._prompt[places.start + 1 : places.stop + 1]
        ops.use(hidden.device)  # a decode step on other devices may have come between
        logprobs = head(hidden[places.start + offset : places.stop + offset]).log_softmax(-1)
        own = logprobs.gather(1, torch.tensor(following, device=logprobs.device)[:, None])[:, 0]
        # A row with NaN or infinity is NaN in all places. An impossible token alone is -inf, and no fault.
        self.finite = self.finite and not bool(own.isnan().any())
        values, ids = logprobs.topk(min(self._top, logprobs.shape[1]))
        for token, logprob, *top in zip(following, own.tolist(), ids.tolist(), values.tolist(), strict=True):
            self._computed.append(TokenLogprob(token, logprob, tuple(zip(*top, strict=True))))
