"""Renders a conversation with a checkpoint's chat template, as the text format that the model was trained on."""

from collections.abc import Mapping, Sequence

from jinja2 import TemplateError as JinjaError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from dsv2_local.errors import TemplateError

Message = Mapping[str, str]
"""A message with the keys `role` (system, user or assistant) and `content`."""


def render(template: str, messages: Sequence[Message], **variables: object) -> str:
    """Render `messages` with a Jinja template, in a sandbox; `variables` are the other names that it may use.

    Raises:
        TemplateError: the template is damaged, or rejects the messages.
    """
    try:
        return _environment().from_string(template).render(messages=messages, **variables)
    except (JinjaError, TypeError, ValueError) as error:
        raise TemplateError(f"the chat template rejects these messages: {error}") from None


def _environment() -> ImmutableSandboxedEnvironment:
    def raise_exception(message: str) -> None:
        raise JinjaError(message)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = raise_exception
    return environment
