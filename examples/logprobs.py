"""Log probabilities: how sure the model is of each token, and which tokens it considered instead."""

from math import exp

import dsv2_local


def main() -> None:
    llm = dsv2_local.load()
    # A word that dsv2-nano was never taught: watch where it starts to guess.
    answer = llm.chat([{"role": "user", "content": "What is a platypus?"}], temperature=0, logprobs=3)
    print(f"{'token':<14} {'probability':>11}   top candidates")
    total = 0.0
    for chunk in answer:
        if chunk.token_id is None:  # text that was held back until the end has no token of its own
            continue
        # Natural logarithms of the model's own distribution, before temperature, top_p and penalties.
        total += chunk.logprob
        token = llm.tokenizer.decode([chunk.token_id]) or "(end)"
        candidates = (f"{llm.tokenizer.decode([id])!r} {exp(logprob):.1%}" for id, logprob in chunk.top_logprobs)
        print(f"{token!r:<14} {exp(chunk.logprob):>11.1%}   {', '.join(candidates)}")

    tokens = answer.stats.completion_tokens
    print(f"answer: {answer.text}")
    print(f"perplexity: {exp(-total / tokens):.2f} per token, over {tokens} tokens")


if __name__ == "__main__":
    main()
