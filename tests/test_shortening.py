"""Making room in a full context: which turns are dropped or summarised, and what the summary is written from."""

from typing import Any

import pytest

from dsv2_local.commands.conversation import Conversation
from dsv2_local.commands.shortening import REQUEST, drop_oldest, summarise_oldest
from dsv2_local.errors import InputError
from tests.test_chat import FakeGeneration, FakeLLM


def conversation(*sizes: int, **settings: Any) -> Conversation:
    """A conversation with messages of the given lengths, one letter per turn; the last question has no answer."""
    letters = [chr(ord("a") + i // 2) for i in range(len(sizes))]
    roles = ["user", "assistant"] * len(sizes)
    messages = [
        {"role": role, "content": letter * size} for role, letter, size in zip(roles, letters, sizes, strict=False)
    ]
    return Conversation("be brief", settings, messages)


class SummingLLM(FakeLLM):
    """Answers with the letters in the prompt as its summary, and asserts that the request fits in the context."""

    context = 800

    def chat(self, messages: list[dict[str, str]], **options: Any) -> FakeGeneration:
        assert self.count_tokens(messages) + options["max_tokens"] <= self.context
        assert [m["role"] for m in messages] == ["system", *["user", "assistant"] * (len(messages) // 2 - 1), "user"]
        assert messages[-1]["content"] == REQUEST
        self.asked.append(messages)
        said = "".join(message["content"] for message in messages[1:-1] if not message["content"].startswith("["))
        return FakeGeneration(sorted(set(said) - set("(goes on)")))


def brute_force(talk: Conversation, room: int, context: int) -> int:
    """The smallest number of turns to drop, found by trying all numbers."""
    turns = [talk.messages[i : i + 2] for i in range(0, len(talk.messages), 2)]
    sizes = [sum(len(message["content"]) for message in turn) for turn in turns]
    fitting = [n for n in range(1, len(turns)) if len("be brief") + sum(sizes[n:]) + room <= context]
    return min(fitting, default=len(turns) - 1)


@pytest.mark.parametrize(
    "sizes",
    [(40, 10, 40, 1, 10), (30, 10, 5, 5, 5, 5, 60), (5, 5, 80), (5, 5, 91), (90, 9, 1, 1, 1), (10,) * 21, (9, 9) * 9],
)
@pytest.mark.parametrize("settings", [{}, {"max_tokens": 3}, {"max_tokens": 1000}])
def test_as_few_turns_are_dropped_as_leave_room(sizes, settings):
    talk, llm = conversation(*sizes[: len(sizes) - 1 + len(sizes) % 2], **settings), FakeLLM()
    expected = brute_force(talk, min(12, settings.get("max_tokens", 12)), 100)
    before = list(talk.messages)
    assert drop_oldest(talk, llm) == expected
    assert talk.messages == before[2 * expected :]
    assert talk.system == "be brief"
    assert llm.count_tokens(talk.prompt()) < 100


def test_a_summary_stands_for_the_oldest_turns_and_leaves_room():
    talk, llm = conversation(200, 100, 100, 50, 100, 50, 200), SummingLLM()
    seen: list[tuple[int, int]] = []
    assert summarise_oldest(talk, llm, lambda *told: seen.append(told)) == 1
    assert talk.messages[0]["content"] == "[A summary by the model stands here for the oldest turns.]"
    assert [m["content"][:1] for m in talk.messages[1:]] == ["a", "b", "b", "c", "c", "d"]
    assert llm.count_tokens(talk.prompt()) + 100 <= llm.context
    assert seen[-1] == (100, 100)
    [asked] = llm.asked
    assert [m["content"][:1] for m in asked[1:-1]] == ["a", "a"]  # unchanged, so that the prefix cache has them


@pytest.mark.parametrize("sizes", [(300, 300, 10, 10, 500), (4000, 10, 200), (10, 4000, 200), (700, 700, 700, 700, 9)])
def test_turns_beyond_the_context_are_summarised_in_pieces(sizes):
    talk, llm = conversation(*sizes), SummingLLM()
    replaced = summarise_oldest(talk, llm, lambda *_: None)
    letters = "abc"[:replaced]
    assert talk.messages[1]["content"] == letters
    assert len(llm.asked) >= 1
    given = "".join(m["content"] for asked in llm.asked for m in asked[1:-1])
    for turn, letter in enumerate(letters):  # nothing is left out
        assert given.count(letter) >= sum(sizes[2 * turn : 2 * turn + 2])


@pytest.mark.parametrize(("sizes", "system"), [((300, 300, 740), "be brief"), ((300, 300, 100), "s" * 600)])
def test_without_room_for_a_summary_nothing_changes(sizes, system):
    talk = conversation(*sizes)
    talk.system = system
    before = list(talk.messages)
    with pytest.raises(InputError, match="no room for a summary"):
        summarise_oldest(talk, SummingLLM(), lambda *_: None)
    assert talk.messages == before
