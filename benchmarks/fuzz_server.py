"""Tries to break `dsv2 serve` with bodies that nobody means: no 5xx, no hang, no fault in its log.

    python benchmarks/fuzz_server.py [--count 10000] [--seed 0] [--threads 4] [--keep FILE]

It starts a server of dsv2-nano, and sends to every POST of its /openapi.json: values of other types at every place,
odd values for known fields, then bodies at random: valid ones with nodes replaced, removed or nested, fields given
twice, bytes changed, and JSON that is no request at all. Ends with exit code 1 if a response has a status of 500 or
more or does not come within a minute, if the log of the server has an error, or if it still holds answers or blocks
afterwards. --keep writes the bodies that were answered so.
"""

import argparse
import copy
import json
import os
import random
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx

PATIENCE = 60  # seconds
NESTED: Any = 0
for _ in range(95):
    NESTED = [NESTED]
DEEP = "[" * 50_000 + "]" * 50_000
RAW = [
    "NaN",
    "Infinity",
    "-Infinity",
    "1e999",
    "1" * 5000,
    "-" + "9" * 99,
    DEEP,
    '"\\ud800"',
    "\ufeff{}",
    "\x00",
    "{",
    "",
]
ODD: list[Any] = [
    None, True, False, 0, 1, -1, 2, 0.5, -0.0, 2**31, 2**63, 2**64, 10**99, 1e308, -1e308, 5e-324, "", "x", "0",
    "none",
    "auto", "required", "\0", "\n", "\U0001f600", "<｜end▁of▁sentence｜>", "a" * 20_000, [], {}, [[]], [None],
    [0], [-1],
    [10**20], [1.5], ["x"], [""], ["x"] * 1000, [{}], [[0]], [["x"]], [[], []], {"": ""},
    {"type": "text"}, {"type": "x"},
    {"0": 1}, {"0": 1e9}, {"-1": 1}, {"x": "y"}, {"type": "json_object"}, {"type": "json_schema"}, NESTED,
    {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nothing"}}},
    {"type": "json_schema", "json_schema": {"name": "x", "schema": {"$ref": "#"}}},
    {"type": "json_schema", "json_schema": {"schema": {"pattern": "(a+)+$", "type": "string", "maxLength": 9}}},
    {"type": "function", "function": {"name": "f"}}, [{"type": "function", "function": {"name": "f"}}],
    [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": 3}}}],
    [{"type": "function", "function": {"name": "x" * 5000, "description": None, "parameters": NESTED}}],
    [{"name": "f", "input_schema": {"type": "object"}}], [{"name": 3, "input_schema": []}], {"include_usage": 1},
    [{"role": "user", "content": "a"}], [{"role": "x", "content": "a"}],
    [{"role": "user", "content": [{"type": "text"}]}],
    [{"role": "assistant", "content": None, "tool_calls": [{}]}], [{"role": "tool", "content": []}],
    [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]}],
    [{"role": "system", "content": "a"}] * 3, [{"role": "assistant", "content": "a"}], [{"content": {}}],
]  # fmt: skip
TALK = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is a violin?"}]
TOOL = {"name": "f", "description": "d", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}}
CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
SAMPLING = {"temperature": 0.7, "top_p": 0.9, "seed": 1}
OPENAI = SAMPLING | {"presence_penalty": 0.1, "frequency_penalty": 0.1, "stop": ["."], "logit_bias": {"5": 1}, "n": 2}
EXAMPLES: dict[str, list[dict[str, Any]]] = {
    "/v1/chat/completions": [
        {"model": "m", "messages": TALK, "max_tokens": 4, **OPENAI, "logprobs": True, "top_logprobs": 2},
        {"messages": TALK, "max_completion_tokens": 4, "stream": True, "stream_options": {"include_usage": True}},
        {
            "messages": [*TALK, {"role": "assistant", "content": None, "tool_calls": [CALL]},
                         {"role": "tool", "tool_call_id": "c", "content": "2"}],
            "tools": [{"type": "function", "function": TOOL}], "tool_choice": "auto", "parallel_tool_calls": False,
            "max_tokens": 4, "stream": True,
        },
        {
            "messages": TALK, "max_tokens": 8, "response_format": {
                "type": "json_schema", "json_schema": {"name": "s", "schema": TOOL["parameters"], "strict": False}
            },
        },
    ],
    "/v1/completions": [
        {"model": "m", "prompt": "A violin", "max_tokens": 4, **OPENAI, "logprobs": 1, "echo": True},
        {"prompt": [[5, 6, 7], [8]], "max_tokens": 1, "best_of": 2, "suffix": None},
        {"prompt": ["a", "b"], "stream": True, "max_tokens": 4, "stream_options": {"include_usage": True}},
    ],
    "/v1/responses": [
        {"model": "m", "input": "Hello", "instructions": "Be brief.", "max_output_tokens": 4, **SAMPLING},
        {
            "input": [{"type": "message", "role": "user", "content": [{"type": "input_text", "text": "a"}]},
                      {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
                      {"type": "function_call_output", "call_id": "c", "output": "2"}],
            "tools": [{"type": "function", **TOOL}], "tool_choice": "auto", "max_output_tokens": 4, "stream": True,
        },
        {"input": "a", "text": {"format": {"type": "json_schema", "name": "s", "schema": TOOL["parameters"]}},
         "max_output_tokens": 8},
    ],
    "/v1/messages": [
        {"model": "m", "max_tokens": 4, "system": "Be brief.", "messages": TALK[1:], **SAMPLING, "top_k": 5},
        {
            "max_tokens": 4, "stream": True, "stop_sequences": ["."], "system": [{"type": "text", "text": "a"}],
            "messages": [*TALK[1:], {"role": "assistant", "content": [
                             {"type": "tool_use", "id": "t", "name": "f", "input": {"a": 1}}]},
                         {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t", "content": "2"}]}],
            "tools": [{"name": "f", "input_schema": TOOL["parameters"]}], "tool_choice": {"type": "auto"},
        },
    ],
    "/v1/messages/count_tokens": [{"model": "m", "messages": TALK[1:], "system": "a"}],
    "/api/chat": [
        {"model": "m", "messages": TALK, "options": {"num_predict": 4, "temperature": 0.5, "stop": ["."]}},
        {"messages": TALK, "stream": False, "format": TOOL["parameters"], "options": {"num_predict": 8},
         "tools": [{"type": "function", "function": TOOL}], "keep_alive": "5m", "think": False},
    ],
    "/api/generate": [
        {"model": "m", "prompt": "A violin", "options": {"num_predict": 4}, "system": "a", "raw": False},
        {"prompt": "A", "suffix": "b", "stream": False, "format": "json", "options": {"num_predict": 4},
         "context": [5]},
    ],
    "/api/show": [{"model": "m", "verbose": True}],
    "/tokenize": [{"prompt": "A violin", "add_special_tokens": True}, {"messages": TALK}],
    "/detokenize": [{"tokens": [5, 6, 7]}],
}  # fmt: skip


class Bodies:
    """Bodies to send, the same for the same seed."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def systematic(self, paths: list[str]) -> Iterator[tuple[str, bytes]]:
        """Each odd value for each field of each example."""
        for path in paths:
            for example in EXAMPLES.get(path, [{}]):
                for field in example:
                    for odd in ODD:
                        yield path, json.dumps(example | {field: odd}).encode("utf-8", "surrogatepass")

    def wrong_types(self, paths: list[str]) -> Iterator[tuple[str, bytes]]:
        """A value of each type for each node of each example, however deep."""
        for path in paths:
            for example in EXAMPLES.get(path, [{}]):
                for node, key in list(_places(example)):
                    kept = node[key]
                    for node[key] in (None, True, -1, 10**20, 1.5, "x", [], {}, [[]], [{}], {"x": []}):
                        yield path, json.dumps(example).encode()
                    node[key] = kept

    def at_random(self, paths: list[str]) -> Iterator[tuple[str, bytes]]:
        """Bodies without end."""
        draw = self._random
        while True:
            path = draw.choice(paths)
            body: Any = copy.deepcopy(draw.choice(EXAMPLES.get(path, [{}])))
            if draw.random() < 0.05:
                body = self._anything(4)
            for _ in range(draw.choice([1, 1, 1, 2, 3])):
                self._change(body)
            text = json.dumps(body)
            if draw.random() < 0.1:
                text = self._with_raw(text)
            data = text.encode("utf-8", "surrogatepass")
            if draw.random() < 0.1:
                data = self._with_bytes(data)
            yield path, data

    def _anything(self, depth: int) -> Any:
        kind = self._random.randrange(4 if depth else 2)
        if kind < 2:
            return copy.deepcopy(self._random.choice(ODD))
        few = range(self._random.randrange(4))
        if kind == 2:
            return [self._anything(depth - 1) for _ in few]
        names = ["type", "role", "content", "text", "name", "messages", "prompt", "input", "x"]
        return {self._random.choice(names): self._anything(depth - 1) for _ in few}

    def _change(self, body: Any) -> None:
        if not (places := list(_places(body))):
            return
        node, key = self._random.choice(places)
        action = self._random.randrange(5)
        if action == 0:
            del node[key]
        elif action == 1:
            node[key] = [node[key]]
        elif action == 2 and isinstance(node, list):
            node.extend(copy.deepcopy(node[key]) for _ in range(self._random.choice([1, 2, 100])))
        elif action == 3 and isinstance(node, dict):
            node[self._random.choice(["type", "role", "strict", "x", "name"])] = node[key]
        else:
            node[key] = self._anything(1)

    def _with_raw(self, text: str) -> str:
        """JSON with a value that `json.dumps` would not write, or with a field twice."""
        places = [at for at, letter in enumerate(text) if letter in ":,"]
        if not places:
            return self._random.choice(RAW)
        at = self._random.choice(places)
        if text[at] == "," and self._random.random() < 0.3:
            return text[:at] + ', "stream": false, "stream": true' + text[at:]
        end = min((text.find(letter, at + 1) for letter in ",}]" if text.find(letter, at + 1) > 0), default=len(text))
        return text[: at + 1] + self._random.choice(RAW) + text[end:]

    def _with_bytes(self, data: bytes) -> bytes:
        changed = bytearray(data)
        for _ in range(self._random.choice([1, 1, 5, 50])):
            if changed:
                at = self._random.randrange(len(changed))
                changed[at : at + self._random.randrange(3)] = self._random.randbytes(self._random.randrange(3))
        return bytes(changed[: self._random.randrange(len(changed) + 1)] if self._random.random() < 0.1 else changed)


def _places(body: Any) -> Iterator[tuple[Any, Any]]:
    """Where values stand in a body: an object or a list, and the key."""
    waiting = [body]
    while waiting:
        node = waiting.pop()
        items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
        for key, value in list(items)[:50]:
            yield node, key
            waiting.append(value)


class Server:
    """`dsv2 serve` with dsv2-nano on a free port, and what it writes."""

    def __init__(self, *options: str) -> None:
        command = [sys.executable, "-m", "dsv2_local", "serve", "--port", "0", "--device", "cpu", *options]
        environment = os.environ | {"DSV2_TRACEBACK": "1"}
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
        assert self.process.stderr
        self.lines: list[str] = []
        while "serving" not in "".join(self.lines[-1:]):
            self.lines.append(self.process.stderr.readline())
            if not self.lines[-1]:
                raise SystemExit("".join(self.lines))
        self.url = next(word for word in self.lines[-1].split() if word.startswith("http"))
        stream = self.process.stderr
        self._reader = threading.Thread(target=lambda: self.lines.extend(stream))
        self._reader.start()

    def close(self) -> None:
        self.process.terminate()
        self.process.wait()
        self._reader.join()

    @property
    def faults(self) -> list[str]:
        return [
            line for line in self.lines if any(word in line for word in ("ERROR", "Traceback", "Error:", "WARNING"))
        ]


def figures(client: httpx.Client) -> dict[str, float]:
    """The server's own figures that are 0 when it is idle, once they are, or after some seconds."""
    for _ in range(100):
        found = _figures(client)
        if not any(found.values()):
            break
        time.sleep(0.05)
    return found


def _figures(client: httpx.Client) -> dict[str, float]:
    lines = client.get("/metrics").text.splitlines()
    names = ("dsv2_requests_active", "dsv2_answers_running", "dsv2_answers_waiting", "dsv2_kv_cache_usage")
    return {line.split()[0]: float(line.split()[1]) for line in lines if line.startswith(names)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=4)
    parser.add_argument("--keep", type=Path)
    options = parser.parse_args()
    server = Server("--context", "512")
    statuses, wrong = Counter[str](), list[dict[str, str]]()
    try:
        with (
            httpx.Client(base_url=server.url, timeout=PATIENCE) as client,
            ThreadPoolExecutor(options.threads) as pool,
        ):
            paths = [path for path, methods in client.get("/openapi.json").json()["paths"].items() if "post" in methods]
            missing = sorted(set(EXAMPLES) - set(paths))
            print(f"{len(paths)} paths; not served: {', '.join(missing) or 'none'}")
            bodies = Bodies(options.seed)
            listed = list(bodies.systematic(paths))
            random.Random(options.seed).shuffle(listed)
            further = bodies.at_random(paths)
            listed = [*bodies.wrong_types(paths), *listed[: options.count // 2]]
            listed += [next(further) for _ in range(options.count - len(listed))]

            def send(each: tuple[str, bytes]) -> None:
                path, body = each
                try:
                    response = client.post(path, content=body)
                    status, text = str(response.status_code), response.text
                except httpx.HTTPError as error:
                    status, text = type(error).__name__, str(error)
                statuses[f"{path} {status}"] += 1
                if not status.startswith(("2", "4")) or "has a fault" in text:
                    wrong.append(
                        {"path": path, "status": status, "body": body[:20_000].decode("latin-1"), "text": text[:500]}
                    )

            list(pool.map(send, listed))
            left = figures(client)
            health = client.get("/health").json()["status"]
    finally:
        server.close()
    for name, count in sorted(statuses.items()):
        print(f"{count:7,} {name}")
    print(f"health: {health}; left: {left}; lines of the log: {len(server.lines)}")
    for line in server.faults[:20]:
        print(line.rstrip())
    for each in wrong[:10]:
        print(json.dumps(each)[:1500])
    if options.keep:
        options.keep.write_text(json.dumps(wrong))
    sys.exit(bool(wrong or server.faults or any(left.values()) or health != "ready"))


if __name__ == "__main__":
    main()
