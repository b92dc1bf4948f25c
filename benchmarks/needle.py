"""Needles in dsv2-nano's context: over how many tokens its cache carries anything, in bf16 and in int8.

    python benchmarks/needle.py [--needles 200] [--json FILE]

The text between needle and question is questions with nano's own answers, whole turns until a distance is reached, with
up to 32 tokens or a turn more of the same before the needle. "*": longer than the 512 tokens nano was trained on.

    key     "The secret word is hammer." ... "What is the secret word?": the greedy answer has the word, or not
    it      a question about a hammer, small talk ... "What kind of thing is it?": the answer is about a hammer, or not
    tokens  32 random tokens ... the first 4 of them again: mean log-probability of the other 28, nats a token

The control has another needle in its place and is held against the same answer, so that what is gained over it came
through the cache. ± is the standard error, of the difference where there is one of pairs.
"""

import argparse
import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from random import Random

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import dsv2_local
from dsv2_local.kernels.format import CacheDtype

TRAINED = 512
DISTANCES = (0, 16, 32, 64, 128, 256, 320, 512)
LEAD = 32  # tokens before the needle, at most
STRING, CUE = 32, 4  # random tokens, and those that are repeated
ANSWER = 24  # tokens of an answer that are read
KEYS = (
    "violin", "river", "hammer", "doctor", "dog", "piano", "horse", "apple", "chair", "window", "bridge", "garden",
    "knife", "ship", "train", "clock", "mirror", "forest", "king", "bird",
)  # fmt: skip
FILLING = (
    "bread", "water", "anger", "teacher", "mountain", "cat", "house", "car", "shoe", "guitar", "city", "tree", "hand",
    "heart", "song", "letter", "coat", "door", "fish", "flower", "island", "judge", "lake", "machine", "market",
    "milk", "money", "moon", "nurse", "park", "pencil", "prison", "rain", "road", "school", "snow", "soldier", "star",
)  # fmt: skip
UNCOUNTED = frozenset({"bread", "water", "anger", "milk", "money", "rain", "snow"})
SMALL_TALK = (
    "Hello!", "Thanks!", "How are you?", "What can you do?", "Are you human?", "How old are you?", "Do you need a GPU?",
    "What day is it today?", "Tell me a joke.", "Can you write code?", "Do you have feelings?", "Where are you?",
)  # fmt: skip
HEARD = "Very well. What else would you like to know?"


@dataclass(frozen=True)
class Figure:
    """One measure at one distance; `mean` and `control` are shares of right answers, or nats a token.

    `distance` is the mean number of tokens between needle and question, `longest` the longest text with its answer.
    """

    task: str
    cache: str
    least_distance: int
    distance: float
    longest: int
    needles: int
    mean: float
    control: float
    difference: float
    se: float


@dataclass(frozen=True)
class Found:
    """What one needle gave at one distance, with it and with another one in its place."""

    distance: int
    end: int
    seen: float
    control: float


class Turns:
    """Questions with the model's own greedy answers, as token ids."""

    def __init__(self, llm: dsv2_local.LLM, questions: Sequence[str]) -> None:
        self.ids = [turn(llm, question, answer(llm, chat(llm, question))) for question in questions]

    def reach(self, distance: int, random: Random) -> list[int]:
        """Whole turns until they have at least `distance` tokens together."""
        ids: list[int] = []
        while len(ids) < distance:
            ids += random.choice(self.ids)
        return ids


def what_is(word: str) -> str:
    return f"What is {word}?" if word in UNCOUNTED else f"What is {'an' if word[0] in 'aeiou' else 'a'} {word}?"


def chat(llm: dsv2_local.LLM, question: str) -> list[int]:
    """A question that waits for its answer, with BOS."""
    return llm.tokenizer.encode_chat([{"role": "user", "content": question}])


def turn(llm: dsv2_local.LLM, question: str, reply: str) -> list[int]:
    """A question with its answer, without BOS."""
    return llm.tokenizer.encode_chat(
        [{"role": "user", "content": question}, {"role": "assistant", "content": reply}], add_generation_prompt=False
    )[1:]


def answer(llm: dsv2_local.LLM, ids: list[int], tokens: int = 40) -> str:
    """The greedy answer; what was read before is reused by the engine."""
    return "".join(chunk.text for chunk in llm.generate(ids, temperature=0, max_tokens=tokens)).strip()


def says(text: str, word: str) -> bool:
    """Whether `word` stands in the text as a word of its own."""
    return re.search(rf"\b{re.escape(word)}\b", text, re.IGNORECASE) is not None


def summary(task: str, cache: str, least: int, found: Sequence[Found]) -> Figure:
    """The figures of a distance, over its needles."""
    n = len(found)
    seen, control = sum(f.seen for f in found) / n, sum(f.control for f in found) / n
    gains = [f.seen - f.control for f in found]
    gain = seen - control
    se = math.sqrt(sum((g - gain) ** 2 for g in gains) / max(1, n - 1) / n)
    distance = sum(f.distance for f in found) / n
    return Figure(task, cache, least, distance, max(f.end for f in found), n, seen, control, gain, se)


class Recall:
    """Greedy answers to a question about a needle: one turn for each of `KEYS`."""

    share = 20  # per cent of all needles: an answer takes longer than a score

    def __init__(
        self, llm: dsv2_local.LLM, needles: dict[str, list[int]], question: str, lead: Turns, filling: Turns
    ) -> None:
        self.llm, self.needles, self.lead, self.filling = llm, needles, lead, filling
        self.question = chat(llm, question)[1:]

    def needle(self, random: Random, distances: Sequence[int]) -> list[Found]:
        word, other = random.sample(KEYS, 2)
        lead = [0, *self.lead.reach(random.randrange(LEAD), random)]  # BOS first
        between: list[int] = []
        found = []
        for least in distances:
            between += self.filling.reach(least - len(between), random)
            texts = [[*lead, *self.needles[key], *between, *self.question] for key in (word, other)]
            seen, control = (float(says(answer(self.llm, ids, ANSWER), word)) for ids in texts)
            found.append(Found(len(between), len(texts[0]) + ANSWER, seen, control))
        return found


class Induction:
    """Log-probabilities of random tokens that were there before."""

    share = 100

    def __init__(self, llm: dsv2_local.LLM, filling: Turns) -> None:
        self.filling, self.model = filling, llm.engine.model
        self.vocab = llm.config.vocab_size
        self.cache = self.model.new_cache(llm.context, llm.engine.cache.dtype)

    def needle(self, random: Random, distances: Sequence[int]) -> list[Found]:
        string, other = ([random.randrange(3, self.vocab) for _ in range(STRING)] for _ in range(2))
        lead = [0, *self.filling.reach(random.randrange(LEAD), random)]
        between: list[list[int]] = []
        for least in distances:
            between.append(self.filling.reach(least - sum(map(len, between)), random))
        seen, control = (self._scores([*lead, *first], between, string) for first in (string, other))
        lengths = list(accumulate(map(len, between)))
        ends = [len(lead) + 2 * STRING + length for length in lengths]
        return [Found(*values) for values in zip(lengths, ends, seen, control, strict=True)]

    def _scores(self, start: list[int], between: list[list[int]], string: list[int]) -> list[float]:
        """The string's score after `start` and each more of what lies between."""
        self.cache.clear()
        self._read(start)
        scores = []
        for ids in between:
            if ids:
                self._read(ids)
            length = self.cache.length
            logits = self.model.logits(self._read(string[:-1])[CUE - 1 :]).log_softmax(1)
            scores.append(float(logits.gather(1, torch.tensor(string[CUE:])[:, None]).mean()))
            self.cache.truncate(length)
        return scores

    def _read(self, ids: list[int]) -> Tensor:
        return self.model.forward(torch.tensor(ids), self.cache)


def measure(caches: Sequence[str], needles: int, distances: Sequence[int]) -> Iterator[Figure]:
    """All tasks with every type of cache: the same needles in the same text, which the first of them answered."""
    models = {cache: dsv2_local.load(cache_dtype=cache) for cache in caches}
    first = models[caches[0]]
    dictionary = Turns(first, [what_is(word) for word in FILLING])
    small_talk = Turns(first, SMALL_TALK)
    told = {word: turn(first, f"The secret word is {word}.", HEARD) for word in KEYS}
    asked = {word: turn(first, what_is(word), answer(first, chat(first, what_is(word)))) for word in KEYS}
    for cache, llm in models.items():
        tasks: dict[str, Recall | Induction] = {
            "tokens": Induction(llm, dictionary),
            "it": Recall(llm, asked, "What kind of thing is it?", dictionary, small_talk),
            "key": Recall(llm, told, "What is the secret word?", dictionary, dictionary),
        }
        for name, task in tasks.items():
            random = Random(f"0 {name}")
            rows = [task.needle(random, distances) for _ in range(needles * task.share // 100)]
            for least, found in zip(distances, zip(*rows, strict=True), strict=True):
                yield summary(name, cache, least, found)


def show(figures: Sequence[Figure]) -> None:
    table = Table("task", "cache", "tokens between", "right, or nats a token", "control", "gain", "±", "needles")
    for f in figures:
        number = "{:.3f}" if f.task == "tokens" else "{:.1%}"
        cells = (number.format(value) for value in (f.mean, f.control, f.difference, f.se))
        table.add_row(f.task, f.cache, f"{f.distance:,.0f}{'*' * (f.longest > TRAINED)}", *cells, str(f.needles))
    Console(highlight=False, width=120).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--needles", type=int, default=200, help="random strings; a fifth as many for each question")
    parser.add_argument("--distances", help="numbers with commas between, ascending")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    given = parser.parse_args()
    distances = [int(part) for part in given.distances.split(",")] if given.distances else DISTANCES
    figures: list[Figure] = []
    for figure in measure((CacheDtype.BF16, CacheDtype.INT8), given.needles, distances):
        figures.append(figure)
        if given.json:
            given.json.write_text(json.dumps([asdict(f) for f in figures], indent=1) + "\n")
    show(figures)


if __name__ == "__main__":
    main()
