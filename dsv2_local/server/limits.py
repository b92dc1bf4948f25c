"""How much of the server one client may take: bytes, connections and time, with the reasons."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Bounds that hold before the model is asked; a client that exceeds one gets an error or is cut off.

    Attributes:
        connections: open at once. Clients keep a few each; a process may open 1,024 files by default, and the
            model's are among them.
        head_bytes: of a request's line and headers together; clients send one or two thousand.
        head_seconds: from connecting, or from the first byte of a further request, to the end of its headers. They fit
            in one packet, so only a client that holds connections on purpose takes longer.
        keep_alive_seconds: of silence between two requests. Longer than the pools of the usual clients keep
            connections, so that they do not send a request into one that is just being closed.
        body_bytes: of a body. 128K tokens are about half a million bytes of text, three million as escapes.
        bodies_bytes: of all bodies that are arriving or being answered, together: a request has several times its body
            in memory, also while it waits for the model to be loaded.
        body_seconds: from the headers to the end of a body.
        body_pause_seconds: between two pieces of a body.
        stalled_seconds: that a client may leave its answer unread once the buffers are full. They hold some hundred
            kilobytes, more than most answers have, so that a reader who waits for a pager is not cut off.
    """

    connections: int = 512
    head_bytes: int = 1 << 16
    head_seconds: float = 15.0
    keep_alive_seconds: float = 75.0
    body_bytes: int = 1 << 24
    bodies_bytes: int = 1 << 28
    body_seconds: float = 120.0
    body_pause_seconds: float = 20.0
    stalled_seconds: float = 120.0


USUAL = Limits()
MOST_ITEMS = {
    "messages": 20_000, "input": 20_000, "tools": 1_000, "functions": 1_000, "stop": 256, "stop_sequences": 256,
    "prompt": 1_000_000, "tokens": 1_000_000,
}  # fmt: skip
"""Entries of a list in a body. Templates walk through messages and tools before anybody knows whether the prompt fits,
and each new token is compared with the stop strings, by the thread that computes for all."""
