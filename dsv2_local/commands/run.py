"""`dsv2 run`: text in by standard input, files and arguments, the answer out by standard output, nothing else there."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from dsv2_local.commands.console import ProgressBar, describe, describe_experts, describe_stop, notice, prompt_progress
from dsv2_local.errors import InputError
from dsv2_local.llm import LLM, Chunk, Generation
from dsv2_local.runtime import saved_cache
from dsv2_local.runtime.engine import Stats


@dataclass(frozen=True)
class RunOptions:
    """What to ask, how, and what to print.

    Attributes:
        text: the prompt.
        generation: options of `LLM.generate`.
        system: a system message.
        raw: continue the text itself, without the chat template.
        json: print one object; otherwise the answer's text, as it comes if `stream`.
        stats: print the figures to stderr.
        cache: a file that keeps what was read, from one run to the next.
    """

    text: str
    generation: dict[str, Any] = field(default_factory=dict)
    system: str | None = None
    raw: bool = False
    json: bool = False
    stream: bool = True
    stats: bool = False
    cache: Path | None = None

    def __post_init__(self) -> None:
        """Raises InputError for options that would do nothing together, or come to nothing in the end."""
        if self.raw and self.system is not None:
            raise InputError("--system belongs to the chat template, which --raw leaves out; drop one of them")
        if self.generation.get("logprobs") is not None and not self.json:
            raise InputError("--logprobs needs --json to be seen")
        if self.cache and (self.cache.is_dir() or not self.cache.absolute().parent.is_dir()):
            raise InputError(f"--cache {self.cache} cannot be a file: its directory is not there, or it is one itself")


def gather_prompt(prompt: str | None, files: Sequence[Path], stdin: TextIO) -> str:
    """Files, standard input (unless it is a terminal) and the prompt, in this order, with an empty line between.

    Newlines at the end of each are dropped.

    Raises:
        InputError: nothing was given, a file cannot be read, or something is no UTF-8 text.
    """
    parts = [_text(_read(path), str(path)) for path in files]
    if not stdin.isatty():
        parts.append(_text(stdin.buffer.read(), "standard input"))
    if prompt is not None:
        parts.append(_text(os.fsencode(prompt), "the prompt"))
    parts = [part.rstrip("\r\n") for part in parts]
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


def run(llm: LLM, options: RunOptions, out: TextIO) -> None:
    """Answer `options` on `out`.

    With a file for the cache, it is read if it is there, and written as `_is_worth_keeping` says.

    Ctrl-C ends the answer, or the reading of the prompt; what came is printed, with a file for the cache what was read
    is kept, and KeyboardInterrupt goes on to the caller.
    """
    chunks: list[Chunk] = []
    interrupted = False
    known = _load_cache(llm, options.cache) if options.cache and options.cache.exists() else 0
    with prompt_progress() as progress:
        generation = _start(llm, options, progress)
        try:
            for chunk in generation:
                chunks.append(chunk)
                if options.stream and not options.json:
                    _write(out, chunk.text)
        except KeyboardInterrupt:
            interrupted = True
    _finish(llm, options, generation, chunks, interrupted, out)
    stats = generation.stats
    kept = options.cache if options.cache and _is_worth_keeping(stats, known) else None
    if kept:
        llm.save_cache(kept)
    if interrupted and stats.context_used < stats.prompt_tokens and (kept or not options.cache):
        rest = f"kept in {kept}: the same command goes on" if kept else "--cache FILE would keep them"
        notice(f"{describe_stop(stats)}; {rest}")
    if interrupted:
        raise KeyboardInterrupt


def _load_cache(llm: LLM, path: Path) -> int:
    """The number of tokens in the file. InputError where it is a chat's session, which a new cache would replace."""
    if saved_cache.read_header(path).conversation:
        raise InputError(f"--cache {path} is a session of `dsv2 chat`; name another file")
    return llm.load_cache(path)


def _is_worth_keeping(stats: Stats, known: int) -> bool:
    """Whether a file of `known` tokens should give way to what the cache holds now.

    It should if most of that is new to it and there is more of it, so that a short question by mistake does not cost a
    book; or if that goes on from all of it by a tenth or more, as it does when reading was stopped before.
    """
    read, reused = stats.context_used, stats.reused_tokens
    return (2 * reused < read and read > known) or (reused >= known and 10 * (read - reused) > known)


def _start(llm: LLM, options: RunOptions, progress: ProgressBar) -> Generation:
    if options.raw:
        return llm.generate(options.text, **options.generation, progress=progress)
    messages = [{"role": "system", "content": options.system}] if options.system is not None else []
    return llm.chat([*messages, {"role": "user", "content": options.text}], **options.generation, progress=progress)


def _finish(
    llm: LLM, options: RunOptions, generation: Generation, chunks: list[Chunk], interrupted: bool, out: TextIO
) -> None:
    if options.json:
        _write(out, json.dumps(_as_json(llm, options, generation, chunks), ensure_ascii=False) + "\n")
    elif not options.stream:
        _write(out, generation.text)
    if not options.json and out.isatty():
        _write(out, "\n")
    if options.stats:
        for line in (describe(generation.stats, interrupted=interrupted), *describe_experts(llm)):
            notice(line)


def _write(out: TextIO, text: str) -> None:
    out.write(text)
    out.flush()


def _as_json(llm: LLM, options: RunOptions, generation: Generation, chunks: list[Chunk]) -> dict[str, Any]:
    stats = generation.stats
    result: dict[str, Any] = {"text": generation.text, "model": llm.name, "finish_reason": stats.finish_reason}
    for name in ("prompt_tokens", "reused_tokens", "completion_tokens", "context_used", "context"):
        result[name] = getattr(stats, name)
    for name in ("prefill_seconds", "decode_seconds", "prefill_tok_s", "decode_tok_s"):
        result[name] = round(getattr(stats, name), 6)
    if options.generation.get("logprobs") is not None:
        result["logprobs"] = [_logprob(chunk) for chunk in chunks if chunk.token_id is not None]
    return result


def _logprob(chunk: Chunk) -> dict[str, Any]:
    top = [{"token_id": token, "logprob": logprob} for token, logprob in chunk.top_logprobs]
    return {"token_id": chunk.token_id, "text": chunk.text, "logprob": chunk.logprob, "top_logprobs": top}
