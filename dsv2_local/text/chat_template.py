"""A checkpoint's chat template: a conversation written as the one text that the model was trained on."""

from collections.abc import Mapping, Sequence

from jinja2 import TemplateError as JinjaError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from dsv2_local.errors import TemplateError

Message = Mapping[str, str]
"""With `role` (system, user, assistant) and `content`."""


def render(template: str, messages: Sequence[Message], **variables: object) -> str:
    """The conversation as the Jinja template writes it; `variables` are the other names that it may use.

    Raises:
        TemplateError: the template is damaged, or refuses the messages.
    """
    try:
        return _environment().from_string(template).render(messages=messages, **variables)
    except (JinjaError, TypeError, ValueError) as error:
        raise TemplateError(f"the chat template refuses these messages: {error}") from None


def _environment() -> ImmutableSandboxedEnvironment:
    def raise_exception(message: str) -> None:
        raise JinjaError(message)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = raise_exception
    return environment
