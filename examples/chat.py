"""A conversation: a list of messages, to which each question and each answer is appended."""

import dsv2_local

QUESTIONS = ["What is a hammer?", "What is a river?", "Who are you?"]


def main() -> None:
    llm = dsv2_local.load()  # the bundled dsv2-nano; load("path/to/model") takes a converted one
    # The list is the whole state of the conversation. A system message would be its first element.
    messages: list[dict[str, str]] = []
    for question in QUESTIONS:
        messages.append({"role": "user", "content": question})
        answer = llm.chat(messages, max_tokens=100)
        print(f"> {question}")
        for chunk in answer:  # each chunk is printed as soon as its token is generated
            print(chunk.text, end="", flush=True)
        messages.append({"role": "assistant", "content": answer.text})
        # The earlier turns are in the KV cache already, so only the new question is computed.
        print(f"\n  [{answer.stats.prompt_tokens} prompt tokens, {answer.stats.reused_tokens} of them reused]\n")


if __name__ == "__main__":
    main()
