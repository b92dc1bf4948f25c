"""What users see of `dsv2 serve`, and what is left when they have gone, on dsv2-nano or another model.

    python benchmarks/serve.py [MODEL] [--only throughput,queue,crowd,short] [--minutes 5] [--json FILE]

throughput  1, 4 and 16 clients that stream: tokens per second of all together
queue       the time to the first token for 64 clients that come at once, when 16 are answered at a time
crowd       64 clients for --minutes, one after the other asking again; a third of the requests is left at a random
            moment: waiting, while the prompt is read, while the answer comes, by closing, by a reset, or without
            reading on. Answers are greedy, and every one that came to its end must be that of a client alone.
short       10,000 short requests (--requests)

Before and after crowd and short it notes the server's memory (RssAnon + VmSwap), threads, files, and what the engine
holds; it ends with exit code 1 if answers differ, a stream breaks, or answers, blocks, threads or files are left.
"""

import argparse
import asyncio
import json
import random
import re
import sys
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import httpx
from fuzz_server import Server, figures

WORDS = """
violin river hammer bread piano dog water house tree stone king doctor boat bridge candle carpet chair clock cloud
coat coin cow desert door drum eagle farm feather fish flag flower forest garden glass guitar hat hill horse island
jacket key kitchen ladder lake lamp leaf letter lion market mirror moon mountain needle ocean paper pencil queen rope
ship spoon sun table train window
"""
THINGS = WORDS.split()
MOST = 48  # tokens of an answer
CLIENTS = 64
IDLE = 11  # seconds: anyio keeps threads for ten
WAYS = ("close", "reset", "stop reading")


@dataclass
class Answer:
    """What a client got.

    Attributes:
        text: of the answer.
        tokens: events with text.
        first: seconds to the first of them.
        end: how it ended: "whole", "left", or what went wrong.
    """

    text: str = ""
    tokens: int = 0
    first: float = 0.0
    end: str = ""


class Clients:
    """Clients of a server, as little as they can be, so that they take no time from it."""

    def __init__(self, url: str) -> None:
        self._host, port = url.removeprefix("http://").split(":")
        self._port = int(port)

    async def ask(self, thing: str, leave_after: float | None = None, way: str = "close", most: int = MOST) -> Answer:
        """Ask what a thing is; `leave_after` is a number of events, or below 1 a time in seconds."""
        body = json.dumps(
            {
                "messages": [{"role": "user", "content": f"What is a {thing}?"}], "temperature": 0,
                "max_tokens": most, "stream": True,
            }
        ).encode()  # fmt: skip
        reader, writer = await asyncio.open_connection(self._host, self._port)
        began, answer, events = time.perf_counter(), Answer(), 0
        try:
            head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
            writer.write(f"{head}Connection: close\r\n\r\n".encode() + body)
            if leave_after is not None and leave_after < 1:
                await asyncio.sleep(leave_after)
                answer.end = "left"
                return answer
            status = await reader.readline()
            if b" 200 " not in status:
                answer.end = status.decode().strip()
                return answer
            while line := await reader.readline():
                if not line.startswith(b"data: "):
                    continue
                if line.startswith(b"data: [DONE]"):
                    answer.end = "whole"
                    continue
                event = json.loads(line[6:])
                if "error" in event:
                    answer.end = event["error"]["message"]
                    continue
                if event["choices"] and event["choices"][0]["delta"].get("content"):
                    answer.text += event["choices"][0]["delta"]["content"]
                    answer.tokens += 1
                    answer.first = answer.first or time.perf_counter() - began
                events += 1
                if leave_after is not None and events >= leave_after:
                    answer.end = "left"
                    if way == "stop reading":
                        await asyncio.sleep(1)
                    return answer
            answer.end = answer.end or "the stream broke"
        except OSError as error:
            answer.end = f"{type(error).__name__}"
        finally:
            if way == "reset":
                writer.transport.abort()
            writer.close()
            with suppress(OSError):
                await writer.wait_closed()
        return answer


def held(server: Server) -> dict[str, int]:
    """What the process of a server holds: memory in KiB, threads, open files."""
    place = Path(f"/proc/{server.process.pid}")
    status = dict(re.findall(r"^(\w+):\s+(\d+)", (place / "status").read_text(), re.MULTILINE))
    files = len(list((place / "fd").iterdir()))
    return {
        "memory": int(status["RssAnon"]) + int(status["VmSwap"]), "threads": int(status["Threads"]), "files": files,
    }  # fmt: skip


def left(server: Server) -> dict[str, Any]:
    """What is left in a server that nobody uses, once threads that are kept for a while have ended."""
    time.sleep(IDLE)
    asyncio.run(Clients(server.url).ask(THINGS[0], most=1))  # such threads end when another one is needed
    with httpx.Client(base_url=server.url) as client:
        return figures(client) | held(server)


async def throughput(clients: Clients, rounds: int = 3) -> dict[str, float]:
    """Tokens per second of so many clients; the numbers take turns, and the median round counts."""
    found: dict[int, list[float]] = {1: [], 4: [], 16: []}

    async def work(things: list[str]) -> int:
        return sum([(await clients.ask(thing)).tokens for thing in things])

    for _ in range(rounds):
        for count, rates in found.items():
            began = time.perf_counter()
            tokens = await asyncio.gather(
                *(work(THINGS[each : 64 if count > 1 else 16 : count]) for each in range(count))
            )
            rates.append(sum(tokens) / (time.perf_counter() - began))
    return {str(count): round(median(rates), 1) for count, rates in found.items()}


async def queue(clients: Clients) -> dict[str, float]:
    """Seconds to the first token of clients that all come at once."""
    answers = await asyncio.gather(*(clients.ask(thing) for thing in THINGS[:CLIENTS]))
    first = sorted(answer.first for answer in answers if answer.end == "whole")
    return {
        "whole": len(first), "shortest": round(first[0], 3), "median": round(median(first), 3),
        "longest": round(first[-1], 3),
    }  # fmt: skip


async def crowd(clients: Clients, minutes: float, seed: int) -> dict[str, Any]:
    """Clients that ask again and again, and leave at random; see above."""
    alone = {thing: (await clients.ask(thing)).text for thing in THINGS}
    ends, different, tokens, end = Counter[str](), list[str](), 0, time.monotonic() + 60 * minutes

    async def client(number: int) -> None:
        nonlocal tokens
        draw = random.Random(f"{seed} {number}")
        while time.monotonic() < end:
            thing, leave = draw.choice(THINGS), None
            if draw.random() < 1 / 3:
                leave = draw.choice([draw.random() ** 3, 1, 2, draw.randrange(1, MOST)])
            answer = await asyncio.wait_for(clients.ask(thing, leave, draw.choice(WAYS)), 120)
            ends[answer.end] += 1
            tokens += answer.tokens
            if answer.end == "whole" and answer.text != alone[thing]:
                different.append(f"{thing}: {answer.text!r}, alone {alone[thing]!r}")
            if "429" in answer.end:
                await asyncio.sleep(draw.random())

    await asyncio.gather(*map(client, range(CLIENTS)))
    return {"ends": dict(ends), "different": different, "tokens": tokens}


async def short(clients: Clients, requests: int, notes: list[int], server: Server) -> dict[str, Any]:
    """Short requests by eight clients; notes the memory ten times."""
    ends, waiting = Counter[str](), iter(range(requests))

    async def client() -> None:
        for number in waiting:
            if number % (requests // 10) == 0:
                notes.append(held(server)["memory"])
            ends[(await clients.ask(THINGS[number % len(THINGS)], most=2)).end] += 1

    began = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(8)))
    return {"ends": dict(ends), "requests per second": round(requests / (time.perf_counter() - began), 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--only", default="throughput,queue,crowd,short")
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    server = Server(*(["-m", options.model] if options.model else []))
    found: dict[str, Any] = {}
    wrong: list[str] = []
    try:
        with httpx.Client(base_url=server.url, timeout=None) as client:
            while client.get("/health").json()["status"] == "loading":
                time.sleep(0.1)
        clients = Clients(server.url)
        asyncio.run(queue(clients))  # what is allocated once is there now
        after = left(server)
        for part in options.only.split(","):
            before, notes = after, list[int]()
            if part == "throughput":
                result: dict[str, Any] = asyncio.run(throughput(clients))
            elif part == "queue":
                result = asyncio.run(queue(clients))
            elif part == "crowd":
                result = asyncio.run(crowd(clients, options.minutes, options.seed))
            else:
                result = asyncio.run(short(clients, options.requests, notes, server)) | {"memory": notes}
            after = left(server)
            found[part] = result | {"before": before, "after": after}
            wrong += result.get("different", [])
            wrong += [f"{part}: {count} ended so: {end}" for end, count in result.get("ends", {}).items()
                      if end not in ("whole", "left") and "429" not in end]  # fmt: skip
            wrong += [f"{part}: {name} was {before[name]}, is {after[name]}" for name in ("threads", "files")
                      if after[name] > before[name]]  # fmt: skip
            wrong += [
                f"{part}: {name} is {value}" for name, value in after.items() if name.startswith("dsv2") and value
            ]
            print(part, json.dumps(found[part], indent=1), flush=True)
    finally:
        server.close()
    wrong += [f"log: {line.rstrip()}" for line in server.faults]
    for each in wrong[:20]:
        print(each)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
