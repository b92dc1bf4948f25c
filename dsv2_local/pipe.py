"""`dsv2 run`: text in by standard input, files and arguments, the answer out by standard output, nothing else there."""

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from dsv2_local.console import PrefillProgress, notice, stats_line
from dsv2_local.errors import InputError
from dsv2_local.llm import LLM, Chunk, Generation


@dataclass(frozen=True)
class Job:
    """One request: the text, how to ask it, and what to print."""

    text: str
    system: str | None = None
    raw: bool = False
    stream: bool = True
    as_json: bool = False
    show_stats: bool = False
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Raises InputError for options that would do nothing together."""
        if self.raw and self.system is not None:
            raise InputError("--system belongs to the chat template, which --raw leaves out; drop one of them")
        if self.options.get("logprobs") is not None and not self.as_json:
            raise InputError("--logprobs needs --json to be seen")


def read_input(prompt: str | None, files: Sequence[Path] = (), *, exact: bool = False) -> str:
    """Files, standard input (unless it is a terminal) and the prompt, in this order, with an empty line between.

    Newlines at the end of each are dropped unless `exact`.

    Raises:
        InputError: nothing was given, a file cannot be read, or something is no UTF-8 text.
    """
    parts = [_text(_read(path), str(path)) for path in files]
    if sys.stdin is not None and not sys.stdin.isatty():
        parts.append(_text(sys.stdin.buffer.read(), "standard input"))
    if prompt is not None:
        parts.append(_text(os.fsencode(prompt), "the prompt"))
    parts = [part if exact else part.rstrip("\r\n") for part in parts]
    text = "\n\n".join(part for part in parts if part)
    if not text.strip():
        raise InputError("there is no prompt; give one as an argument, with -f FILE or on standard input")
    return text


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None


def _text(data: bytes, where: str) -> str:
    """Decode UTF-8; NUL bytes are valid there but mean a binary file."""
    if (at := data.find(b"\0")) >= 0:
        raise InputError(f"{where} is not text: byte {at:,} is NUL")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{where} is not UTF-8 text: byte {error.start:,} is 0x{data[error.start]:02x}") from None


def run(llm: LLM, job: Job) -> None:
    """Answer `job` on stdout.

    Ctrl-C ends the answer; what came is printed and KeyboardInterrupt goes on to the caller.
    """
    chunks: list[Chunk] = []
    interrupted = False
    with PrefillProgress() as progress:
        generation = _start(llm, job, progress)
        try:
            for chunk in generation:
                chunks.append(chunk)
                if job.stream and not job.as_json:
                    _write(sys.stdout, chunk.text)
        except KeyboardInterrupt:
            interrupted = True
    _finish(llm, job, generation, chunks, interrupted)
    if interrupted:
        raise KeyboardInterrupt


def _start(llm: LLM, job: Job, progress: PrefillProgress) -> Generation:
    if job.raw:
        return llm.generate(job.text, **job.options, progress=progress)
    messages = [{"role": "system", "content": job.system}] if job.system is not None else []
    return llm.chat([*messages, {"role": "user", "content": job.text}], **job.options, progress=progress)


def _finish(llm: LLM, job: Job, generation: Generation, chunks: list[Chunk], interrupted: bool) -> None:
    if job.as_json:
        _write(sys.stdout, json.dumps(_as_json(llm, job, generation, chunks), ensure_ascii=False) + "\n")
    elif not job.stream:
        _write(sys.stdout, generation.text)
    if not job.as_json and sys.stdout.isatty():
        _write(sys.stdout, "\n")
    if job.show_stats:
        notice(stats_line(generation.stats, interrupted=interrupted))


def _write(file: TextIO, text: str) -> None:
    file.write(text)
    file.flush()


def _as_json(llm: LLM, job: Job, generation: Generation, chunks: list[Chunk]) -> dict[str, Any]:
    stats = generation.stats
    result: dict[str, Any] = {"text": generation.text, "model": llm.name, "finish_reason": stats.finish_reason}
    for name in ("prompt_tokens", "reused_tokens", "completion_tokens", "context_used", "context"):
        result[name] = getattr(stats, name)
    for name in ("prefill_seconds", "decode_seconds", "prefill_tok_s", "decode_tok_s"):
        result[name] = round(getattr(stats, name), 6)
    if job.options.get("logprobs") is not None:
        result["logprobs"] = [_logprob(chunk) for chunk in chunks if chunk.token_id is not None]
    return result


def _logprob(chunk: Chunk) -> dict[str, Any]:
    top = [{"token_id": token, "logprob": logprob} for token, logprob in chunk.top_logprobs]
    return {"token_id": chunk.token_id, "text": chunk.text, "logprob": chunk.logprob, "top_logprobs": top}
