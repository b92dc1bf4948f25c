"""Grammars for answers: JSON schemas, regular expressions and Lark grammars, compiled by llguidance for a tokenizer.

Grammars are texts in llguidance's dialect of Lark. A special token is written as `<[id]>`, and a JSON schema as
`%json {…}` (`embedded_schema`), so that a grammar may hold several of both.
"""

import json
import re
import threading
from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from importlib.util import find_spec
from time import thread_time
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dsv2_local.errors import CheckpointError, Dsv2Error, InputError
from dsv2_local.inlet import well_formed
from dsv2_local.text.tokenizer import Tokenizer
from dsv2_local.values import shown

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

MAX_LENGTH = 1 << 18
"""Characters of the longest grammar, or JSON schema."""
MAX_PATTERNS = 1 << 14
"""Characters of the longest regular expression, of all those of a JSON schema, and of the longest grammar of a user:
llguidance's time for a pattern grows with the square of its length."""
MAX_DEPTH = 100
"""Objects and lists inside each other in the deepest JSON schema."""
MAX_RULES = 1000
"""Rules of the largest grammar, and references of the largest JSON schema: llguidance follows them recursively."""
KEPT = 16
"""Grammars that are kept in their first state."""
MAX_STATES = 100_000
"""States of the automaton of an answer's grammar, about 2 KB each."""
SECONDS, SECONDS_PER_TOKEN = 2.0, 0.01
"""What a grammar may cost an answer, in seconds of one core: a thousand times what an ordinary one does."""
WHITE_SPACE = r" |\n( {0,40}|\t{0,10})"
"""White space between the tokens of JSON: bounded, since a model may write it without end."""
MISSING = 'JSON schemas and grammars need llguidance; run: pip install "llguidance>=1.3"'
_RULE = re.compile(r"^[^\S\n]*[?!]?\w[^:\n]*:", re.MULTILINE)
_CONTROL = re.compile(r"<[|｜].*[|｜]>")  # added tokens that structure a prompt; some files do not call them special


def json_schema(schema: Any, strict: bool = False, lead: str = "") -> str:
    """The grammar of JSON texts that a schema describes.

    Args:
        schema: a JSON schema: an object, or True for any value.
        strict: refuse keywords that are not supported; else they are ignored.
        lead: what comes before the JSON.

    Raises:
        InputError: it is no JSON schema, or too large.
    """
    return f"start: {embedded_schema(schema, strict, lead)}\n"


def embedded_schema(schema: Any, strict: bool = False, lead: str = "") -> str:
    """A JSON schema as terms of a Lark grammar; arguments and errors are those of `json_schema`."""
    if schema is True:
        schema = {}
    if not isinstance(schema, Mapping):
        raise InputError(f"a JSON schema must be an object, not {shown(schema)}")
    _check_schema(schema)
    options = {"whitespace_pattern": WHITE_SPACE, "lenient": not strict, "coerce_one_of": not strict}
    try:
        text = json.dumps({**schema, "x-guidance": options}, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise InputError(f"the JSON schema is no JSON: {error}") from None
    _check_length("the JSON schema", len(text), MAX_LENGTH - 1000)
    return f"{_literal(lead)}%json {well_formed(text, 'the JSON schema')}"


def lark(grammar: Any) -> str:
    """A grammar that a user wrote, in llguidance's dialect of Lark.

    Raises:
        InputError: it is no text, or too long.
    """
    if not isinstance(grammar, str):
        raise InputError(f"a grammar must be text, not {shown(grammar)}")
    _check_length("the grammar", len(grammar), MAX_PATTERNS)
    return grammar


def regex(pattern: str, lead: str = "") -> str:
    """The grammar of texts that a regular expression matches as a whole, after `lead`.

    Raises:
        InputError: the pattern is not Unicode text.
    """
    if not isinstance(pattern, str):
        raise InputError(f"regex must be text, not {shown(pattern)}")
    _check_length("regex", len(pattern), MAX_PATTERNS)
    # Lark ends a pattern at a slash; a line feed may not stand in one.
    escaped = re.sub(r"\\.|/|\n", _escaped, well_formed(pattern, "regex"), flags=re.DOTALL)
    return f"start: {_literal(lead)}/{escaped}/\n"


def _literal(text: str) -> str:
    """A text as a term, with a space after it; nothing if it is empty."""
    return f"{json.dumps(text)} " if text else ""


def _escaped(found: "re.Match[str]") -> str:
    return {"/": r"\/", "\n": r"\n", "\\\n": r"\n"}.get(found[0], found[0])


def installed() -> bool:
    """Whether there is llguidance, which compiles grammars."""
    return find_spec("llguidance") is not None


def check(grammar: str) -> None:
    """Check a grammar as far as that is possible without the tokens of a model.

    Raises:
        InputError: see `Grammars.constraint`.
    """
    _check_size(grammar)
    try:
        from llguidance import LLMatcher
    except ImportError:
        raise InputError(MISSING) from None
    failed, messages = LLMatcher.validate_grammar_with_warnings(grammar)
    if failed:
        raise InputError(_reason(messages[0]))


class Grammars:
    """Compiles grammars for the tokens of a model. Any thread may use it.

    The first grammar takes a second longer, in which the tokenizer is read for all of them (100,000 tokens).
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, end_tokens: Collection[int]) -> None:
        """For a vocabulary of `vocab_size` tokens, some of which end an answer."""
        self._source, self._vocab_size, self._end_tokens = tokenizer, vocab_size, sorted(end_tokens)
        self._making = threading.Lock()
        self._kept, self._keeping = OrderedDict[str, GrammarConstraint](), threading.Lock()

    def prepare(self) -> None:
        """Read the tokenizer now, and not for the first grammar. Raises what `constraint` does."""
        assert self._tokenizer

    def constraint(self, grammar: str) -> "GrammarConstraint":
        """Compile a Lark grammar, which takes milliseconds, and is done in this thread.

        The latest grammars are kept, as agents send the same tools with every request.

        Raises:
            InputError: it is no grammar, too large, or has what is not supported; or llguidance is not installed.
            CheckpointError: llguidance cannot use the checkpoint's tokenizer.
        """
        _check_size(grammar)
        with self._keeping:
            if known := self._kept.get(grammar):
                self._kept.move_to_end(grammar)
                return known.copy()
        made = self._compiled(grammar)
        with self._keeping:
            self._kept[grammar] = made.copy()
            if len(self._kept) > KEPT:
                self._kept.popitem(last=False)
        return made

    def _compiled(self, grammar: str) -> "GrammarConstraint":
        tokenizer = self._tokenizer
        from llguidance import LLMatcher, LLParserLimits

        limits = LLParserLimits(max_lexer_states=MAX_STATES, verbose_errors=False)
        matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=limits)
        return GrammarConstraint(matcher, self._vocab_size)

    @property
    def _tokenizer(self) -> "LLTokenizer":
        with self._making:
            return self._made

    @cached_property
    def _made(self) -> "LLTokenizer":
        try:
            from llguidance import LLTokenizer
        except ImportError:
            raise InputError(MISSING) from None
        data = json.loads(self._source.to_json())
        for token in data.get("added_tokens", []):
            # A special token is no part of any text, and is found in a grammar only by its number.
            token["special"] = token["special"] or _CONTROL.fullmatch(token["content"]) is not None
        with _usable_tokenizer():
            # Its slices, masks of common texts computed here, make later ones ten times as fast.
            return LLTokenizer(json.dumps(data), n_vocab=self._vocab_size, eos_token=self._end_tokens or None)


class GrammarConstraint:
    """A `Constraint` that follows a grammar."""

    def __init__(self, matcher: "LLMatcher", vocab_size: int) -> None:
        """Begin an answer with a matcher in its first state. Raises InputError if its grammar was refused."""
        self._matcher, self._vocab_size = matcher, vocab_size
        self._mask: NDArray[np.bool_] | None = None
        self._forced: list[int] | None = None
        self._left = SECONDS
        self._bits = np.zeros((vocab_size + 31) // 32, dtype=np.int32)
        self._address = self._bits.ctypes.data
        self._check()

    @property
    def ended(self) -> bool:
        """See `Constraint`."""
        return self._matcher.is_stopped()

    def forced(self) -> list[int]:
        """See `Constraint`. One text has several spellings in tokens; the tokenizer's own is the one that is forced."""
        if self._forced is None:
            start = thread_time()
            self._forced = self._matcher.compute_ff_tokens()
            self._count(start)
        return self._forced

    def mask(self) -> NDArray[np.bool_]:
        """See `Constraint`."""
        if self._mask is None:
            start = thread_time()
            self._matcher.unsafe_compute_mask_ptr(self._address, self._bits.nbytes)
            self._count(start)
            bits = np.unpackbits(self._bits.view(np.uint8), count=self._vocab_size, bitorder="little")
            self._mask = bits.view(np.bool_)
        return self._mask

    def accepts(self, tokens: Sequence[int]) -> int:
        """See `Constraint`."""
        start = thread_time()
        count = self._matcher.validate_tokens(list(tokens))
        self._count(start)
        return count

    def advance(self, token: int) -> None:
        """See `Constraint`."""
        rest = (self._forced or [])[1:]
        self._mask, self._forced = None, rest or None  # after the last one, others may be certain
        self._left += SECONDS_PER_TOKEN
        start = thread_time()
        self._matcher.consume_token(token)
        self._count(start)

    def copy(self) -> "GrammarConstraint":
        """See `Constraint`."""
        return GrammarConstraint(self._matcher.deep_copy(), self._vocab_size)

    def _count(self, start: float) -> None:
        """Count the time of a call to llguidance, and raise InputError if it failed or all of them took too long."""
        self._left -= thread_time() - start
        if self._left < 0:
            raise InputError("the grammar takes too long to follow; make it less ambiguous")
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise InputError(_reason(self._matcher.get_error()))


def _reason(message: str) -> str:
    """What llguidance says of a grammar, in one line."""
    subject = "the JSON schema" if "JSON schema" in message else "the grammar"
    if keywords := re.search(r"Unimplemented keys: \[(.*)\]", message):
        return f"{subject} uses {keywords[1].replace(chr(34), '')}, which a grammar cannot express; leave it out"
    if "oneOf constraints" in message:
        return f"{subject} uses oneOf with alternatives that may overlap, which a grammar cannot express; use anyOf"
    details = re.search(r"^error: (.*)", message, re.MULTILINE)  # of a regular expression
    reason = details[1] if details else message.partition("failed to compile JSON schema: ")[2] or message
    return f"{subject} is refused: {(reason.splitlines() or ['it cannot be read'])[0]}"


def _check_size(grammar: str) -> None:
    """Refuse a grammar that would take llguidance too long, or end the process."""
    _check_length("the grammar", len(well_formed(grammar, "the grammar")), MAX_LENGTH)
    # An escape may hide a reference.
    references = grammar.count('"$ref"') + grammar.count("\\u00")
    if (rules := len(_RULE.findall(grammar)) + references) > MAX_RULES:
        raise InputError(f"the grammar has {rules:,} rules and references; at most {MAX_RULES:,} are possible")


def _check_length(name: str, length: int, most: int) -> None:
    if length > most:
        raise InputError(f"{name} has {length:,} characters; at most {most:,} are possible")


def _check_schema(schema: Any) -> None:
    """Refuse a schema that is too deep, refers too often or has too long patterns."""
    level, references, patterns = [schema], 0, 0
    for _ in range(MAX_DEPTH):
        below: list[Any] = []
        for each in level:
            if isinstance(each, Mapping):
                references += "$ref" in each
                named = each.get("patternProperties")
                written = [each.get("pattern"), *(named if isinstance(named, Mapping) else ())]
                patterns += sum(len(pattern) for pattern in written if isinstance(pattern, str))
            below += each.values() if isinstance(each, Mapping) else each
        level = [value for value in below if isinstance(value, Mapping | list | tuple)]
        if not level:
            break
    else:
        raise InputError(f"the JSON schema has more than {MAX_DEPTH} levels")
    if references > MAX_RULES:
        raise InputError(f"the JSON schema has {references:,} references; at most {MAX_RULES:,} are possible")
    _check_length("all patterns of the JSON schema together", patterns, MAX_PATTERNS)


@contextmanager
def _usable_tokenizer() -> Iterator[None]:
    try:
        yield
    except (Dsv2Error, KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:
        raise CheckpointError(f"llguidance cannot use the model's tokenizer: {error}") from None
