"""Stream a continuation, stop it early, and print the statistics of the generation."""

import dsv2_local

PROMPT = "A violin is a bowed"


def main() -> None:
    llm = dsv2_local.load()
    # `generate` continues plain text, without the chat template; temperature=0 takes the most likely token each time.
    generation = llm.generate(PROMPT, max_tokens=40, temperature=0, stop=["."])
    print(PROMPT, end="")
    for chunk in generation:  # nothing is computed before the first iteration
        print(chunk.text, end="", flush=True)
    print()

    stats = generation.stats  # updated while the generation runs, complete after its last chunk
    print(f"prefill: {stats.prompt_tokens} tokens at {stats.prefill_tok_s:,.0f} tok/s")
    print(f"decode: {stats.completion_tokens} tokens at {stats.decode_tok_s:,.0f} tok/s")
    print(f"finish reason: {stats.finish_reason}")  # "stop": an end token or stop string; "length": max_tokens, context
    print(f"context: {stats.context_used} of {stats.context} tokens in use")

    # Sampled, and stopped from the loop: leaving it is enough. `text` holds everything streamed so far.
    sampled = llm.chat([{"role": "user", "content": "What is a river?"}], temperature=0.7, top_p=0.95, seed=1)
    for _ in sampled:
        if len(sampled.text.split()) >= 5:
            break
    print(f"stopped after {sampled.stats.completion_tokens} tokens: {sampled.text!r}")


if __name__ == "__main__":
    main()
