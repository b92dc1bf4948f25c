"""Reads WordNet 3.0's database files, and turns its glosses into phrases for grammatical sentences."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

WORDNET_NOTICE = """dsv2-nano was trained on sentences made from WordNet 3.0; its weights and tokenizer derive from it.

WordNet Release 3.0

This software and database is being provided to you, the LICENSEE, by
Princeton University under the following license.  By obtaining, using
and/or copying this software and database, you agree that you have
read, understood, and will comply with these terms and conditions.:

Permission to use, copy, modify and distribute this software and
database and its documentation for any purpose and without fee or
royalty is hereby granted, provided that you agree to comply with
the following copyright notice and statements, including the disclaimer,
and that the same appear on ALL copies of the software, database and
documentation, including modifications that you make for internal
use or for distribution.

WordNet 3.0 Copyright 2006 by Princeton University.  All rights reserved.

THIS SOFTWARE AND DATABASE IS PROVIDED "AS IS" AND PRINCETON
UNIVERSITY MAKES NO REPRESENTATIONS OR WARRANTIES, EXPRESS OR
IMPLIED.  BY WAY OF EXAMPLE, BUT NOT LIMITATION, PRINCETON
UNIVERSITY MAKES NO REPRESENTATIONS OR WARRANTIES OF MERCHANT-
ABILITY OR FITNESS FOR ANY PARTICULAR PURPOSE OR THAT THE USE
OF THE LICENSED SOFTWARE, DATABASE OR DOCUMENTATION WILL NOT
INFRINGE ANY THIRD PARTY PATENTS, COPYRIGHTS, TRADEMARKS OR
OTHER RIGHTS.

The name of Princeton University or Princeton may not be used in
advertising or publicity pertaining to distribution of the software
and/or database.  Title to copyright in this software, database and
any associated documentation shall at all times remain with
Princeton University and LICENSEE agrees to preserve same.
"""

POS_FILES = {"n": "noun", "v": "verb", "a": "adj"}
POS_OF_KEY = {"1": "n", "2": "v", "3": "a", "5": "a"}  # the first digit of a sense key
MASS_FILES = {7, 12, 19, 22, 27}  # attribute, feeling, phenomenon, process, substance
MIXED_FILES = {4, 9, 13, 26}  # act, cognition, food, state
PERSON_FILE = 18
NATURAL_FILES = {5, 8, 18, 20}  # animal, body, person, plant: here a plural in the gloss means "one of the ..."


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


DETERMINERS = _words(
    "a an the any one some something someone somebody anyone anything all each every either several two three four "
    "five six what whatever this that these those whoever no not many most more both another his her its their "
    "your you people"
)
NP_END = _words(
    "that which who whom whose where when while of with without in on at for from by to into over under between among "
    "during as like used using having made making containing consisting frozen seen kept shown grown "
    "characterized found and or but than after before against through about is are was were has have if being not "
    "resembling formed given worn living growing native held caused produced considered set intended designed born "
    "located situated based similar near along around across above below belonging covered composed performed "
    "either so such because until upon within toward towards regarded called known capable able"
)
PLURAL_ONLY = _words("scissors trousers pants jeans shorts glasses clothes tongs pliers pajamas binoculars")
MAIN_GLOSS = {  # words from the gloss of the meaning to teach, if the counts would choose another meaning
    "table": "furniture", "hammer": "hand tool", "gold": "soft yellow malleable", "chess": "board game",
    "queen": "female sovereign", "bank": "financial institution", "cake": "baked goods", "plate": "dish",
    "glove": "covering for the hand", "television": "electronic device", "nail": "pointed",
    "moon": "natural satellite of the Earth", "ruler": "measuring", "nurse": "caring for", "horn": "brass",
    "organ": "keyboard instrument", "bat": "nocturnal", "seal": "marine mammal", "crane": "lifts",
    "mole": "insectivore", "tie": "neckwear", "ring": "jewelry", "saw": "hand tool", "drill": "tool with",
    "screw": "fastener", "duck": "swimming bird", "train": "railroad", "dress": "one-piece",
}  # fmt: skip
UNSUITABLE = re.compile(
    r"sex\b|sexual|offensive|disparag|obscen|vulgar|slur|derogat|prostitut|genital|\brap(e|ing)|excrem"
)
COUNTABLE = _words(
    "fish chicken lamb orange apple onion potato tomato carrot lemon banana pie egg cake cookie sandwich pizza fruit "
    "vegetable drink meal soup emotion feeling color colour shape drug metal liquid gas mineral fuel rock"
)
UNCOUNTABLE = _words(
    "music rice bread water furniture clothing money advice news weather traffic luggage milk cheese butter sugar salt "
    "chocolate coffee tea beer wine juice meat pork beef garlic food art love happiness anger fear joy knowledge "
    "information education physics chemistry biology mathematics history science football soccer tennis golf "
    "basketball baseball hockey chess swimming rain snow thunder lightning fog electricity light darkness gravity "
    "air smoke steam sand mud dust grass wood gold silver iron steel copper plastic glass paper leather cotton wool "
    "silk petrol gasoline oil blood skin hair work homework equipment machinery software hardware research evidence "
    "progress health wealth peace war luck fun sleep death life childhood poverty democracy sunshine toast honey jam "
    "pepper flour pasta spaghetti cricket rugby archery wrestling boxing gymnastics skiing skating law medicine"
)


@dataclass(frozen=True)
class Synset:
    """A meaning: its words as the database spells them, its lexicographer file, its gloss, and its pointers."""

    words: tuple[str, ...]
    file: int
    gloss: str
    pointers: tuple[tuple[str, str, int, str], ...]  # (symbol, pos, offset, source/target word numbers)


@dataclass(frozen=True)
class Sense:
    """A word with the one meaning that the corpus teaches for it."""

    word: str
    pos: str
    offset: int
    score: float


@dataclass
class WordNet:
    """The database in memory: meanings by (pos, offset), and each word's meanings, the most frequent first."""

    synsets: dict[tuple[str, int], Synset] = field(default_factory=dict)
    index: dict[tuple[str, str], list[int]] = field(default_factory=dict)
    counts: dict[tuple[str, str, int], int] = field(default_factory=dict)  # (word, pos, sense number from 1)


def load_wordnet(folder: Path) -> WordNet:
    """Read data.*, index.* and cntlist.rev of a WordNet 3.0 folder."""
    net = WordNet()
    for pos, name in POS_FILES.items():
        for line in (folder / f"data.{name}").read_text("latin-1").splitlines():
            if not line.startswith("  "):
                net.synsets[pos, int(line[:8])] = _parse_synset(line)
        for line in (folder / f"index.{name}").read_text("latin-1").splitlines():
            if not line.startswith("  "):
                parts = line.split()
                net.index[parts[0].replace("_", " "), pos] = [int(offset) for offset in parts[-int(parts[2]) :]]
    for line in (folder / "cntlist.rev").read_text("latin-1").splitlines():
        key, sense, count = line.split()
        word, _, rest = key.partition("%")
        if rest[0] in POS_OF_KEY:
            net.counts[word.replace("_", " "), POS_OF_KEY[rest[0]], int(sense)] = int(count)
    return net


def _parse_synset(line: str) -> Synset:
    data, _, gloss = line.partition(" | ")
    parts = data.split()
    count = int(parts[3], 16)
    words = tuple(re.sub(r"\(\w+\)$", "", word).replace("_", " ") for word in parts[4 : 4 + 2 * count : 2])
    rest = parts[5 + 2 * count :]
    pointers = tuple(
        (rest[i], rest[i + 2].replace("s", "a"), int(rest[i + 1]), rest[i + 3])
        for i in range(0, 4 * int(parts[4 + 2 * count]), 4)
    )
    return Synset(words, int(parts[1]), gloss.strip(), pointers)


def examples_of(gloss: str) -> list[str]:
    """The quoted example sentences of a gloss."""
    return [text.strip() for text in re.findall(r'"([^"]+)"', gloss)]


def definition_of(gloss: str) -> str:
    """The first clause of a gloss, and the second if the first is very short; without brackets, quotes, examples."""
    text = re.sub(r"\([^()]*\)", " ", gloss.split('"')[0])
    text = re.sub(r"^\s*[,:;]", "", text).replace("`", "'")
    clauses = [" ".join(part.split()).replace(" ,", ",").strip(" ,:") for part in re.split(r"[;:]|--", text)]
    clauses = [clause for clause in clauses if clause]
    if not clauses:
        return ""
    first = clauses[0]
    if len(first.split()) < 4 and len(clauses) > 1 and clauses[1].split()[0] in {"a", "an", "the", "any"}:
        first = f"{first}, {clauses[1]}"
    return _shorten(first).removeprefix("to ").rstrip(".")


def _shorten(text: str, soft: int = 15) -> str:
    """Cut a long definition at the last comma that leaves between 6 and ``soft`` words, if there is one."""
    words = text.split()
    if len(words) > soft:
        for end in range(soft, 5, -1):
            if words[end - 1].endswith(","):
                return " ".join(words[:end]).rstrip(",")
    return text


def singular(word: str) -> str:
    """The likely singular of a plural in -s; other words are returned unchanged."""
    if word.endswith("ies") and len(word) > 4:
        return word[:-3] + "y"
    if word.endswith(("ses", "xes", "ches", "shes")):
        return word[:-2]
    if word.endswith("s") and not word.endswith(("ss", "us", "is")):
        return word[:-1]
    return word


def plural(word: str) -> str:
    """The regular plural of a noun."""
    if re.search(r"[^aeiou]y$", word):
        return word[:-1] + "ies"
    if word.endswith("man"):
        return word[:-3] + "men"
    return word + ("es" if word.endswith(("s", "x", "ch", "sh", "z")) else "s")


def indefinite(text: str) -> str:
    """``text`` with ``a`` or ``an`` before it, chosen by the sound of its first word."""
    first = text.split()[0].lower()
    vowel = first[0] in "aeiou" and not re.match(r"(eu|ewe|uni([^nm]|$)|us[aeu]|ut[ei]|one\b|once|ub|ur[aeio])", first)
    silent = first.startswith(("hour", "honest", "honor", "heir")) or re.match(r"[fhlmnrsx](-|$)", first)
    return ("an " if vowel or silent else "a ") + text


def capital(text: str) -> str:
    """``text`` with its first letter in upper case."""
    return text[:1].upper() + text[1:]


def _opens_clause(word: str) -> bool:
    """Whether ``word``, following a noun, ends the noun phrase: whether it is a participle or an adverb."""
    return word.endswith(("ed", "ing", "ly")) or word in {"often", "sometimes"}


class Grammar:
    """Decides which words take articles, from their use in WordNet's own glosses and examples."""

    def __init__(self, net: WordNet) -> None:
        self.net = net
        self.frequency: Counter[str] = Counter()
        self.with_article: Counter[str] = Counter()
        self.bare: Counter[str] = Counter()
        for synset in net.synsets.values():
            self._count(re.findall(r"[a-z]+(?:[-'][a-z]+)*", synset.gloss.lower()))

    def _count(self, words: list[str]) -> None:
        for before, word in zip(["of", *words], words, strict=False):
            self.frequency[word] += 1
            if before in {"a", "an"}:
                self.with_article[word] += 1
            elif before in {"of", "with", "in", "to", "and", "by", "from", "for"}:
                self.bare[word] += 1

    def is_plural(self, word: str) -> bool:
        """Whether ``word`` is a plural, such as *trousers*."""
        last = word.split()[-1]
        if last in PLURAL_ONLY:
            return True
        known = (singular(last), "n") in self.net.index and not last.endswith(("ics", "as", "os", "ss"))
        return known and singular(last) != last and len(last) > 3

    def is_mass(self, word: str, file: int) -> bool:
        """Whether ``word`` takes no article, such as *water*; ``file`` is its lexicographer file."""
        last = word.split(" of ")[0].split()[-1].lower()
        if last in UNCOUNTABLE or last in COUNTABLE:
            return last in UNCOUNTABLE
        counted = self.with_article[last] + self.frequency[plural(last)]
        if file in MASS_FILES:
            return counted <= 2 * self.bare[last] + 2
        if last.endswith(("ness", "ism", "ity", "ology", "ics", "ance", "ence")) and file != PERSON_FILE:
            return counted <= self.bare[last]
        if file in MIXED_FILES:
            return counted < self.bare[last] or last.endswith("ing")
        return counted * 4 < self.bare[last] and self.bare[last] > 3

    def subject(self, word: str, synset: Synset) -> str:
        """The word as the subject of a sentence, with an article if it takes one."""
        if not word.split()[-1].islower():
            takes_the = re.search(r"\b(River|Sea|Ocean|War|States|Kingdom|Mountains|Islands|Union|Empire)\b", word)
            common = not any(symbol == "@i" for symbol, *_ in synset.pointers) and synset.file == PERSON_FILE
            return f"the {word}" if takes_the else indefinite(word) if common else word
        if self.is_plural(word) or self.is_mass(word, synset.file):
            return word
        return indefinite(word)

    def noun_phrase(self, text: str, file: int) -> str:
        """A gloss's text, with an article if its head noun needs one; ``file`` is the word's lexicographer file."""
        words = text.split()
        if words[0].lower().rstrip(",") in DETERMINERS or words[0][0].isdigit():
            return text
        if re.fullmatch(
            r"(?!west|interest|forest)[a-z]{2,}est|first|second|last|main|only|same", words[0].split("-")[0]
        ):
            return "the " + text
        head = self._head(words)
        if file in NATURAL_FILES and self.is_plural(head):
            return "one of the " + text
        files = [self.net.synsets["n", offset].file for offset in self.net.index.get((head.lower(), "n"), [])[:1]]
        if words[0] in NP_END or self.is_plural(head) or (words[0][0].isupper() and len(words) == 1):
            return text
        if not files:  # a head that WordNet does not know as a noun: an adjective, or an irregular plural
            return (
                indefinite(text) if head.isalpha() and not head.endswith(("s", "ing", "men", "people", "ly")) else text
            )
        return text if self.is_mass(head, files[0]) else indefinite(text)

    def _head(self, words: list[str]) -> str:
        """The head of the noun phrase at the start of ``words``: the phrase's last word."""
        head = words[0]
        for i, word in enumerate(words):
            after_noun = i > 0 and self._only_noun(words[i - 1].rstrip(","))
            if word in {"and", "or"} and not after_noun:
                continue
            if word in NP_END or (after_noun and (_opens_clause(word) or words[i - 1].endswith(","))):
                break
            head = word.rstrip(",")
        return head

    def _only_noun(self, word: str) -> bool:
        index, word = self.net.index, word.lower()
        return ((word, "n") in index or (singular(word), "n") in index) and (word, "a") not in index
