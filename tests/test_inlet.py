"""What comes from outside is Unicode, or refused with the place: strings, bytes, JSON files."""

import json
import re
import shutil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv2_local import inlet, llm
from dsv2_local.errors import Dsv2Error, InputError
from dsv2_local.quant.checkpoint import Manifest
from dsv2_local.text.tokenizer import Tokenizer

HALVES = st.text(st.characters(exclude_categories=[]))


@given(HALVES)
def test_any_string_becomes_unicode_or_an_error(value):
    try:
        found = inlet.text(value, "it")
    except InputError:
        with pytest.raises(UnicodeDecodeError):
            value.encode("utf-16-le", "surrogatepass").decode("utf-16-le")
    else:
        assert found.encode().decode() == found
        if not re.search("[\udc80-\udcff]", value):  # bytes have a test of their own
            assert found == value.encode("utf-16-le", "surrogatepass").decode("utf-16-le").removeprefix("\ufeff")


@given(st.text())
def test_utf8_in_a_locale_of_ascii_is_decoded(value):
    assert inlet.text(value.encode().decode("ascii", "surrogateescape"), "it") == value.removeprefix("\ufeff")


@pytest.mark.parametrize(
    ("value", "wrong"), [("hi \ud83d", "character 3 is half a pair, U+D83D"), ("a\udcffb", "character 1 is byte 0xff")]
)
def test_what_is_no_unicode_is_named(value, wrong):
    with pytest.raises(InputError, match=f"^--system is not Unicode text: {wrong.replace('+', '.')}"):
        inlet.text(value, "--system")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_byte_order_marks_are_removed(encoding):
    assert inlet.decoded("Größe 😀\n".encode(encoding), "it") == "Größe 😀\n"


@pytest.mark.parametrize(
    ("data", "wrong"),
    [
        (b"ab\xffcd", "not UTF-8 text: byte 2 is 0xff"),
        (b"ab\0cd", "not text: byte 2 is NUL"),
        (b"GGUF\3\0\0\0\xff", "not text: byte 5 is NUL"),
        (b"\xff\xfea", "not UTF-16 text: byte 2 is 0x61"),
        ("hi".encode("utf-16") + b"i", "not UTF-16 text: byte 6 is 0x69"),
        ("hi\0".encode("utf-32"), "not text: character 2 is NUL"),
    ],
)
def test_bytes_that_are_no_text_are_named(data, wrong):
    with pytest.raises(InputError, match=wrong):
        inlet.decoded(data, "it")


def test_every_file_of_a_model_may_begin_with_a_byte_order_mark(tmp_path):
    """As editors of Windows save them; the answer is the same."""
    model = shutil.copytree(llm.bundled_model(), tmp_path / "model")
    (model / "chat_template.jinja").write_text(
        json.loads((model / "tokenizer_config.json").read_text())["chat_template"]
    )
    messages = [{"role": "user", "content": "What is a dog?"}]
    expected = Tokenizer(model).encode_chat(messages)
    for path in [*model.glob("*.json"), model / "chat_template.jinja"]:
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    loaded = llm.load(model)
    assert loaded.tokenizer.encode_chat(messages) == expected
    assert Manifest.load(model).recipe == loaded.recipe


def test_messages_of_the_python_interface():
    model = llm.load()
    ask = [{"role": "user", "content": "What is a dog? \U0001f600"}]
    pair = [{"role": "user", "content": "\ufeffWhat is a dog? \ud83d\ude00"}]
    assert model.count_tokens(pair) == model.count_tokens(ask)
    wrong = "half \ud83d"
    for call in (
        lambda: model.generate(wrong),
        lambda: model.generate("hi", stop=[wrong]),
        lambda: model.chat([{"role": "user", "content": wrong}]),
        lambda: model.chat([{"role": "system", "content": wrong}, *ask]),
        lambda: model.tokenizer.encode(wrong),
    ):
        with pytest.raises(Dsv2Error):
            call()


def test_a_template_that_writes_half_a_pair_is_an_error(tmp_path):
    model = shutil.copytree(llm.bundled_model(), tmp_path / "model")
    settings = json.loads((model / "tokenizer_config.json").read_text())
    settings["chat_template"] = "\ud83d{{ messages[0].content }}"
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(Dsv2Error, match="not Unicode"):
        Tokenizer(model).encode_chat([{"role": "user", "content": "hi"}])
