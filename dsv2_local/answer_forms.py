"""What an answer must look like: schema, grammar, regular expression and tools of a request as one constraint."""

from collections.abc import Callable
from typing import Any

from dsv2_local.errors import InputError
from dsv2_local.runtime.constraint import Constraint
from dsv2_local.text import grammar
from dsv2_local.text.chat import ChatPrompt, Chats
from dsv2_local.text.grammar import Grammars
from dsv2_local.text.tools.functions import Function


class AnswerForms:
    """Makes constraints for one model. Several threads may use it."""

    def __init__(self, grammars: Callable[[], Grammars]) -> None:
        """`grammars` compiles them; asked when there is one, since making it takes up to a second."""
        self._grammars = grammars

    def of_calls(self, chats: Chats, prompt: ChatPrompt, options: dict[str, Any]) -> Constraint | None:
        """What an answer with calls must look like; None if it is free, as calls without llguidance are.

        Takes the schema of answers without a call out of the options.

        Raises:
            InputError: a schema is not supported, or an option excludes tools.
        """
        if excluded := [name for name in ("grammar", "regex") if options.get(name) is not None]:
            raise InputError(f"{excluded[0]} and tools exclude each other; give one of them")
        schema, strict = options.pop("schema", None), options.get("strict", False)
        answer = None if schema is None else grammar.embedded_schema(schema, strict, prompt.lead or "")
        must = prompt.forced or answer is not None
        if not must and not grammar.installed():
            return None
        try:
            return self._grammars().constraint(chats.grammar(prompt, answer))
        except InputError:
            # Agents offer tools whose schemas nobody has looked at, and rarely call them.
            free = [function.name for function in prompt.functions if not _is_supported(function, must)]
            if must:
                raise
        try:
            return self._grammars().constraint(chats.grammar(prompt, answer, free))
        except InputError:  # all of them together are too large
            return None

    def of_answer(self, schema: Any, lark: str | None, regex: str | None, strict: bool, lead: str) -> Constraint | None:
        """What the answer must look like; raises what `Grammars.constraint` does.

        `lead`: what JSON and what matches a pattern come after.
        """
        given = {"schema": schema, "grammar": lark, "regex": regex}
        if len(names := [name for name, value in given.items() if value is not None]) > 1:
            raise InputError(f"{names[0]} and {names[1]} exclude each other; give one of them")
        if schema is not None:
            return self._grammars().constraint(grammar.json_schema(schema, strict, lead))
        if regex is not None:
            return self._grammars().constraint(grammar.regex(regex, lead))
        return None if lark is None else self._grammars().constraint(grammar.lark(lark))


def _is_supported(function: Function, must: bool) -> bool:
    """Whether a grammar can express a function's arguments. If they `must` be, or it is strict, raises InputError."""
    if not grammar.installed():
        return True
    try:
        grammar.check(grammar.json_schema(function.arguments, function.strict))
    except InputError as error:
        if must or function.strict:
            raise InputError(f"the tool {function.name}: {error}") from None
        return False
    return True
