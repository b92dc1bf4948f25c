"""Every error a user can meet; each says what is wrong, where, and what to do.

Dsv2Error                    exit code 1
├── ConfigError              config.json is missing a value or has a wrong one
│   └── UnsupportedModelError    a sound model of a kind that is not supported, refused by name
├── CheckpointError          a file or tensor is missing, truncated, corrupt or unknown
├── ConversionError          `dsv2 quantize` cannot start or go on
├── PlanError                the model does not fit in this machine's memory; carries shortfall and remedies
├── CacheFullError           sequences hold all pages of the latent cache
├── SavedCacheError          a saved cache cannot be written or read, or belongs to another model
├── DeviceError              a GPU failed at a copy or at computing
│   └── DeviceMemoryError        it has less memory than the plan counted on
├── HubError                 a repository cannot be reached or read
├── TemplateError            the chat template is missing or refuses the messages
└── InputError               exit code 2: the request itself is wrong
    └── ContextLengthError       more tokens than the context holds; carries both numbers
"""


class Dsv2Error(Exception):
    """Base of all errors raised on purpose; the command line prints its text in one line."""

    exit_code = 1


class ConfigError(Dsv2Error):
    """config.json lacks a value or holds an impossible one."""


class UnsupportedModelError(ConfigError):
    """The model is sound but uses something that this runtime does not implement."""


class CheckpointError(Dsv2Error):
    """A checkpoint's file or tensor is missing, truncated, corrupt or unknown."""


class ConversionError(Dsv2Error):
    """A conversion cannot start or go on: no space, destination in use, another source."""


class PlanError(Dsv2Error):
    """A model does not fit.

    Attributes:
        where: the memory that is too small, "RAM" or "GPU n".
        shortfall: bytes that it lacks.
        remedies: options of which each alone makes it fit.
    """

    def __init__(self, where: str, shortfall: int, remedies: tuple[str, ...] = ()) -> None:
        self.where, self.shortfall, self.remedies = where, shortfall, remedies
        helps = (
            f"; any one of these makes it fit: {'; '.join(remedies)}"
            if remedies
            else "; no single change helps (`dsv2 plan` shows what takes it)"
        )
        super().__init__(f"it does not fit: {where} lacks {shortfall / 2**30:,.2f} GiB{helps}")


class CacheFullError(Dsv2Error):
    """Sequences that are held together fill the latent cache.

    Attributes:
        tokens: that it has room for.
    """

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens
        super().__init__(
            f"the cache has room for {tokens:,} tokens and sequences hold it all; close one of them or raise --context"
        )


class SavedCacheError(Dsv2Error):
    """A saved cache cannot be written or read, is damaged, or belongs to another model."""


class DeviceError(Dsv2Error):
    """A GPU failed at a copy or at computing."""


class DeviceMemoryError(DeviceError):
    """A GPU has less memory than the plan counted on.

    Attributes:
        requested, free: bytes.
    """

    def __init__(self, device: str, requested: int, free: int) -> None:
        self.requested, self.free = requested, free
        super().__init__(
            f"{device} lacks memory: {requested / 2**30:,.2f} GiB asked for, {free / 2**30:,.2f} GiB free; something "
            "else has taken it since the plan was made: close that, or give less with --vram"
        )


class HubError(Dsv2Error):
    """A hub repository cannot be reached, found or read."""


class TemplateError(Dsv2Error):
    """The checkpoint has no chat template, or the template refuses these messages."""


class InputError(Dsv2Error):
    """The request is wrong: a parameter out of range, an empty prompt."""

    exit_code = 2


class ContextLengthError(InputError):
    """The prompt (and at least one new token) does not fit in the context.

    Attributes:
        prompt_tokens: tokens in the prompt.
        context: tokens the loaded context holds.
    """

    def __init__(self, prompt_tokens: int, context: int) -> None:
        self.prompt_tokens = prompt_tokens
        self.context = context
        super().__init__(
            f"the prompt has {prompt_tokens:,} tokens and the context holds {context:,} "
            "(one more is needed for the answer); shorten it or raise --context"
        )
