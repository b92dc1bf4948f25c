"""What an answer is made of, as it arrives: pieces of text, and pieces of calls of functions."""

from dataclasses import dataclass


@dataclass(frozen=True)
class CallDelta:
    """A piece of a call.

    Attributes:
        index: which call of the answer it belongs to, from 0 on.
        id: of the call; only in its first piece.
        name: of the function; only in the first piece of a call.
        arguments: the next piece of the arguments' JSON text, as the model wrote it; empty in the first piece.
    """

    index: int
    id: str = ""
    name: str = ""
    arguments: str = ""


@dataclass(frozen=True)
class ToolCall:
    """A call of a function; `arguments` is JSON text as the model wrote it, cut off if the answer was."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True)
class Chunk:
    """A piece of the answer: one token, and the text that is final with it (often a word, sometimes nothing).

    Attributes:
        text: the text; empty while the token ends inside a character, or may begin a stop string.
        token_id: the token; None for a last chunk, with the text that was held back until the end.
        logprob: natural logarithm of the token's probability, before temperature and truncation; None unless requested.
        top_logprobs: the most likely tokens of this step as (token id, log probability), the most likely first; empty
            unless requested.
        calls: pieces of calls of functions, in their order.
    """

    text: str
    token_id: int | None = None
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()
    calls: tuple[CallDelta, ...] = ()
