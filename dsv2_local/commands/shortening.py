"""Room in a full context: the oldest turns of a conversation are dropped, or a summary is put in their place."""

from bisect import bisect_left
from collections.abc import Callable
from typing import Any

from dsv2_local.commands.conversation import Conversation, Message
from dsv2_local.errors import InputError
from dsv2_local.llm import LLM
from dsv2_local.progress import Progress

SHARE = 8
"""The context over this is left for an answer, and a summary takes as much at most."""
SHORTEST_SUMMARY, LONGEST_SUMMARY = 16, 512
"""Tokens. A shorter one says nothing, a longer one takes long."""
REQUEST = "Summarise our conversation so far in a few sentences. Keep names, numbers and decisions."
GOES_ON = "(goes on)"


def drop_oldest(conversation: Conversation, llm: LLM) -> int:
    """Forget whole turns, the oldest first, until the prompt leaves room for an answer; how many were forgotten.

    The last question must fit alone; where it leaves less room it is answered in what there is.
    """
    turns = _turns(conversation)

    def fits(dropped: int) -> bool:
        return llm.count_tokens(conversation.prompt(_joined(turns[dropped:]))) <= llm.context - _room(conversation, llm)

    dropped = _least(fits, len(turns) - 1)
    conversation.messages = _joined(turns[dropped:])
    return dropped


def summarise_oldest(conversation: Conversation, llm: LLM, writing: Progress, **options: Any) -> int:
    """Put a summary by the model in place of the oldest turns, so many that there is room for an answer.

    The summary stands as a turn of its own, marked as what it is. Turns that are too long for one request are given in
    pieces, the summary so far before each. The last question must fit alone. `writing` is called with the summary's
    tokens so far and their limit, `options` are those of `LLM.chat`.

    Returns:
        How many turns it replaces.

    Raises:
        InputError: there is no room for a summary, or the model's is empty.
        Whatever generating raises; the conversation is as it was then.
    """
    turns = _turns(conversation)

    def left(replaced: int) -> int:
        """Tokens that neither a summary's turn nor what follows it takes."""
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
    llm: LLM,
    longest: int,
    writing: Progress,
    options: dict[str, Any],
) -> str:
    """A summary of at most `longest` tokens, of as many turns at a time as fit beside it."""

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
    """A turn whole, or halves of it (and of these) that fit."""
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
    """The least of 1, 2, … `most` that fits, where all above one that fits do too; `most` where none does."""
    return bisect_left(range(1, most), True, key=fits) + 1


def _room(conversation: Conversation, llm: LLM) -> int:
    """Tokens to leave for an answer."""
    share = llm.context // SHARE
    return min(share, int(conversation.settings.get("max_tokens", share)))


def _turn(question: str, answer: str) -> list[Message]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _summary_turn(summary: str) -> list[Message]:
    return _turn("[A summary by the model stands here for the oldest turns.]", summary)


def _turns(conversation: Conversation) -> list[list[Message]]:
    """Each question with what follows it."""
    starts = [i for i, message in enumerate(conversation.messages) if message["role"] == "user"]
    return [conversation.messages[i:j] for i, j in zip(starts, [*starts[1:], None], strict=True)]


def _joined(turns: list[list[Message]]) -> list[Message]:
    return [message for turn in turns for message in turn]
