"""`dsv2 run --batch`: answers the requests in a file, many at once, and goes on where it was interrupted."""

import os
import stat
import sys
import time
from collections import deque
from collections.abc import Generator as PyGenerator
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from threading import RLock
from typing import TYPE_CHECKING, Any, BinaryIO, cast

from dsv2_local.commands import streams
from dsv2_local.commands.batch_lines import Line, Parser, Request, Style, read_lines
from dsv2_local.commands.batch_options import BatchOptions, Order
from dsv2_local.commands.batch_output import (
    FileOutput,
    Output,
    StreamOutput,
    answer,
    is_done,
    reference,
    refusal,
)
from dsv2_local.commands.batch_progress import BatchProgress
from dsv2_local.commands.console import clock, describe_experts, json_logprob, notice
from dsv2_local.errors import BatchError, CacheFullError, Dsv2Error, InputError, NonFiniteError, TemplateError
from dsv2_local.server import openai_format
from dsv2_local.server.completion_format import Prompt, text_completion

if TYPE_CHECKING:
    from dsv2_local.generation import Generation
    from dsv2_local.llm import LLM

FAULTS_OF_A_LINE = (InputError, TemplateError, NonFiniteError, CacheFullError)
"""Errors that end one request. All others, such as those of a GPU, would end every further one, and end the batch."""


class Batch:
    """A batch: opened and compared with what is done before a model is loaded, then run.

    A context manager that closes the files.
    """

    def __init__(self, options: BatchOptions) -> None:
        """Open input and output.

        Raises:
            InputError: the input cannot be read, or is the output.
            BatchError: the output cannot be written, or has other lines than results of this input.
        """
        self.options = options
        self._where = "standard input" if options.source is None else str(options.source)
        self._fingerprint = options.fingerprint()
        self._source = _open(options)
        try:
            self._output = _output(options, self._source)
            try:
                self.total = self._compare() if self._source.seekable() else None
            except BaseException:
                self._output.close()
                raise
        except BaseException:
            self._source.close()
            raise

    def __enter__(self) -> "Batch":
        return self

    def __exit__(self, *error: object) -> None:
        self._output.close()
        if self._source.seekable():  # else a thread may be waiting for its next line, and closing waits for the thread
            self._source.close()

    def is_complete(self) -> bool:
        """Whether there is no line without a result, as far as that is known before the lines are read; tells so."""
        if self.total is None or self._output.done.count < self.total:
            return False
        done = f"{self.options.output_name()} has the results of all {self.total:,} lines already"
        notice(done if self.total else f"{self._where} has no lines")
        return True

    def run(self, llm: "LLM") -> None:
        """Answer the lines that have no result. If it is interrupted, what is written stays, and a line says so.

        Raises:
            BatchError: the output cannot be written, or turns out to belong to other lines.
            InputError: the input cannot be read.
            Dsv2Error: the model failed in a way that is no line's fault.
        """
        if self._output.done.count:
            notice(f"{self._how_many()} lines are done, by an earlier run; continuing")
        run = _Run(llm, self.options, self._output, self._pending(), self.total)
        try:
            run.finish()
        except (KeyboardInterrupt, Exception):
            notice(self._how_far())
            raise
        for line in run.totals():
            notice(line)

    def end(self) -> int:
        """Tell which lines have errors; returns the exit code."""
        done = self._output.done
        if isinstance(self._output, FileOutput):
            self._output.keep = True
        if done.first_error is None:
            return 0
        number, message = done.first_error
        notice(f"{done.errors:,} of {done.count:,} lines have errors, the first is line {number:,}: {message}")
        return Dsv2Error.exit_code

    def _compare(self) -> int:
        """Compare the results that are there with the input; returns the number of its lines."""
        count, begin = 0, self._source.tell()
        for line in read_lines(self._source, self._where, self._fingerprint):
            count = line.number
            self._is_done(line)
        self._check_end(count)
        self._source.seek(begin)
        return count

    def _is_done(self, line: Line) -> bool:
        return is_done(self._output.done, line.number, line.key, self._where, self.options.output_name())

    def _check_end(self, count: int) -> None:
        """Check that no result is of a line after the last one, `count`."""
        done, name = self._output.done, self.options.output_name()
        torn = self._output.torn and done.count == count
        if done.last > count or torn:
            raise BatchError(f"{name} has results of more lines than the {count:,} of {self._where}; choose another -o")

    def _pending(self) -> Iterator[Request]:
        """The requests of the lines that have no result."""
        parser, before = Parser(self.options.generation, self.options.system), self._output.done.last
        count = 0
        for line in read_lines(self._source, self._where, self._fingerprint):
            count = line.number
            if count <= before and self._is_done(line):
                parser.skip(line)
            else:
                yield parser.parse(line)
        if before > count:
            self._check_end(count)

    def _how_far(self) -> str:
        if isinstance(self._output, StreamOutput):
            return f"stopped after {self._how_many()} lines; with -o FILE the same command would continue"
        return f"{self._how_many()} lines are done; the same command continues ({self.options.output})"

    def _how_many(self) -> str:
        return f"{self._output.done.count:,}" + ("" if self.total is None else f" of {self.total:,}")


class _Run:
    """One run over the lines that are left."""

    def __init__(
        self, llm: "LLM", options: BatchOptions, output: Output, requests: Iterator[Request], total: int | None
    ) -> None:
        self._llm, self._options, self._output, self._requests = llm, options, output, requests
        self._total = total
        self._ordered = options.order is Order.INPUT
        self._lock = RLock()  # `LLM.batch` may take requests in another thread
        self._running = dict["Generation", Request]()
        self._waiting = deque[Request]()  # in the order of the input, until their results are written
        self._start = time.monotonic()
        self._count = self._prompt = self._reused = self._completion = 0

    def finish(self) -> None:
        batch = cast("PyGenerator[Generation, None, None]", self._llm.batch(self._ask_all(), ordered=self._ordered))
        with self._progress(), closing(batch):
            for generation in batch:
                self._take(generation)

    def totals(self) -> list[str]:
        """Lines with what was done, and how fast."""
        seconds = time.monotonic() - self._start
        reused = f" (reused {self._reused:,})" if self._reused else ""
        line = (
            f"{self._count:,} requests in {clock(seconds)} · prompts {self._prompt:,} tokens{reused} · "
            f"answers {self._completion:,} tokens, {self._completion / max(seconds, 1e-9):,.1f} tok/s"
        )
        return [line, *(describe_experts(self._llm) if self._options.stats else ())]

    def _progress(self) -> BatchProgress:
        if not sys.stderr.isatty() or (self._options.output is None and sys.stdout.isatty()):
            return BatchProgress(self._counts, self._total, None)  # results on a terminal are its progress
        from rich.console import Console

        return BatchProgress(self._counts, self._total, Console(stderr=True))

    def _counts(self) -> tuple[int, int]:
        with self._lock:
            running = sum(generation.stats.completion_tokens for generation in self._running)
            return self._output.done.count, self._completion + running

    def _ask_all(self) -> Iterator["Generation"]:
        """The generations of all requests; those that cannot be asked become errors."""
        for request in self._requests:
            generation = self._ask(request)
            with self._lock:
                if self._ordered:
                    self._waiting.append(request)
                if generation is None:
                    assert request.error is not None
                    self._settle(request, refusal(request, request.error))
                else:
                    self._running[generation] = request
            if generation is not None:
                yield generation

    def _ask(self, request: Request) -> "Generation | None":
        if request.error is not None:
            return None
        try:
            if request.messages is not None:
                return self._llm.chat(request.messages, **request.options)
            assert request.prompt is not None
            return self._llm.generate(request.prompt, **request.options)
        except FAULTS_OF_A_LINE as error:
            request.error = error
            return None

    def _take(self, generation: "Generation") -> None:
        """Count and write the answer of a generation that has ended."""
        error, stats = generation.error, generation.stats
        if error is not None and not isinstance(error, FAULTS_OF_A_LINE):
            raise error
        with self._lock:
            request = self._running.pop(generation)
            request.error = error
            self._prompt, self._reused = self._prompt + stats.prompt_tokens, self._reused + stats.reused_tokens
            self._completion += stats.completion_tokens
            result = self._answer(request, generation) if error is None else refusal(request, error)
            self._settle(request, result)

    def _answer(self, request: Request, generation: "Generation") -> dict[str, Any]:
        logprobs, id = request.options.get("logprobs") is not None, reference(request)
        if request.style is Style.CHAT:
            return answer(request, openai_format.chat_completion(self._llm, generation, id, logprobs))
        if request.style is Style.COMPLETION:
            echo = Prompt.of(self._llm, request.prompt) if request.echo and request.prompt is not None else None
            completion = text_completion(self._llm, generation, id, logprobs=logprobs, echo=echo)
            return answer(request, completion)
        body: dict[str, Any] = {"text": generation.text, "finish_reason": generation.stats.finish_reason}
        body["usage"] = openai_format.usage(generation)
        if request.options.get("seed") is not None:
            body["seed"] = request.options["seed"]
        if logprobs:
            body["logprobs"] = [json_logprob(chunk) for chunk in generation.chunks if chunk.token_id is not None]
        return answer(request, body)

    def _settle(self, request: Request, result: dict[str, Any]) -> None:
        """Write a result; in the order of the input, as soon as those before it are written."""
        request.result = result
        if not self._ordered:
            self._write(request, result)
            return
        while self._waiting and self._waiting[0].result is not None:
            self._write(self._waiting[0], self._waiting[0].result)
            self._waiting.popleft()

    def _write(self, request: Request, result: dict[str, Any]) -> None:
        self._output.write(result)
        self._count += 1
        self._output.done.add(request.number, request.key, None if request.error is None else str(request.error))


def _open(options: BatchOptions) -> BinaryIO:
    try:
        if options.source is None:
            return streams.reader(sys.stdin.fileno(), "standard input")
        return options.source.open("rb")
    except OSError as error:
        raise InputError(f"{options.source} cannot be read: {error.strerror}") from None


def _output(options: BatchOptions, source: BinaryIO) -> Output:
    """Open the output.

    Raises:
        InputError: it is the input.
        BatchError: it cannot be written or continued.
    """
    if _is_file(sys.stdout.fileno() if options.output is None else options.output, source):
        raise InputError(f"{options.output_name()} is the input too; choose another -o")
    if options.output is None:
        return StreamOutput(sys.stdout)
    output = FileOutput(options.output)
    if options.order is Order.INPUT and not output.done.contiguous:
        output.close()
        raise BatchError(
            f"{options.output} does not have the results of the first lines in their order; continue it with "
            f"--order {Order.FINISHED}, or choose another -o"
        )
    return output


def _is_file(place: Path | int, file: BinaryIO) -> bool:
    """Whether a path or descriptor is the same regular file as `file`, under whatever name."""
    try:
        found = os.stat(place)  # noqa: PTH116 (may be a descriptor)
    except OSError:
        return False
    return stat.S_ISREG(found.st_mode) and os.path.samestat(found, os.fstat(file.fileno()))
