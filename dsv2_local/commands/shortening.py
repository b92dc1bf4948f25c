"""Makes room in a full context: drops the oldest turns of a conversation, or replaces them with a summary."""

from bisect import bisect_left
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from dsv2_local.commands.conversation import Conversation, Message
from dsv2_local.errors import InputError
from dsv2_local.progress import Progress

if TYPE_CHECKING:
    from dsv2_local.commands.remote import AnyLLM

SHARE = 8
"""One such part of the context is left free for the answer, and a summary has at most as many tokens."""
SHORTEST_SUMMARY, LONGEST_SUMMARY = 16, 512
"""Limits in tokens: a shorter summary is useless, a longer one takes too long to write."""
REQUEST = "Summarise our conversation so far in a few sentences. Keep names, numbers and decisions."
"""The question that makes the model write a summary."""
GOES_ON = "(goes on)"
"""What stands in for the missing half of a turn that is summarised in pieces."""


def drop_oldest(conversation: Conversation, llm: "AnyLLM") -> int:
    """Drop whole turns, the oldest first, until the prompt leaves room for an answer; returns how many were dropped.

    The last question must fit alone. If even that leaves less room, the answer gets what there is.
    """
    turns = _turns(conversation)

    def fits(dropped: int) -> bool:
        return llm.count_tokens(conversation.prompt(_joined(turns[dropped:]))) <= llm.context - _room(conversation, llm)

    dropped = _least(fits, len(turns) - 1)
    conversation.messages = _joined(turns[dropped:])
    return dropped


def summarise_oldest(conversation: Conversation, llm: "AnyLLM", writing: Progress, **options: Any) -> int:
    """Replace the oldest turns with a summary by the model: as many turns as it takes to have room for an answer.

    The summary becomes a turn of its own, marked as a summary. If the turns are too long for one request, they are
    summarised in pieces, each request beginning with the summary so far. The last question must fit alone.

    Args:
        conversation: is changed only if the summary succeeds.
        llm: writes the summary.
        writing: called with (tokens of the summary so far, their limit).
        options: those of `LLM.chat`.

    Returns:
        How many turns the summary replaces.

    Raises:
        InputError: there is no room for a summary, or the model's summary is empty.
        Dsv2Error: any error of the generation.
    """
    turns = _turns(conversation)

    def left(replaced: int) -> int:
        """Free tokens of the context, if an empty summary takes the place of so many turns."""
        messages = [*_summary_turn(""), *_joined(turns[replaced:])]
        return llm.context - llm.count_tokens(conversation.prompt(messages))

    longest = min(LONGEST_SUMMARY, llm.context // SHARE)
    replaced = _least(lambda count: left(count) >= longest + _room(conversation, llm), len(turns) - 1)
    longest = min(longest, left(replaced) // 2)
    if longest < SHORTEST_SUMMARY:
        raise InputError("the question leaves no room for a summary; drop the oldest turns instead")
    summary = _summarise(conversation, turns[:replaced], llm, longest, writing, options)
    conversation.messages = [*_summary_turn(summary), *_joined(turns[replaced:])]
    return replaced


def _summarise(
    conversation: Conversation,
    turns: list[list[Message]],
    llm: "AnyLLM",
    longest: int,
    writing: Progress,
    options: dict[str, Any],
) -> str:
    """Write a summary of at most `longest` tokens, from as many turns per request as fit."""

    def request(messages: list[Message]) -> list[Message]:
        return conversation.prompt([*messages, {"role": "user", "content": REQUEST}])

    def fits(messages: list[Message], summaries: int = 1) -> bool:
        return llm.count_tokens(request(messages)) + summaries * longest <= llm.context

    def summary(messages: list[Message]) -> str:
        generation = llm.chat(request(messages), **options | {"max_tokens": longest})
        for _ in generation:
            writing(generation.stats.completion_tokens, longest)
        writing(longest, longest)
        if not generation.text.strip():
            raise InputError("the model's summary is empty; nothing was changed")
        return generation.text.strip()

    given = list[Message]()
    for turn in turns:
        for piece in _pieces(turn, lambda messages: fits([*_summary_turn(""), *messages], summaries=2)):
            if given and not fits(given + piece):
                given = _summary_turn(summary(given))
            given = given + piece
    return summary(given)


def _pieces(turn: list[Message], fits: Callable[[list[Message]], bool]) -> list[list[Message]]:
    """A turn as a whole if it fits, else split in halves until they fit."""
    if fits(turn):
        return [turn]
    question, answer = turn[0]["content"], turn[1]["content"]
    longer = max(question, answer, key=len)
    half = len(longer) // 2
    if half < SHORTEST_SUMMARY:
        raise InputError("the system message leaves no room for a summary; drop the oldest turns instead")
    parts = (
        (_turn(question[:half], GOES_ON), _turn(question[half:], answer))
        if longer is question
        else (_turn(question, answer[:half]), _turn(GOES_ON, answer[half:]))
    )
    return [piece for part in parts for piece in _pieces(part, fits)]


def _least(fits: Callable[[int], bool], most: int) -> int:
    """The smallest of 1, 2, … `most` that fits, by binary search; `most` if none does."""
    return bisect_left(range(1, most), True, key=fits) + 1


def _room(conversation: Conversation, llm: "AnyLLM") -> int:
    """Tokens to leave free for an answer."""
    share = llm.context // SHARE
    return min(share, int(conversation.settings.get("max_tokens", share)))


def _turn(question: str, answer: str) -> list[Message]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _summary_turn(summary: str) -> list[Message]:
    return _turn("[A summary by the model stands here for the oldest turns.]", summary)


def _turns(conversation: Conversation) -> list[list[Message]]:
    """Split a conversation into turns: each question with its answer."""
    starts = [i for i, message in enumerate(conversation.messages) if message["role"] == "user"]
    return [conversation.messages[i:j] for i, j in zip(starts, [*starts[1:], None], strict=True)]


def _joined(turns: list[list[Message]]) -> list[Message]:
    return [message for turn in turns for message in turn]
