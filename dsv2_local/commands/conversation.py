"""A conversation: its messages and settings, and their JSON form for a session file."""

import json
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from dsv2_local.errors import InputError
from dsv2_local.options import DRAW, drawn_seed
from dsv2_local.runtime.sampling_params import SamplingParams

SETTINGS = {
    "max_tokens": int,
    **{f.name: int if f.name in ("top_k", "seed") else float for f in fields(SamplingParams) if f.name != "logit_bias"},
}
"""The settings that a chat can change, with their types: max_tokens and the sampling parameters but the logit bias."""

Message = dict[str, str]


@dataclass
class Conversation:
    """A conversation with the model.

    Attributes:
        system: the system message, if there is one.
        settings: sampling parameters and `max_tokens`; those that are missing have the model's defaults.
        messages: questions and answers in turn, without the system message.
    """

    system: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    messages: list[Message] = field(default_factory=list)

    def prompt(self, messages: list[Message] | None = None) -> list[Message]:
        """The messages for the chat template, the system message first; `messages` replaces the conversation's own."""
        head = [{"role": "system", "content": self.system}] if self.system else []
        return head + (self.messages if messages is None else messages)

    def ask(self, text: str) -> None:
        self.messages.append({"role": "user", "content": text})

    def answer(self, text: str) -> None:
        self.messages.append({"role": "assistant", "content": text})

    @property
    def unanswered(self) -> bool:
        """Whether the last message is a question."""
        return bool(self.messages) and self.messages[-1]["role"] == "user"

    @property
    def turns(self) -> int:
        """Number of questions, with or without an answer."""
        return sum(message["role"] == "user" for message in self.messages)

    def undo(self) -> str | None:
        """Remove the last question and its answer; returns the question, or None if there is none."""
        while self.messages:
            message = self.messages.pop()
            if message["role"] == "user":
                return message["content"]
        return None

    def set(self, name: str, value: str) -> None:
        """Change a setting; "-" resets it to the model's default.

        Raises:
            InputError: there is no such setting, or the value is out of range.
        """
        if name not in SETTINGS:
            raise InputError(f"there is no setting {name}; the settings are {', '.join(SETTINGS)}")
        if value == "-":
            self.settings.pop(name, None)
            return
        try:
            number = SETTINGS[name](value)
        except ValueError:
            raise InputError(f"{name} must be a number, not {value}") from None
        if name == "max_tokens" and number < 1:
            raise InputError(f"max_tokens must be at least 1, not {number}")
        if name != "max_tokens":
            SamplingParams().override(**{name: number})  # raises if the value is out of range
        self.settings[name] = drawn_seed() if (name, number) == ("seed", DRAW) else number

    def to_text(self, model: str) -> str:
        """The conversation and the name of its model, as JSON."""
        return json.dumps({"model": model, **asdict(self)})

    @classmethod
    def from_text(cls, text: str) -> tuple[str, "Conversation"]:
        """Parse the result of `to_text`; returns the model's name and the conversation.

        Raises:
            InputError: the text is damaged.
        """
        try:
            raw = json.loads(text)
            messages = [{"role": str(m["role"]), "content": str(m["content"])} for m in raw["messages"]]
            if [m["role"] for m in messages] != ["user", "assistant"] * (len(messages) // 2):
                raise TypeError("questions and answers must alternate")
            if not isinstance(raw["system"], str | None):
                raise TypeError("the system message is not text")
            loaded = cls(raw["system"], {}, messages)
            for name, value in raw["settings"].items():
                loaded.set(name, str(value))
            model = "".join(letter for letter in raw["model"] if letter.isprintable())
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise InputError("its conversation is damaged") from None
        return model, loaded
