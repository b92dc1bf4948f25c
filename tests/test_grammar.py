"""JSON schemas, regular expressions and grammars, compiled for dsv2-nano's tokens."""

import json
import re
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from dsv2_local.errors import CheckpointError, InputError
from dsv2_local.llm import bundled_model
from dsv2_local.text import grammar
from dsv2_local.text.grammar import GrammarConstraint, Grammars
from dsv2_local.text.tokenizer import Tokenizer

VOCAB, END = 8192, 1
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 30}, "age": {"type": "integer", "maximum": 150}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
CALL = 'start: <[0]> "call the violin" args\nargs: ' + grammar.embedded_schema(PERSON)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(bundled_model())


@pytest.fixture(scope="module")
def grammars(tokenizer: Tokenizer) -> Grammars:
    return Grammars(tokenizer, VOCAB, {END})


def plain(tokenizer: Tokenizer, text: str) -> list[int]:
    """The tokens of a text, without BOS."""
    return tokenizer.encode(text)[1:]


def follow(constraint: GrammarConstraint, tokens: list[int]) -> int:
    """Take as many of the tokens as may come."""
    for done, token in enumerate(tokens):
        forced = constraint.forced()
        if not (token == forced[0] if forced else constraint.mask()[token]):
            return done
        constraint.advance(token)
    return len(tokens)


@pytest.mark.parametrize(
    ("schema", "text", "valid"),
    [
        (PERSON, '{"name": "Ann", "age": 33}', True), (PERSON, '{"name": "Ann"}', False),
        (PERSON, '{"name": "Ann", "age": 333}', False), (PERSON, '{\n  "name": "Ann",\n  "age": 3\n}', True),
        (True, "[1, null]", True), ({"type": "object"}, "[1]", False), ({"enum": ["a", 2]}, "2", True),
        ({"type": "string", "pattern": "^a/b$"}, '"a/b"', True), ({"const": "ü\n"}, '"ü\\n"', True),
    ],
)  # fmt: skip
def test_a_schema_allows_what_it_describes(grammars, tokenizer, schema, text, valid):
    constraint = grammars.constraint(grammar.json_schema(schema, strict=True))
    tokens = plain(tokenizer, text)
    assert (follow(constraint, tokens) == len(tokens) and bool(constraint.ended or constraint.mask()[END])) == valid


@pytest.mark.parametrize("pattern", ["a/b", "a\\/b", "a\nb", "a\\\nb", "\\\\", "[/]+", "ä{2}", "(?i)AB", '"'])
@pytest.mark.parametrize("text", ["a/b", "a\nb", "\\", "//", "ää", "ab", '"'])
def test_a_regex_matches_the_whole_answer(grammars, tokenizer, pattern, text):
    constraint = grammars.constraint(grammar.regex(pattern))
    tokens = plain(tokenizer, text)
    matches = follow(constraint, tokens) == len(tokens) and bool(constraint.ended or constraint.mask()[END])
    assert matches == (re.fullmatch(pattern, text) is not None)


@pytest.mark.parametrize("text", [grammar.json_schema(PERSON), grammar.json_schema({}), grammar.regex("x?yz+"), CALL])
def test_masks_forced_tokens_and_drafts_agree(grammars, text):
    """A token may come if the parser takes it; where the text is certain, the tokenizer's spelling is forced."""
    some, certain = np.random.default_rng(0), 0
    for _ in range(3):
        constraint = grammars.constraint(text)
        for _ in range(25):
            forced, mask = constraint.forced(), constraint.mask()
            if forced:
                assert np.flatnonzero(mask).tolist() == [forced[0]]
                assert constraint.accepts(forced) == len(forced)
                certain += 1
            else:
                assert [token for token in range(VOCAB) if constraint.accepts([token])] == np.flatnonzero(mask).tolist()
            constraint.advance(int(some.choice(np.flatnonzero(mask))))
            if constraint.ended:
                break
    assert certain or text != CALL


def test_copies_move_on_their_own(grammars, tokenizer):
    first = grammars.constraint(grammar.regex("abc|xyz"))
    second = first.copy()
    assert follow(first, plain(tokenizer, "abc")) == len(plain(tokenizer, "abc"))
    assert first.ended
    assert not second.ended
    assert follow(second, plain(tokenizer, "xyz")) == len(plain(tokenizer, "xyz"))


def test_white_space_between_the_tokens_of_json_is_bounded(grammars, tokenizer):
    space = {token for token in range(VOCAB) if (text := tokenizer.decode([token])) and not text.strip(" \n\t\r")}
    for start in ("{", '{"name"', '{"name":', '{"name": "a"', '{"name": "a",', '{"name": "a", "age": 1'):
        constraint = grammars.constraint(grammar.json_schema(PERSON))
        assert follow(constraint, plain(tokenizer, start)) == len(plain(tokenizer, start))
        written = 0
        while allowed := sorted(space & set(np.flatnonzero(constraint.mask()).tolist())):
            shortest = min(allowed, key=lambda token: len(tokenizer.decode([token])))
            constraint.advance(shortest)
            written += 1
            assert written < 50


def test_special_tokens_are_no_text_and_others_are(tokenizer):
    """Files of releases do not call all tokens special that structure a prompt, and words may be added tokens."""
    data = json.loads(tokenizer.to_json())
    added = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    data["added_tokens"] += [
        {"id": VOCAB, "content": "<｜User｜>", **added},
        {"id": VOCAB + 1, "content": "日本", **added},
    ]

    class Source:
        def to_json(self) -> str:
            return json.dumps(data)

    grammars = Grammars(Source(), VOCAB + 2, {END})  # type: ignore[arg-type]
    mask = grammars.constraint(grammar.regex("(?s:.*)")).mask()
    assert mask[[0, END, VOCAB, VOCAB + 1]].tolist() == [False, True, False, True]
    assert np.flatnonzero(grammars.constraint(f"start: <[{VOCAB}]> | <[0]>").mask()).tolist() == [0, VOCAB]


@pytest.mark.parametrize(
    ("schema", "named"),
    [
        ({"not": {"type": "object"}}, "uses not,"), ({"if": {}, "then": {}}, "uses if, then,"),
        ({"type": "array", "uniqueItems": True}, "uses uniqueItems,"),
        ({"type": "string", "format": "telephone"}, "Unknown format: telephone"),
        ({"oneOf": [{"type": "string"}, {"type": "string", "minLength": 3}]}, "oneOf"),
    ],
)  # fmt: skip
def test_what_a_grammar_cannot_express_is_refused_if_strict_and_else_ignored(grammars, schema, named):
    with pytest.raises(InputError, match=named):
        grammars.constraint(grammar.json_schema(schema, strict=True))
    with pytest.raises(InputError, match=named):
        grammar.check(grammar.json_schema(schema, strict=True))
    assert grammars.constraint(grammar.json_schema(schema)).mask().any()


@pytest.mark.parametrize(
    ("schema", "named"),
    [
        ([], "must be an object, not \\[\\]"), ("{}", "must be an object"), (False, "must be an object"),
        ({"type": "text"}, "Invalid type: text"), ({"type": 5}, "type must be"), ({"enum": []}, "Unsatisfiable"),
        ({"$ref": "#/x"}, "Pointer '/x' does not exist"), ({"$ref": "http://a.b/c"}, "not present"),
        ({"pattern": "a(?=b)"}, "look-around"), ({"minimum": float("nan")}, "no JSON"), ({"enum": [{1}]}, "no JSON"),
        ({"type": "string", "minLength": 2, "maxLength": 1}, "greater than maxLength"),
    ],
)  # fmt: skip
def test_what_is_no_schema_is_refused_in_one_line(grammars, schema, named):
    with pytest.raises(InputError, match=named) as caught:
        grammars.constraint(grammar.json_schema(schema))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", "Empty"), ("start: x", "unknown name"), ('start: "a', "lexer error"), ("start: /(/", "unclosed group"),
        ("start: " + "(" * 5000 + '"a"' + ")" * 5000, "deeply nested"), ('start: "a" <[99999]>', "99999"),
        ("start: %json {", "%json"), ('start: "\ud800"', "Unicode"),
    ],
)  # fmt: skip
def test_what_is_no_grammar_is_refused_in_one_line(grammars, text, named):
    with pytest.raises(InputError, match=named) as caught:
        grammars.constraint(text)
    assert "\n" not in str(caught.value)


def chain(count: int) -> str:
    """Rules of which each needs the next; llguidance would follow 5,000 of them beyond the end of the stack."""
    return "start: a0\n" + "\n".join(f"a{at}: a{at + 1} a{at + 1}" for at in range(count)) + f'\na{count}: "x"\n'


def references(count: int) -> dict[str, object]:
    """Definitions of which each refers to the next."""
    defined = {f"a{at}": {"$ref": f"#/$defs/a{at + 1}"} for at in range(count)}
    return {"$ref": "#/$defs/a0", "$defs": {**defined, f"a{count}": {}}}


def nested(depth: int) -> dict[str, object]:
    schema: dict[str, object] = {}
    for _ in range(depth):
        schema = {"items": schema}
    return schema


def test_sizes_are_bounded_before_llguidance_sees_them(grammars):
    assert grammars.constraint(chain(900)).mask().any()
    assert grammars.constraint(grammar.json_schema(references(900))).mask().any()
    assert grammars.constraint(grammar.json_schema(nested(90))).mask().any()
    hidden = "start: %json " + json.dumps(references(5000)).replace("$ref", "\\u0024ref")
    for text in (chain(5000), hidden, 'start: "' + "a" * (1 << 18) + '"'):
        with pytest.raises(InputError, match="at most"):
            grammars.constraint(text)
    for schema in (references(5000), {"enum": ["a" * (1 << 18)]}, {"anyOf": [{"pattern": "a?" * 5000}] * 2}):
        with pytest.raises(InputError, match="at most"):
            grammar.json_schema(schema)
    with pytest.raises(InputError, match="more than 100 levels"):
        grammar.json_schema(nested(20_000))
    with pytest.raises(InputError, match="at most"):
        grammar.regex("a?" * 10_000)
    with pytest.raises(InputError, match="at most"):
        grammar.lark('start: "a"\n' * 10_000)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        (grammar.regex("(a|b|ab|ba|[a-z ]{1,50}){1,300}[0-9]{3}"), "too many expressions"),
        ('start: s\ns: s s | /[a-z]/ | ""', "takes too long"),
    ],
)
def test_a_grammar_that_grows_too_complex_ends_with_an_error_that_stays(grammars, monkeypatch, text, named):
    monkeypatch.setattr(grammar, "SECONDS", 0.2)
    monkeypatch.setattr(grammar, "SECONDS_PER_TOKEN", 0.0)
    constraint, some = grammars.constraint(text), np.random.default_rng(0)

    def write(tokens: int) -> None:
        for _ in range(tokens):
            constraint.advance(int(some.choice(np.flatnonzero(constraint.mask())[:-1])))

    with pytest.raises(InputError, match=named):
        write(300)
    for again in (constraint.mask, lambda: constraint.accepts([5])):
        with pytest.raises(InputError, match=named):
            again()


def test_threads_share_one_tokenizer_and_compile_at_once(tokenizer):
    grammars, made, failed = Grammars(tokenizer, VOCAB, {END}), [], []

    def compile(number: int) -> None:
        try:
            made.append((grammars.constraint(grammar.regex(f"a{number}")).forced(), number, id(grammars._tokenizer)))
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=compile, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert len({tokenizer for _, _, tokenizer in made}) == 1
    assert sorted((number, tokens) for tokens, number, _ in made) == [
        (number, plain(tokenizer, f"a{number}")) for number in range(8)
    ]


def test_without_llguidance_one_line_says_what_to_install(tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    for refused in (
        lambda: Grammars(tokenizer, VOCAB, {END}).constraint("start: x"),
        lambda: grammar.check("start: x"),
    ):
        with pytest.raises(InputError, match=r'pip install "llguidance>=1\.3"'):
            refused()


def test_a_tokenizer_that_llguidance_cannot_use_is_an_error_of_the_checkpoint():
    class Source:
        def to_json(self) -> str:
            return json.dumps({"added_tokens": [], "model": {"type": "Nonsense"}})

    with pytest.raises(CheckpointError, match="tokenizer"):
        Grammars(Source(), VOCAB, {END}).constraint('start: "a"')  # type: ignore[arg-type]


@pytest.mark.slow
def test_importing_the_package_does_not_import_llguidance():
    code = "import sys, dsv2_local.llm; print('llguidance' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, cwd=Path(__file__).parents[1])
    assert done.stdout.decode().strip() == "False"


def test_the_time_to_count_rules_does_not_grow_with_the_square(grammars: Grammars) -> None:
    for text in ("\n" * (1 << 18), "a" * (1 << 18), " " * (1 << 18), "a :" + " \n" * (1 << 17)):
        with pytest.raises(InputError):
            grammars.constraint(text[: 1 << 18])
