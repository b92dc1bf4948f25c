"""Needle in a haystack for dsv2-nano: how far back its KV cache carries information, in bf16 and in int8.

    python benchmarks/needle.py [--needles 200] [--json FILE]

The text between needle and question consists of questions with nano's own answers, whole turns until a distance is
reached. Up to 32 tokens of the same kind (more by at most a turn) come before the needle. "*": longer than the 512
tokens that nano was trained on.

    key     "The secret word is hammer." ... "What is the secret word?": whether the greedy answer has the word
    it      a question about a hammer, small talk ... "What kind of thing is it?": whether the answer is about a hammer
    tokens  32 random tokens ... the first 4 of them again: mean log-probability of the other 28, in nats per token

The control has a different needle and is compared with the same answer, so that the gain over it must come through the
cache. ± is the standard error of the paired difference.
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
LEAD = 32  # maximum tokens before the needle, not counting the rest of the last turn
STRING, CUE = 32, 4  # random tokens, and how many of them are repeated as the cue
ANSWER = 24  # maximum tokens of an answer
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
class Result:
    """The result of one task at one distance.

    Attributes:
        task, cache: name of the task, and type of the KV cache.
        least_distance, distance: minimum and mean number of tokens between needle and question.
        longest: tokens of the longest text with its answer.
        needles: number of samples.
        mean, control: fraction of correct answers, or nats per token, with the needle and with a different one.
        difference, se: `mean` minus `control`, and its standard error.
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
class Sample:
    """The score of one needle at one distance, with it (`seen`) and with a different one in its place (`control`)."""

    distance: int
    end: int
    seen: float
    control: float


class Turns:
    """Questions with the model's own greedy answers, as token ids."""

    def __init__(self, llm: dsv2_local.LLM, questions: Sequence[str]) -> None:
        self.ids = [turn(llm, question, answer(llm, chat(llm, question))) for question in questions]

    def reach(self, distance: int, random: Random) -> list[int]:
        """Random whole turns with at least `distance` tokens in total."""
        ids: list[int] = []
        while len(ids) < distance:
            ids += random.choice(self.ids)
        return ids


def what_is(word: str) -> str:
    return f"What is {word}?" if word in UNCOUNTED else f"What is {'an' if word[0] in 'aeiou' else 'a'} {word}?"


def chat(llm: dsv2_local.LLM, question: str) -> list[int]:
    """The prompt of a question, with BOS."""
    return llm.tokenizer.encode_chat([{"role": "user", "content": question}])


def turn(llm: dsv2_local.LLM, question: str, reply: str) -> list[int]:
    """A question with its answer, without BOS."""
    return llm.tokenizer.encode_chat(
        [{"role": "user", "content": question}, {"role": "assistant", "content": reply}], add_generation_prompt=False
    )[1:]


def answer(llm: dsv2_local.LLM, ids: list[int], tokens: int = 40) -> str:
    """The greedy answer to a prompt; the engine reuses cached prefixes."""
    return "".join(chunk.text for chunk in llm.generate(ids, temperature=0, max_tokens=tokens)).strip()


def says(text: str, word: str) -> bool:
    """Whether the text contains `word` as a whole word."""
    return re.search(rf"\b{re.escape(word)}\b", text, re.IGNORECASE) is not None


def summary(task: str, cache: str, least: int, samples: Sequence[Sample]) -> Result:
    """Average over the needles of one distance."""
    n = len(samples)
    seen, control = sum(s.seen for s in samples) / n, sum(s.control for s in samples) / n
    gains = [s.seen - s.control for s in samples]
    gain = seen - control
    se = math.sqrt(sum((g - gain) ** 2 for g in gains) / max(1, n - 1) / n)
    distance = sum(s.distance for s in samples) / n
    return Result(task, cache, least, distance, max(s.end for s in samples), n, seen, control, gain, se)


class Recall:
    """Tasks "key" and "it": greedy answers to a question about a needle, which is a turn about one of `KEYS`."""

    share = 20  # per cent of the needles: an answer takes longer than a log-probability

    def __init__(
        self, llm: dsv2_local.LLM, needles: dict[str, list[int]], question: str, lead: Turns, filling: Turns
    ) -> None:
        self.llm, self.needles, self.lead, self.filling = llm, needles, lead, filling
        self.question = chat(llm, question)[1:]

    def needle(self, random: Random, distances: Sequence[int]) -> list[Sample]:
        word, other = random.sample(KEYS, 2)
        lead = [0, *self.lead.reach(random.randrange(LEAD), random)]  # BOS first
        between: list[int] = []
        samples = []
        for least in distances:
            between += self.filling.reach(least - len(between), random)
            texts = [[*lead, *self.needles[key], *between, *self.question] for key in (word, other)]
            seen, control = (float(says(answer(self.llm, ids, ANSWER), word)) for ids in texts)
            samples.append(Sample(len(between), len(texts[0]) + ANSWER, seen, control))
        return samples


class Induction:
    """Task "tokens": log-probabilities of random tokens that occurred earlier in the text."""

    share = 100

    def __init__(self, llm: dsv2_local.LLM, filling: Turns) -> None:
        self.filling, self.model = filling, llm.engine.model
        self.vocab = llm.config.vocab_size
        self.cache = self.model.new_cache(llm.context, llm.engine.cache.dtype)

    def needle(self, random: Random, distances: Sequence[int]) -> list[Sample]:
        string, other = ([random.randrange(3, self.vocab) for _ in range(STRING)] for _ in range(2))
        lead = [0, *self.filling.reach(random.randrange(LEAD), random)]
        between: list[list[int]] = []
        for least in distances:
            between.append(self.filling.reach(least - sum(map(len, between)), random))
        seen, control = (self._scores([*lead, *first], between, string) for first in (string, other))
        lengths = list(accumulate(map(len, between)))
        ends = [len(lead) + 2 * STRING + length for length in lengths]
        return [Sample(*values) for values in zip(lengths, ends, seen, control, strict=True)]

    def _scores(self, start: list[int], between: list[list[int]], string: list[int]) -> list[float]:
        """Mean log-probability of the string after `start` and after each further part of the text between."""
        sequence = self.cache.new_sequence()

        def read(ids: list[int]) -> Tensor:
            return self.model.forward(self.cache, [(sequence, ids)])

        read(start)
        scores = []
        for ids in between:
            if ids:
                read(ids)
            length = sequence.length
            logits = self.model.logits(read(string[:-1])[CUE - 1 :]).log_softmax(1)
            scores.append(float(logits.gather(1, torch.tensor(string[CUE:])[:, None]).mean()))
            sequence.truncate(length)
        sequence.release()
        return scores


def measure(caches: Sequence[str], needles: int, distances: Sequence[int]) -> Iterator[Result]:
    """Run all tasks with every type of cache, on the same texts; their answers come from the first type."""
    models = {cache: dsv2_local.load(cache_dtype=cache) for cache in caches}
    first = models[caches[0]]
    dictionary = Turns(first, [what_is(word) for word in FILLING])
    small_talk = Turns(first, SMALL_TALK)
    secrets = {word: turn(first, f"The secret word is {word}.", HEARD) for word in KEYS}
    asked = {word: turn(first, what_is(word), answer(first, chat(first, what_is(word)))) for word in KEYS}
    for cache, llm in models.items():
        tasks: dict[str, Recall | Induction] = {
            "tokens": Induction(llm, dictionary),
            "it": Recall(llm, asked, "What kind of thing is it?", dictionary, small_talk),
            "key": Recall(llm, secrets, "What is the secret word?", dictionary, dictionary),
        }
        for name, task in tasks.items():
            random = Random(f"0 {name}")
            rows = [task.needle(random, distances) for _ in range(needles * task.share // 100)]
            for least, samples in zip(distances, zip(*rows, strict=True), strict=True):
                yield summary(name, cache, least, samples)


def show(results: Sequence[Result]) -> None:
    table = Table("task", "cache", "tokens between", "correct, or nats per token", "control", "gain", "±", "needles")
    for f in results:
        number = "{:.3f}" if f.task == "tokens" else "{:.1%}"
        cells = (number.format(value) for value in (f.mean, f.control, f.difference, f.se))
        table.add_row(f.task, f.cache, f"{f.distance:,.0f}{'*' * (f.longest > TRAINED)}", *cells, str(f.needles))
    Console(highlight=False, width=120).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--needles", type=int, default=200, help='samples of the task "tokens"; the others have a fifth (default: 200)'
    )
    parser.add_argument("--distances", help="tokens between needle and question, ascending, separated by commas")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results to this file")
    args = parser.parse_args()
    distances = [int(part) for part in args.distances.split(",")] if args.distances else DISTANCES
    results: list[Result] = []
    for result in measure((CacheDtype.BF16, CacheDtype.INT8), args.needles, distances):
        results.append(result)
        if args.json:
            args.json.write_text(json.dumps([asdict(f) for f in results], indent=1) + "\n")
    show(results)


if __name__ == "__main__":
    main()
