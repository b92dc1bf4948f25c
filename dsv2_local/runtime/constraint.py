"""What an answer must look like, as the sampler and the engine see it; `text.grammar.Grammars` makes constraints."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray


class Constraint(Protocol):
    """Which tokens may come next in one answer; each token of the answer moves it on.

    One thread at a time may use it. All methods raise InputError if the grammar has become too complex to go on.
    """

    @property
    def ended(self) -> bool:
        """Whether the answer is complete and nothing may follow but an end token."""
        ...

    def forced(self) -> list[int]:
        """The next tokens, if they are certain: while there are some, nothing else may come. It must not be changed."""
        ...

    def mask(self) -> NDArray[np.bool_]:
        """Whether each token may come next, if none is forced: bool [vocabulary], of which at least one is true.

        End tokens are among them if the answer may end here. The result must not be changed. It is computed once for
        each state, so that this may be called ahead of time.
        """
        ...

    def accepts(self, tokens: Sequence[int]) -> int:
        """How many of these tokens, from the first on, may come next one after the other, if none is forced."""
        ...

    def advance(self, token: int) -> None:
        """Add a token to the answer; it must be allowed."""
        ...

    def copy(self) -> "Constraint":
        """One in the same state that moves on its own."""
        ...
