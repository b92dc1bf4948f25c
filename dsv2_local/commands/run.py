"""`dsv2 run`: a prompt from arguments, files and standard input; stdout gets the answer and nothing else."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from dsv2_local.commands.console import (
    ProgressBar,
    describe_experts,
    describe_stats,
    describe_stop,
    notice,
    prompt_progress,
)
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
        system: the system message.
        raw: whether to continue the text itself, without the chat template.
        json: whether to print one JSON object instead of the answer's text.
        stream: whether to print the text while it is generated.
        stats: whether to print statistics on stderr.
        cache: the file in which the KV cache is saved from one run to the next.
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
        """Check the options before the model is loaded.

        Raises:
            InputError: two options exclude each other, one has no effect, or the cache file cannot be written.
        """
        if self.raw and self.system is not None:
            raise InputError("--system is part of the chat template, which --raw does not use; drop one of them")
        if self.generation.get("logprobs") is not None and not self.json:
            raise InputError("--logprobs needs --json, which prints the log probabilities")
        if self.cache and (self.cache.is_dir() or not self.cache.absolute().parent.is_dir()):
            raise InputError(
                f"--cache {self.cache} cannot be written: it is a directory, or its directory does not exist"
            )


def gather_prompt(prompt: str | None, files: Sequence[Path], stdin: TextIO) -> str:
    """Join files, standard input (unless it is a terminal) and the prompt, in this order, with empty lines between.

    Line ends at the end of each part are removed.

    Raises:
        InputError: all parts are empty, a file cannot be read, or a part is not UTF-8 text.
    """
    parts = [_text(_read(path), str(path)) for path in files]
    if not stdin.isatty():
        parts.append(_text(stdin.buffer.read(), "standard input"))
    if prompt is not None:
        parts.append(_text(os.fsencode(prompt), "the prompt"))
    parts = [part.rstrip("\r\n") for part in parts]
    text = "\n\n".join(part for part in parts if part)
    if not text.strip():
        raise InputError("there is no prompt; pass one as an argument, with -f FILE or on standard input")
    return text


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None


def _text(data: bytes, where: str) -> str:
    """Decode UTF-8. NUL bytes are valid UTF-8, but they are a sign of a binary file.

    Raises:
        InputError: the data is not text; the message has `where` it is from, and the position.
    """
    if (at := data.find(b"\0")) >= 0:
        raise InputError(f"{where} is not text: byte {at:,} is NUL")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{where} is not UTF-8 text: byte {error.start:,} is 0x{data[error.start]:02x}") from None


def run(llm: LLM, options: RunOptions, out: TextIO) -> None:
    """Answer the prompt of `options` on `out`.

    The cache file, if there is one, is loaded first and saved afterwards (if `_is_worth_saving`). Ctrl-C stops the
    prefill or the answer: what was generated is printed, what was read is saved, and KeyboardInterrupt is raised.
    """
    chunks: list[Chunk] = []
    interrupted = False
    loaded = _load_cache(llm, options.cache) if options.cache and options.cache.exists() else 0
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
    saved = options.cache if options.cache and _is_worth_saving(stats, loaded) else None
    if saved:
        llm.save_cache(saved)
    if interrupted and stats.context_used < stats.prompt_tokens and (saved or not options.cache):
        rest = f"saved in {saved}: the same command continues from there" if saved else "--cache FILE would save them"
        notice(f"{describe_stop(stats)}; {rest}")
    if interrupted:
        raise KeyboardInterrupt


def _load_cache(llm: LLM, path: Path) -> int:
    """Load a cache file; returns its number of tokens.

    Raises:
        InputError: the file is a session of a chat, which saving would overwrite.
        SavedCacheError: the file cannot be read, is damaged, or belongs to another model.
    """
    if saved_cache.read_header(path).conversation:
        raise InputError(f"--cache {path} is a session of `dsv2 chat`; choose another file")
    return llm.load_cache(path)


def _is_worth_saving(stats: Stats, saved: int) -> bool:
    """Whether to replace a file of `saved` tokens with the KV cache as it is now.

    Yes if the cache has more tokens, most of them new, so that a short question asked by mistake does not replace a
    book; and yes if it extends all of the file by a tenth or more, as after a prefill that was interrupted before.
    """
    read, reused = stats.context_used, stats.reused_tokens
    return (2 * reused < read and read > saved) or (reused >= saved and 10 * (read - reused) > saved)


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
        for line in (describe_stats(generation.stats, interrupted=interrupted), *describe_experts(llm)):
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
