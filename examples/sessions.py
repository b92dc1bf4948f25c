"""Save the KV cache to a file: a long text is read once, and later programs continue or ask something else about it."""

from pathlib import Path
from tempfile import TemporaryDirectory

import dsv2_local

TEXT = """A saw is a hand tool having a toothed blade for cutting. A lamp is an artificial source of visible light.
A rope is a strong line. A ladder is steps consisting of two parallel members connected by rungs; for climbing up or
down. A clock is a timepiece that shows the time of day. A chair is a seat for one person, with a support for the back.
Bread is food made from dough of flour or meal and usually raised with yeast or baking powder and then baked."""


def ask(llm: dsv2_local.LLM, messages: list[dict[str, str]], question: str) -> list[dict[str, str]]:
    """Print the answer and how much of the prompt was computed; returns the conversation with both added."""
    messages = [*messages, {"role": "user", "content": question}]
    answer = llm.chat(messages, temperature=0, max_tokens=60)
    text = "".join(chunk.text for chunk in answer)
    stats = answer.stats
    print(f"  {text}\n  prompt {stats.prompt_tokens} tokens, {stats.reused_tokens} of them from the cache")
    return [*messages, {"role": "assistant", "content": text}]


def main() -> None:
    with TemporaryDirectory() as folder:
        file = Path(folder) / "text.cache"

        print("The first program reads the text and saves the cache:")
        llm = dsv2_local.load()
        conversation = ask(llm, [], f"{TEXT}\n\nWhat is a hammer?")
        llm.save_cache(file)
        print(f"  saved {file.stat().st_size / 1e6:.1f} MB")

        # A cache belongs to the weights it was computed with: another model's file raises SavedCacheError.
        llm = dsv2_local.load()
        print(f"A second program loads the cache of {llm.load_cache(file)} tokens and continues the conversation:")
        ask(llm, conversation, "What is a violin?")

        print("Another question about the same text computes only what differs from the prompts before:")
        ask(llm, [], f"{TEXT}\n\nWhat is a river?")


if __name__ == "__main__":
    main()
