"""`dsv2 run`: a prompt from arguments, files and standard input; stdout gets the answer and nothing else."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from dsv2_local.chunk import Chunk
from dsv2_local.commands.console import (
    ProgressBar,
    Stopwatch,
    describe_experts,
    describe_stats,
    describe_stop,
    json_line,
    json_logprob,
    notice,
    prompt_progress,
    without_control_characters,
)
from dsv2_local.commands.run_options import RunOptions
from dsv2_local.commands.streams import is_unicode
from dsv2_local.errors import InputError, OutputError
from dsv2_local.runtime.stats import Stats

if TYPE_CHECKING:
    from dsv2_local.commands.remote import AnyGeneration, AnyLLM


def run(llm: "AnyLLM", options: RunOptions, out: TextIO) -> None:
    """Answer the prompt of `options` on `out`.

    The cache file, if there is one, is loaded first and saved afterwards (if `_is_worth_saving`). Ctrl-C stops the
    prefill or the answer: what was generated is printed, what was read is saved, and KeyboardInterrupt is raised. It is
    saved too if `out` can no longer be written.
    """
    chunks: list[Chunk] = []
    stopped: BaseException | None = None
    loaded = _load_cache(llm, options.cache) if options.cache else 0
    with prompt_progress() as progress:
        generation, watch = _start(llm, options, progress), Stopwatch()
        try:
            for chunk in watch.over(generation):
                chunks.append(chunk)
                if options.stream and not options.json:
                    _write_text(out, chunk.text)
        except (KeyboardInterrupt, SystemExit, OutputError) as error:
            stopped = error
    interrupted = isinstance(stopped, KeyboardInterrupt)
    if stopped is None or interrupted:
        _finish(llm, options, generation, chunks, out)
        if options.stats:
            for line in (describe_stats(generation.stats, watch.seconds, interrupted), *describe_experts(llm)):
                notice(line)
    stats = generation.stats
    saved = options.cache is not None and _save_cache(llm, options.cache, stats, loaded)
    if interrupted and stats.context_used < stats.prompt_tokens and (saved or not options.cache):
        continues = f"saved in {options.cache}: the same command continues from there"
        rest = continues if saved else "--cache FILE would save them"
        notice(f"{describe_stop(stats)}; {rest}")
    if stopped is not None:
        raise stopped


def _load_cache(llm: "AnyLLM", path: Path) -> int:
    """Load a cache file if there is one; returns its number of tokens.

    Raises:
        InputError: the file is a session of a chat, which saving would overwrite.
        SavedCacheError: the file cannot be read, is damaged, or belongs to another model.
    """
    from dsv2_local.runtime import saved_cache  # with torch, which a server's client does without

    saved_cache.remove_abandoned(path)
    if not saved_cache.holds_something(path):
        return 0
    if saved_cache.read_header(path).conversation:
        raise InputError(f"--cache {path} is a session of `dsv2 chat`; choose another file")
    return llm.load_cache(path)


def _save_cache(llm: "AnyLLM", path: Path, stats: Stats, loaded: int) -> bool:
    """Save the KV cache if it is worth it, also beside what another run may have saved meanwhile."""
    return _is_worth_saving(stats, loaded) and llm.save_cache(path, wanted=partial(_is_worth_saving, stats))


def _is_worth_saving(stats: Stats, saved: int) -> bool:
    """Whether to replace a file of `saved` tokens with the KV cache as it is now.

    Yes if the cache has more tokens, most of them new, so that a short question asked by mistake does not replace a
    book; and yes if it extends all of the file by a tenth or more, as after a prefill that was interrupted before.
    """
    read, reused = stats.context_used, stats.reused_tokens
    return (2 * reused < read and read > saved) or (reused >= saved and 10 * (read - reused) > saved)


def _start(llm: "AnyLLM", options: RunOptions, progress: ProgressBar) -> "AnyGeneration":
    if options.raw:
        return llm.generate(options.text, **options.generation, progress=progress)
    messages = [{"role": "system", "content": options.system}] if options.system else []
    return llm.chat([*messages, {"role": "user", "content": options.text}], **options.generation, progress=progress)


def _finish(llm: "AnyLLM", options: RunOptions, generation: "AnyGeneration", chunks: list[Chunk], out: TextIO) -> None:
    if options.json:
        _write(out, json_line(_as_json(llm, options, generation, chunks), ascii=not is_unicode(out)))
    elif not options.stream:
        _write_text(out, generation.text)
    if options.newline and (options.json or not generation.text.endswith("\n")):
        _write(out, "\n")


def _write_text(out: TextIO, text: str) -> None:
    """Write text of the model: all of it to a pipe or file, but nothing that would control a terminal."""
    _write(out, without_control_characters(text) if out.isatty() else text)


def _write(out: TextIO, text: str) -> None:
    out.write(text)
    out.flush()


def _as_json(llm: "AnyLLM", options: RunOptions, generation: "AnyGeneration", chunks: list[Chunk]) -> dict[str, Any]:
    stats = generation.stats
    result: dict[str, Any] = {"text": generation.text, "model": llm.name, "finish_reason": stats.finish_reason}
    if "seed" in options.generation:
        result["seed"] = options.generation["seed"]
    for name in ("prompt_tokens", "reused_tokens", "completion_tokens", "context_used", "context"):
        result[name] = getattr(stats, name)
    for name in ("prefill_seconds", "decode_seconds", "prefill_tok_s", "decode_tok_s"):
        result[name] = round(getattr(stats, name), 6)
    if options.generation.get("logprobs") is not None:
        result["logprobs"] = [json_logprob(chunk) for chunk in chunks if chunk.token_id is not None]
    return result
