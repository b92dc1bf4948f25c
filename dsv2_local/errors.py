"""Every error that a user can meet; its message says what is wrong, where, and what to do.

Dsv2Error                    exit code 1
├── ConfigError              config.json lacks a value or has an impossible one
│   └── UnsupportedModelError    a valid model with a feature that is not implemented; the message names it
├── CheckpointError          a file or tensor is missing, truncated, corrupt or unknown
├── ConversionError          `dsv2 quantize` cannot start or continue
├── PlanError                the model does not fit in this machine's memory; has the shortfall and remedies
├── NonFiniteError           the model computed NaN or infinity; has the place
├── CacheFullError           running sequences hold all blocks of the KV cache
├── QueueFullError           as many requests wait as may wait
├── DeadlineError            a request was not complete when its time was over
├── SavedCacheError          a saved cache cannot be written or read, or belongs to another model
│   └── DamagedCacheError        its contents do not match their checksum
├── DeviceError              a copy or a kernel failed on a GPU
│   └── DeviceMemoryError        the GPU has less free memory than the plan assumed
├── OutputError              standard output cannot be written
├── BatchError               the output of `dsv2 run --batch` cannot be written or continued
├── ServerError              a server that is to answer is not there, or fails
├── HubError                 a hub repository cannot be reached, found or read
├── TemplateError            the chat template is missing or rejects the messages
└── InputError               exit code 2: the request itself is wrong
    └── ContextLengthError       the prompt is longer than the context; has both lengths
"""

LONGEST = 2000  # characters of an error's message


def one_line(text: str) -> str:
    """Text for a terminal: on one line, and what is no visible character as its number.

    Names of files and tensors, and what a chat template says, may come from anywhere; an escape sequence in them would
    otherwise take effect.
    """
    lines = " ".join(text.split("\n"))
    return "".join(letter if letter.isprintable() else _numbered(letter) for letter in lines)


def _numbered(letter: str) -> str:
    return letter.encode("unicode_escape", "backslashreplace").decode("ascii")


class Dsv2Error(Exception):
    """Base of all errors that are raised on purpose; its message is one line of visible characters."""

    exit_code = 1

    def __init__(self, message: str = "") -> None:
        line = one_line(message[: LONGEST + 1])
        super().__init__(line if len(line) <= LONGEST else line[:LONGEST] + "…")


class ConfigError(Dsv2Error):
    """config.json lacks a value or has an impossible one."""


class UnsupportedModelError(ConfigError):
    """The model is valid but uses a feature that this runtime does not implement."""


class CheckpointError(Dsv2Error):
    """A file or tensor of a checkpoint is missing, truncated, corrupt or unknown."""


class ConversionError(Dsv2Error):
    """A conversion cannot start or continue: no disk space, destination in use, or begun from another source."""


class PlanError(Dsv2Error):
    """A model does not fit in memory.

    Attributes:
        where: the memory that is too small, "RAM" or "GPU n".
        shortfall: bytes that this memory lacks.
        remedies: command-line options, each of which alone makes the model fit.
    """

    def __init__(self, where: str, shortfall: int, remedies: tuple[str, ...] = ()) -> None:
        self.where, self.shortfall, self.remedies = where, shortfall, remedies
        helps = (
            f"; any one of these options makes it fit: {'; '.join(remedies)}"
            if remedies
            else "; no single option makes it fit (`dsv2 plan` shows what uses the memory)"
        )
        super().__init__(f"the model does not fit: {where} lacks {shortfall / 2**30:,.2f} GiB{helps}")


class NonFiniteError(Dsv2Error):
    """The model computed NaN or infinity, so that there is no answer.

    Attributes:
        where: the part of the model whose output was the first that is not finite.
    """

    def __init__(self, where: str) -> None:
        self.where = where
        super().__init__(
            f"the model computed NaN or infinity in {where}: its files are damaged, or its weights too large; "
            "compare the files with their checksums (dsv2 inspect --verify MODEL)"
        )


class CacheFullError(Dsv2Error):
    """Running sequences hold all blocks of the KV cache, so that none can be allocated or evicted.

    Attributes:
        tokens: capacity of the cache.
    """

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens
        super().__init__(
            f"the KV cache is full: running sequences hold all of its {tokens:,} tokens; close one of them or raise "
            "--context"
        )


class QueueFullError(Dsv2Error):
    """As many requests wait as may wait, so that no further one is taken.

    Attributes:
        waiting: how many requests wait.
    """

    def __init__(self, waiting: int) -> None:
        self.waiting = waiting
        super().__init__(f"the queue is full: {waiting:,} requests wait; send this one again when some have ended")


class DeadlineError(Dsv2Error):
    """A request was not complete when its time was over."""

    def __init__(self, seconds: float) -> None:
        super().__init__(f"the answer was not complete after {seconds:g} seconds; allow more time, or ask for less")


class SavedCacheError(Dsv2Error):
    """A saved cache cannot be written or read, is damaged, or belongs to another model."""


class DamagedCacheError(SavedCacheError):
    """The contents of a saved cache do not match their checksum."""


class DeviceError(Dsv2Error):
    """A copy or a kernel failed on a GPU."""


class DeviceMemoryError(DeviceError):
    """A GPU has less free memory than the plan assumed.

    Attributes:
        requested: bytes of the allocation that failed.
        free: bytes that were free.
    """

    def __init__(self, device: str, requested: int, free: int) -> None:
        self.requested, self.free = requested, free
        super().__init__(
            f"{device} is out of memory: {requested / 2**30:,.2f} GiB requested, {free / 2**30:,.2f} GiB free; another "
            "program has taken memory since the plan was made: close it, or set a lower --vram"
        )


class OutputError(Dsv2Error, OSError):
    """Standard output is closed or full; an OSError too, as what a stream raises."""


class BatchError(Dsv2Error):
    """The output of a batch cannot be written, belongs to other lines, or is written by another process."""


class ServerError(Dsv2Error):
    """A server that is to answer is not there, is no such server, refuses the key, or fails."""


class HubError(Dsv2Error):
    """A hub repository cannot be reached, found or read."""


class TemplateError(Dsv2Error):
    """The checkpoint has no chat template, or the template rejects the messages."""


class InputError(Dsv2Error):
    """The request is wrong: a parameter out of range, an empty prompt."""

    exit_code = 2


class ContextLengthError(InputError):
    """The prompt and one new token do not fit in the context.

    Attributes:
        prompt_tokens: tokens of the prompt, or the fewest that it can have.
        context: tokens that the context holds.
    """

    def __init__(self, prompt_tokens: int, context: int, *, at_least: bool = False) -> None:
        self.prompt_tokens = prompt_tokens
        self.context = context
        count = f"{'at least ' if at_least else ''}{prompt_tokens:,}"
        super().__init__(
            f"the prompt has {count} tokens and the context holds {context:,} "
            "(one more is needed for the answer); shorten it or raise --context"
        )
