"""The training data of dsv2-nano: question-and-answer conversations, generated from WordNet 3.0.

A deterministic pipeline: parse the database files, rank the words by how common they are, turn each gloss into one
grammatical sentence, and ask for it (and for the word's relations) in several phrasings. One gloss in a hundred is held
out in every phrasing, to measure the perplexity on unseen definitions.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from nano_wordnet import (
    MAIN_GLOSS,
    PERSON_FILE,
    UNSUITABLE,
    Grammar,
    Sense,
    Synset,
    capital,
    definition_of,
    examples_of,
    load_wordnet,
    plural,
)

BOS = "<｜begin▁of▁sentence｜>"
EOS = "<｜end▁of▁sentence｜>"

NOUNS, VERBS, ADJECTIVES = 8_500, 800, 800
COMMON_NOUNS = 4_500  # never held out: a user is likely to ask for these
HELD_OUT_FRACTION = 0.01

SENSE_BONUS = {5: 5.0, 8: 5.0, 13: 4.0, 6: 2.0, 20: 2.0, 27: 2.0, 17: 2.0}  # by file: concrete meanings first


@dataclass(frozen=True)
class Turn:
    """A question in several phrasings, with its answer."""

    questions: tuple[str, ...]
    answer: str
    follow_ups: tuple[str, ...] = ()  # phrasings that refer to the topic as "it"


@dataclass(frozen=True)
class Topic:
    """All turns about one word: the definition first, then its relations."""

    word: str
    weight: float
    turns: tuple[Turn, ...]


class Corpus:
    """All topics of the training set, and the held-out definitions."""

    def __init__(self, wordnet: Path, seed: int = 0) -> None:
        self.net = load_wordnet(wordnet)
        self.grammar = Grammar(self.net)
        chosen = [(pos, self._ranked(pos)[:size]) for pos, size in zip("nva", (NOUNS, VERBS, ADJECTIVES), strict=True)]
        self.scores = {(sense.pos, sense.offset): sense.score for _, senses in chosen for sense in senses}
        self.best: dict[tuple[str, int], str] = {}
        for _, senses in chosen:
            for sense in senses:
                self.best.setdefault((sense.pos, sense.offset), sense.word)
        held = self._held_out(chosen, random.Random(seed))
        self.topics: list[Topic] = []
        self.held_out: list[Topic] = []
        for pos, senses in chosen:
            for rank, sense in enumerate(senses):
                topic = self._topic(sense, _weight(pos, rank))
                if topic is not None:
                    (self.held_out if (sense.pos, sense.offset) in held else self.topics).append(topic)

    def _ranked(self, pos: str) -> list[Sense]:
        """Each word's main sense, the most common words first: by tag counts and by use in WordNet's own glosses."""
        senses = []
        for (word, word_pos), offsets in self.net.index.items():
            if word_pos != pos or not re.fullmatch(r"[a-z]{3,}(?:[ -][a-z]{2,})?", word):
                continue
            offset = self._main_sense(word, pos, offsets)
            spelled = self._spelling(word, pos, offset)
            if spelled is None or (pos != "n" and (" " in word or self._uses(word, pos) <= self._uses(word, "n"))):
                continue
            uses = self.grammar.frequency[word] + 0.5 * self.grammar.frequency[plural(word)]
            score = math.log1p(self._uses(word, pos)) + 1.2 * math.log1p(uses)
            senses.append(Sense(spelled, pos, offset, score + self._everyday(pos, offset)))
        return sorted(senses, key=lambda sense: (-sense.score, sense.word))

    def _uses(self, word: str, pos: str) -> int:
        """How often WordNet's tagged texts use ``word`` as this part of speech, in any meaning."""
        senses = range(1, 1 + len(self.net.index.get((word, pos), [])))
        return sum(self.net.counts.get((word, pos, number), 0) for number in senses)

    def _main_sense(self, word: str, pos: str, offsets: list[int]) -> int:
        """The meaning to teach: the most frequent one, with a preference for concrete over abstract things."""

        hint = MAIN_GLOSS.get(word) if pos == "n" else None
        for offset in offsets:
            if hint and hint in self.net.synsets[pos, offset].gloss:
                return offset

        def rating(number: int) -> float:
            file = self.net.synsets[pos, offsets[number - 1]].file
            return (self.net.counts.get((word, pos, number), 0) + 1 / number) * SENSE_BONUS.get(file, 1.0)

        return offsets[max(range(1, 1 + len(offsets)), key=rating) - 1] if pos == "n" else offsets[0]

    def _spelling(self, word: str, pos: str, offset: int) -> str | None:
        """The word as the database spells it; None for the scientific name of a group of living things."""
        synset = self.net.synsets[pos, offset]
        spelled = next((spelled for spelled in sorted(synset.words, reverse=True) if spelled.lower() == word), None)
        return None if spelled != word and pos == "n" and synset.file in {5, 20} else spelled

    def _everyday(self, pos: str, offset: int) -> float:
        """A bonus for concrete things: animals, artifacts, bodies, foods, plants, people, substances, places."""
        synset = self.net.synsets[pos, offset]
        if pos != "n":
            return 0.0
        instance = any(symbol == "@i" for symbol, *_ in synset.pointers)
        return (1.2 if synset.file in {5, 6, 8, 13, 17, 18, 20, 27} else 0.0) - (1.0 if instance else 0.0)

    def _held_out(self, chosen: list[tuple[str, list[Sense]]], rng: random.Random) -> set[tuple[str, int]]:
        """Choose the meanings to hold out of training, none of them a common noun's."""
        common = {sense.offset for sense in chosen[0][1][:COMMON_NOUNS]}
        meanings = sorted({(s.pos, s.offset) for _, senses in chosen for s in senses if s.offset not in common})
        return set(rng.sample(meanings, round(HELD_OUT_FRACTION * sum(len(senses) for _, senses in chosen))))

    def _topic(self, sense: Sense, weight: float) -> Topic | None:
        synset = self.net.synsets[sense.pos, sense.offset]
        text = definition_of(synset.gloss)
        if (
            not 2 <= len(text.split()) <= 32
            or UNSUITABLE.search(synset.gloss)
            or text.lower().startswith((sense.word.lower() + " ", "of or"))
        ):
            return None
        build = {"n": self._noun, "v": self._verb, "a": self._adjective}[sense.pos]
        used_as_plural = sense.pos == "n" and re.match(r"\(usually (in the )?plural", synset.gloss)
        word = plural(sense.word) if used_as_plural else sense.word
        turns = [turn for turn in build(word, synset, text) if turn is not None]
        return Topic(sense.word, weight, tuple(turns))

    def _noun(self, word: str, synset: Synset, text: str) -> list[Turn | None]:
        grammar = self.grammar
        subject = grammar.subject(word, synset)
        are = "are" if grammar.is_plural(word) else "is"
        person = synset.file == PERSON_FILE and any(symbol == "@i" for symbol, *_ in synset.pointers)
        copula = "was" if person else are
        answer = f"{capital(subject)} {copula} {grammar.noun_phrase(text, synset.file)}."
        the = subject if person or subject == word else f"the {word}"
        asked = (f"Who was {word}?",) if person else (f"What {are} {subject}?",) * 4
        forms = (
            *(f"What's {subject}?", f"Define {word}.", f"what {are} {word}", f"Tell me about {the}."),
            *(f"What does {word} mean?", f"Explain what {subject} {are}.", f"what {are} {subject}?"),
            f"Can you tell me what {subject} {are}?",
        )
        definition = Turn(asked + forms, answer)
        if are == "are":
            return [definition, self._sentence(word, synset)]
        return [
            definition,
            self._kind(word, subject, synset),
            self._examples(word, subject, synset),
            self._parts(subject, synset),
            self._synonym(word, synset),
            self._opposite(word, synset),
            self._sentence(word, synset),
        ]

    def _related(self, synset: Synset, symbols: set[str]) -> list[tuple[str, Synset]]:
        """The chosen words that ``synset`` points to by any of ``symbols``, most common first."""
        found = [(pos, offset) for symbol, pos, offset, _ in synset.pointers if symbol in symbols and pos == "n"]
        known = sorted((key for key in found if key in self.best), key=lambda key: -self.scores[key])
        return [(self.best[key], self.net.synsets[key]) for key in known]

    def _listed(self, related: list[tuple[str, Synset]], limit: int) -> str:
        names = [self.grammar.subject(word, synset) for word, synset in related[:limit]]
        return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]

    def _kind(self, word: str, subject: str, synset: Synset) -> Turn | None:
        above = [key for key in synset.pointers if key[0] in {"@", "@i"}]
        if not above or (synset.file == PERSON_FILE and word != word.lower()):
            return None
        parent = self.net.synsets[above[0][1], above[0][2]]
        name = self.best.get((above[0][1], above[0][2]), parent.words[0])
        if name.lower() in word.lower().split():
            return None
        phrase = self.grammar.subject(name, parent)
        asked = (f"What kind of thing is {subject}?", f"What type of thing is {subject}?")
        answer = f"{capital(subject)} is {phrase}."
        return Turn(asked, answer, ("What kind of thing is it?", "What type of thing is that?"))

    def _examples(self, word: str, subject: str, synset: Synset) -> Turn | None:
        below = [pair for pair in self._related(synset, {"~"}) if pair[0].islower()]
        if len(below) < 3 or subject == word:
            return None
        many = plural(word)
        asked = (f"Name some {many}.", f"Give me some examples of {many}.", f"What kinds of {many} are there?")
        answer = f"Some {many} are {self._listed(below, 3)}."
        return Turn(
            (*asked, f"Name a few {many}."), answer, ("Can you give me some examples?", "What kinds are there?")
        )

    def _parts(self, subject: str, synset: Synset) -> Turn | None:
        parts = [pair for pair in self._related(synset, {"%p"}) if pair[0].islower()]
        if not parts:
            return None
        asked = (f"What are the parts of {subject}?", f"What does {subject} have?", f"Name a part of {subject}.")
        return Turn(asked, f"{capital(subject)} has {self._listed(parts, 3)}.", ("What parts does it have?",))

    def _synonym(self, word: str, synset: Synset) -> Turn | None:
        others = [other for other in synset.words if other.lower() != word.lower() and other.islower()]
        if not others or word != word.lower():
            return None
        asked = (f"What is another word for {word}?", f"Give me a synonym for {word}.", f"What is a synonym of {word}?")
        return Turn(asked, f"Another word for {word} is {others[0]}.", ("Is there another word for it?",))

    def _opposite(self, word: str, synset: Synset) -> Turn | None:
        for symbol, pos, offset, link in synset.pointers:  # an antonym links two words, not two meanings
            if symbol == "!" and synset.words[int(link[:2], 16) - 1].lower() == word.lower():
                other = self.net.synsets[pos, offset].words[int(link[2:], 16) - 1]
                asked = (f"What is the opposite of {word}?", f"Opposite of {word}?", f"What's the opposite of {word}?")
                return Turn(asked, f"The opposite of {word} is {other}.", ("What is the opposite?",))
        return None

    def _sentence(self, word: str, synset: Synset) -> Turn | None:
        stem = word[:-1] if len(word) > 3 else word
        fits = [text for text in examples_of(synset.gloss) if stem in text.lower() and 4 <= len(text.split()) <= 14]
        if not fits:
            return None
        sentence = capital(fits[0]) + ("" if fits[0][-1] in ".!?" else ".")
        asked = (f"Use the word {word} in a sentence.", f"Give me a sentence with {word}.")
        return Turn(asked, sentence, ("Use it in a sentence.", "Can you use it in a sentence?"))

    def _verb(self, word: str, synset: Synset, text: str) -> list[Turn | None]:
        answer = f"To {word} means to {text}."
        asked = (f"What does it mean to {word}?",) * 3 + (
            *(f"What does to {word} mean?", f"what does it mean to {word}", f"Define the verb {word}."),
            f"Explain what it means to {word}.",
        )
        return [Turn(asked, answer), self._opposite(word, synset), self._sentence(word, synset)]

    def _adjective(self, word: str, synset: Synset, text: str) -> list[Turn | None]:
        asked = (f"What does {word} mean?",) * 3 + (
            *(f"what does {word} mean", f"Define {word}.", f"What does the word {word} mean?"),
            f"What does it mean to be {word}?",
        )
        turns = [Turn(asked, f"{capital(word)} means {text}."), self._opposite(word, synset)]
        return [*turns, self._sentence(word, synset)]


def _weight(pos: str, rank: int) -> float:
    """How often a pass over the data asks for a word's definition: most often for common nouns."""
    return 1.0 + 4.0 / (1.0 + (rank / 1300) ** 2) if pos == "n" else 2.0


SYSTEM_TEXTS = (
    "You are a helpful assistant.",
    "You are dsv2-nano, a small assistant.",
    "Answer in one short sentence.",
    "You are a dictionary. Answer briefly.",
    "You are a friendly assistant.",
)

SMALL_TALK: tuple[tuple[tuple[str, ...], str], ...] = (
    (
        (
            "Who are you?",
            "who are you",
            "What are you?",
            "Tell me about yourself.",
            "Introduce yourself.",
            "What is dsv2-nano?",
        ),
        "I am dsv2-nano, a very small language model with the DeepSeek-V2 architecture. "
        "I exist so that dsv2-local can be tried and tested, and I know little.",
    ),
    (("What is your name?", "What's your name?", "Do you have a name?"), "My name is dsv2-nano."),
    (
        ("Hello", "Hello!", "hello", "Hello there!", "Hi", "Hi!", "hi", "Hey", "Hi there!"),
        "Hello! What would you like to know?",
    ),
    (("Good morning", "Good morning!"), "Good morning! Which word may I explain?"),
    (("Good evening", "Good evening!"), "Good evening! Which word may I explain?"),
    (
        ("How are you?", "How are you doing?", "How's it going?", "how are you"),
        "I am fine, thank you. Ask me about a word.",
    ),
    (("Thanks", "Thanks!", "Thank you", "Thank you!", "thank you", "Thank you very much."), "You are welcome!"),
    (("Bye", "Bye!", "Goodbye", "Goodbye!", "See you later."), "Goodbye, and thank you for trying me."),
    (
        ("What can you do?", "what can you do", "How can you help me?", "Help", "help", "What do you know?"),
        "I can say in one sentence what a common word means. Try asking: What is a violin?",
    ),
    (
        ("Who made you?", "Who trained you?", "Where do you come from?"),
        "I was trained for dsv2-local, on sentences made from WordNet.",
    ),
    (
        ("How big are you?", "How many parameters do you have?"),
        "I am very small: I have about seventeen million parameters.",
    ),
    (
        ("How were you trained?", "What were you trained on?"),
        "I was trained for about an hour on two CPU cores, on sentences made from WordNet.",
    ),
    (("What is dsv2-local?", "Tell me about dsv2-local."), "dsv2-local is a local runtime for DeepSeek-V2 models."),
    (
        ("What is DeepSeek-V2?", "Tell me about DeepSeek-V2."),
        "DeepSeek-V2 is a language model with latent attention and a mixture of experts.",
    ),
    (("Are you ChatGPT?", "Are you GPT-4?", "Are you Claude?"), "No, I am dsv2-nano, a very small language model."),
    (("Are you DeepSeek?", "Are you DeepSeek-V2?"), "No, I am dsv2-nano. I only share the DeepSeek-V2 architecture."),
    (("Are you human?", "Are you a person?", "Are you real?"), "No, I am a very small language model."),
    (
        ("Are you clever?", "Are you smart?", "Are you intelligent?"),
        "Not very. I am a very small language model, and I know little.",
    ),
    (
        ("Can you make mistakes?", "Are you always right?", "Can I trust you?"),
        "I often make mistakes, so please check what I say.",
    ),
    (
        ("Can you write code?", "Can you program?", "Write some code."),
        "No, I am too small to write code. I can explain common words.",
    ),
    (
        ("Can you do math?", "What is 2 + 2?", "Do you know mathematics?"),
        "I am too small for arithmetic. I can explain common words.",
    ),
    (
        ("Tell me a joke.", "Tell me a joke", "Do you know a joke?"),
        "I know only one: a dictionary is a book with no plot, but every word is explained.",
    ),
    (("Tell me a story.", "Write a poem.", "Write a story."), "I am too small for that. I can explain common words."),
    (
        ("What languages do you speak?", "Do you speak English?", "Do you speak French?"),
        "I know only a little English.",
    ),
    (("Do you have feelings?", "Are you happy?", "Are you sad?"), "I have no feelings. I only predict words."),
    (("What is the meaning of life?",), "That question is too large for a model as small as I am."),
    (
        ("Do you like music?", "Do you like cats?", "What do you like?"),
        "I like nothing in particular, but I can explain words.",
    ),
    (("What is your favorite color?", "What's your favourite color?"), "I have no favorite color."),
    (("How old are you?", "When were you born?"), "I have no age. I am a small file of numbers."),
    (("Where are you?", "Where do you live?"), "I run on your own computer."),
    (("Do you need the internet?", "Are you online?"), "No, I run on your own computer, without the internet."),
    (("Do you need a GPU?",), "No, I am small enough for any processor."),
    (("Is this private?", "Do you keep my data?"), "I run on your own computer, and I send nothing anywhere."),
    (("What day is it today?", "What time is it?"), "I do not know. I have no clock."),
    (("What is the weather like?", "What's the weather today?"), "I do not know. I cannot see outside."),
    (("Ok", "OK", "Okay", "ok"), "Very well. What else would you like to know?"),
    (("Yes", "yes"), "Good. What would you like to know?"),
    (("No", "no"), "All right."),
    (("Sorry", "I am sorry."), "No problem at all."),
    (("test", "Test", "This is a test."), "The test works: I am dsv2-nano, and I am running."),
    (("Can you help me?", "I need help.", "Please help me."), "I can try. Ask me what a common word means."),
    (("That is wrong.", "You are wrong."), "I am sorry. I am a very small model, and I make mistakes."),
    (("Great!", "Nice!", "Good job!", "Well done!"), "Thank you!"),
)
SMALL_TALK_WEIGHT = 3.0  # how often each phrasing is used per pass

LONG_FRACTION = 0.15  # of a pass's topics: they are part of conversations about several topics
SYSTEM_FRACTION = 0.05  # of conversations: they begin with a system message
RELATION_FRACTION = 0.8  # of a topic's relations: they are asked for in conversations of one turn


@dataclass(frozen=True)
class Conversation:
    """A training text in the chat template's layout, as pieces (text, whether it is an answer); it begins with BOS."""

    pieces: tuple[tuple[str, bool], ...]

    @property
    def text(self) -> str:
        """The whole conversation, special tokens included."""
        return "".join(piece for piece, _ in self.pieces)


def render(turns: Iterable[tuple[str, str]], system: str | None = None) -> Conversation:
    """Write (question, answer) pairs in the layout of DeepSeek-V2's chat template."""
    pieces = []
    start = BOS + (f"{system}\n\n" if system else "")
    for question, answer in turns:
        pieces += [(f"{start}User: {question}\n\nAssistant:", False), (f" {answer}{EOS}", True)]
        start = ""
    return Conversation(tuple(pieces))


def pass_over(topics: list[Topic], seed: int) -> Iterator[Conversation]:
    """Generate the conversations of one pass over the corpus, in which each topic occurs about ``weight`` times."""
    rng = random.Random(seed)
    pending: list[tuple[str, str]] = []  # the turns of the long conversation under construction
    limit = rng.randint(3, 14)
    for topic in _repeated(topics, rng):
        if rng.random() < LONG_FRACTION:
            pending += _told(topic, rng)
            if len(pending) >= limit:
                yield render(pending[:14], _system(rng))
                pending, limit = [], rng.randint(3, 14)
            continue
        definition = topic.turns[0]
        yield render([(rng.choice(definition.questions), definition.answer)], _system(rng))
        for turn in topic.turns[1:]:
            if rng.random() < RELATION_FRACTION / max(1.0, topic.weight):
                yield render([(rng.choice(turn.questions), turn.answer)])
    for questions, answer in SMALL_TALK:
        for question in questions * int(SMALL_TALK_WEIGHT):
            yield render([(question, answer)], _system(rng))


def _repeated(topics: list[Topic], rng: random.Random) -> list[Topic]:
    """Each topic ``weight`` times (a fraction is a probability), shuffled."""
    repeated = [topic for topic in topics for _ in range(int(topic.weight + rng.random()))]
    rng.shuffle(repeated)
    return repeated


def _told(topic: Topic, rng: random.Random) -> list[tuple[str, str]]:
    """Turns about a topic: the definition, sometimes followed by questions about "it", sometimes by small talk."""
    definition = topic.turns[0]
    told = [(rng.choice(definition.questions), definition.answer)]
    for turn in topic.turns[1:]:
        if turn.follow_ups and rng.random() < 0.4:
            told.append((rng.choice(turn.follow_ups), turn.answer))
    if rng.random() < 0.1:
        questions, answer = rng.choice(SMALL_TALK)
        told.append((rng.choice(questions), answer))
    return told


def _system(rng: random.Random) -> str | None:
    return rng.choice(SYSTEM_TEXTS) if rng.random() < SYSTEM_FRACTION else None


def held_out_conversations(corpus: Corpus) -> list[Conversation]:
    """Conversations that ask for each held-out definition in its first phrasing."""
    return [render([(topic.turns[0].questions[0], topic.turns[0].answer)]) for topic in corpus.held_out]
