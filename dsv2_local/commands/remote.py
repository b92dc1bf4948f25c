"""A model in a running server, for `dsv2 run` and `dsv2 chat`: nothing is loaded here, not even torch."""

import json
import os
import re
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias

import httpx

from dsv2_local.chunk import Chunk
from dsv2_local.errors import InputError, ServerError
from dsv2_local.progress import Progress, no_progress
from dsv2_local.runtime.stats import Stats

if TYPE_CHECKING:
    from dsv2_local.generation import Generation
    from dsv2_local.llm import LLM

AnyLLM: TypeAlias = "LLM | RemoteLLM"
AnyGeneration: TypeAlias = "Generation | RemoteGeneration"

HOST, KEY = "DSV2_HOST", "DSV2_API_KEY"
"""Environment variables: the server's address, and the key that it asks for."""
CONNECT_SECONDS = 10
SILENT_SECONDS = 60  # the server says something every few seconds
LONGEST_LINE = 1 << 24  # bytes of an event
_NAMES = ("stop", "seed", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty",
          "frequency_penalty", "max_tokens")  # fmt: skip


class RemoteLLM:
    """The model of a server, with what `dsv2 run` and `dsv2 chat` need of an `LLM`.

    Attributes:
        name: the model's name.
        context: the most tokens of prompt and answer together.
        recipe: the server's address, without user and password. It stands where a local model has the formats of its
            weights.
        defaults: None: only the server knows them.
    """

    defaults = None
    cache_nbytes = 0

    def __init__(self, address: str) -> None:
        """Connect to a server.

        Args:
            address: such as http://127.0.0.1:8000; http is assumed, and /v1 at the end is ignored.

        Raises:
            InputError: it is no address.
            ServerError: the server does not answer, or refuses the key.
        """
        key = os.environ.get(KEY, "").strip()
        if not (key.isascii() and key.isprintable()):
            raise InputError(f"${KEY} must be visible ASCII characters")
        base = _base(address)
        self.recipe = re.sub(r"(?<=//)[^/?#]*@", "", base)  # errors show it: without a password
        try:
            self._client = httpx.Client(
                base_url=base, headers={"Authorization": f"Bearer {key}"} if key else {}, trust_env=False,
                timeout=httpx.Timeout(SILENT_SECONDS, connect=CONNECT_SECONDS),
            )  # fmt: skip
        except (httpx.InvalidURL, ValueError, UnicodeError) as error:
            raise InputError(f"--host {self.recipe!r} is no address: {error}") from None
        try:
            self.name, self.context = self._described()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "RemoteLLM":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    @property
    def tokenizer(self) -> "RemoteLLM":
        """What a chat asks before it begins: see `require_chat_template`."""
        return self

    def require_chat_template(self) -> None:
        """The server says so itself, when it is asked."""

    def _described(self) -> tuple[str, int]:
        """The model's name and its context. Raises ServerError if the server does not say them."""
        with self._failures():
            model = self._ask("GET", "/v1/models")["data"][0]
            name, limit = str(model["id"]), model.get("max_model_len") or model.get("context_length")
        if not isinstance(limit, int):
            raise ServerError(f"the server at {self.recipe} does not say how long its context is; is it `dsv2 serve`?")
        return name, limit

    def chat(self, messages: Sequence[Any], *, progress: Progress = no_progress, **options: Any) -> "RemoteGeneration":
        """Answer a conversation; options as for `LLM.chat`."""
        body = {"messages": list(messages), **_body(options)}
        return RemoteGeneration(self, "/v1/chat/completions", body, progress)

    def generate(self, prompt: str, *, progress: Progress = no_progress, **options: Any) -> "RemoteGeneration":
        """Continue a text; options as for `LLM.generate`."""
        body = {"prompt": prompt, "max_tokens": -1, **_body(options)}
        return RemoteGeneration(self, "/v1/completions", body, progress)

    def count_tokens(self, messages: Sequence[Any]) -> int:
        """Number of tokens of the prompt that `chat` makes of `messages`."""
        with self._failures():
            return int(self._ask("POST", "/tokenize", {"messages": list(messages)})["count"])

    def save_cache(self, *_: object, **__: object) -> NoReturn:
        """Refused. Raises InputError."""
        raise InputError(
            "the KV cache is the server's, and cannot be saved here; `dsv2 serve --cache-dir` keeps it on disk"
        )

    load_cache = save_cache

    def _ask(self, method: str, path: str, body: Any = None) -> Any:
        with self._failures():
            response = self._client.request(method, path, json=body)
            _check(response)
            return response.json()

    @contextmanager
    def stream(self, path: str, body: dict[str, Any]) -> Iterator[Iterator[bytes]]:
        """Send a request, and get the lines of its answer, without their ends.

        Raises:
            InputError: the request is wrong, as the server says.
            ServerError: anything else goes wrong.
        """
        with self._failures(), self._client.stream("POST", path, json=body) as response:
            if response.is_error:
                response.read()
            _check(response)
            yield _lines(response)

    @contextmanager
    def _failures(self) -> Iterator[None]:
        try:
            yield
        except httpx.ConnectError as error:
            raise ServerError(f"no server answers at {self.recipe} ({error}); start one with `dsv2 serve`") from None
        except (httpx.HTTPError, httpx.StreamError) as error:
            raise ServerError(f"the server at {self.recipe} is lost: {error or type(error).__name__}") from None
        except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
            raise ServerError(f"what answers at {self.recipe} is no server of OpenAI's API") from None


class RemoteGeneration(Iterator[Chunk]):
    """An answer that a server generates: iterate over it for its chunks; closing it cancels it.

    Attributes:
        text: the text yielded so far.
        stats: the statistics: tokens as the server counts them, times as this side sees them.
        tool_calls: none; neither command asks for tools.
    """

    def __init__(self, llm: RemoteLLM, path: str, body: dict[str, Any], progress: Progress) -> None:
        self.text, self.stats = "", Stats(context=llm.context)
        self.error: BaseException | None = None
        self.tool_calls: list[Any] = []
        self._progress = progress
        self._chunks = self._run(llm, path, body)

    def __next__(self) -> Chunk:
        chunk = next(self._chunks)
        self.text += chunk.text
        return chunk

    def close(self) -> None:
        """Stop generating."""
        self._chunks.close()

    def _run(self, llm: RemoteLLM, path: str, body: dict[str, Any]) -> Generator[Chunk]:
        began, first = time.monotonic(), 0.0
        body = body | {"model": llm.name, "stream": True, "stream_options": {"include_usage": True}}
        with llm.stream(path, body) as lines:
            for line in lines:
                if line.startswith(b": prefill "):
                    self._show_progress(line)
                data = line.removeprefix(b"data: ")
                if data == line or data == b"[DONE]":
                    continue
                event = json.loads(data)
                if "error" in event:
                    raise ServerError(f"the server stopped: {event['error']['message']}")
                for chunk in self._read(event):
                    now = time.monotonic()
                    if not first:
                        first, self.stats.prefill_seconds = now, now - began
                        self._progress(1, 1)
                    self.stats.completion_tokens += 1
                    self.stats.decode_seconds = now - first
                    yield chunk
        if not self.stats.finish_reason:
            raise ServerError(f"the server at {llm.recipe} ended the answer before it was complete")

    def _show_progress(self, line: bytes) -> None:
        with suppress(ValueError):
            done, total = (int(number) for number in line.split()[2].split(b"/"))
            self.stats.prompt_tokens, self.stats.context_used = total, done
            self._progress(done, total)

    def _read(self, event: dict[str, Any]) -> Iterator[Chunk]:
        stats = self.stats
        if usage := event.get("usage"):
            stats.prompt_tokens, stats.completion_tokens = usage["prompt_tokens"], usage["completion_tokens"]
            stats.reused_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
            stats.context_used = stats.prompt_tokens + max(0, stats.completion_tokens - 1)
        for choice in event.get("choices") or ():
            stats.finish_reason = choice.get("finish_reason") or stats.finish_reason
            text = choice["text"] if "text" in choice else choice["delta"].get("content")
            if not isinstance(text, str | None):
                raise TypeError
            if text:
                yield Chunk(text)


def _base(address: str) -> str:
    address = address if "://" in address else f"http://{address}"
    if not address.startswith(("http://", "https://")):
        raise InputError(f"--host {address!r} is no address; write it like http://127.0.0.1:8000")
    return address.rstrip("/").removesuffix("/v1")


def _body(options: dict[str, Any]) -> dict[str, Any]:
    given = {name: value for name, value in options.items() if value is not None}
    schema, strict = given.pop("schema", None), given.pop("strict", False)
    if unknown := [name for name in given if name not in _NAMES]:
        raise InputError(f"--{unknown[0].replace('_', '-')} is not for answers of a server (--host, ${HOST})")
    if schema is not None:
        described = {"name": "answer", "schema": schema, "strict": strict}
        given["response_format"] = {"type": "json_schema", "json_schema": described}
    return given


def _check(response: httpx.Response) -> None:
    """Raise what an answer that is an error says."""
    if not response.is_error:
        return
    try:
        message = str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        message = f"status {response.status_code} {response.reason_phrase}"
    if response.status_code == 401:
        raise ServerError(f"the server asks for a key: put it into ${KEY}")
    if response.status_code == 400:
        raise InputError(message)
    raise ServerError(f"the server at {response.url.netloc.decode()} says: {message}")


def _lines(response: httpx.Response) -> Iterator[bytes]:
    """The lines of a response. (Those of httpx end at further characters, which JSON may have.)"""
    held, size = list[bytes](), 0
    for piece in response.iter_bytes():
        *whole, rest = piece.split(b"\n")
        if whole:
            yield b"".join([*held, whole[0]])
            yield from whole[1:]
            held, size = [], 0
        held.append(rest)
        size += len(rest)
        if size > LONGEST_LINE:
            raise ValueError
    if last := b"".join(held):
        yield last
