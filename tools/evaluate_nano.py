"""Held-out perplexity and sample answers of dsv2-nano, for its model card.

    python tools/evaluate_nano.py --heldout DIR/heldout.jsonl CHECKPOINT [CHECKPOINT ...]

Each CHECKPOINT is a converted directory, for example one per recipe. `heldout.jsonl` is written by tools/train_nano.py:
conversations with one answer each, none of which was trained on. Perplexity is per answer token, the end token
included, given the question.
"""

import argparse
import json
import math
from pathlib import Path

import dsv2_local

QUESTIONS = (
    "What is a violin?", "What is a dog?", "What is water?", "What is a doctor?", "What is a hammer?",
    "What is anger?", "What is a river?", "What is bread?", "What kind of thing is a piano?", "Who are you?",
)  # fmt: skip
ANSWER = "Assistant:"


def perplexity(llm: dsv2_local.LLM, conversations: list[str]) -> tuple[float, int]:
    """Perplexity per answer token, and the number of answer tokens."""
    total, count = 0.0, 0
    for text in conversations:
        ids = llm.tokenizer.encode(text)
        prompt = len(llm.tokenizer.encode(text[: text.rindex(ANSWER) + len(ANSWER)]))
        logprobs = llm.logits(ids)[prompt - 1 : -1].log_softmax(1)
        total -= sum(float(row[token]) for row, token in zip(logprobs, ids[prompt:], strict=True))
        count += len(ids) - prompt
    return math.exp(total / count), count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", type=Path, nargs="+")
    parser.add_argument("--heldout", type=Path, required=True)
    args = parser.parse_args()
    conversations = [json.loads(line)["text"] for line in args.heldout.read_text(encoding="utf-8").splitlines()]
    for directory in args.checkpoints:
        llm = dsv2_local.load(directory)
        value, count = perplexity(llm, conversations)
        print(f"\n{directory.name} ({llm.recipe}): perplexity {value:.3f} over {count:,} answer tokens")
        for question in QUESTIONS:
            answer = llm.chat([{"role": "user", "content": question}], temperature=0, max_tokens=80)
            print(f"- {question} {''.join(chunk.text for chunk in answer)}")


if __name__ == "__main__":
    main()
