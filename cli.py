"""The `dsv2` command: options to calls.

Everything heavy is imported inside the commands, so that help and shell completion are there at once.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dsv2_local import __version__
from dsv2_local.errors import Dsv2Error, InputError

if TYPE_CHECKING:
    from dsv2_local.llm import LLM

INTERRUPTED, BROKEN_PIPE = 130, 141  # the shell's codes for SIGINT and SIGPIPE

app = typer.Typer(
    name="dsv2",
    help="Run DeepSeek-V2 on your own machine.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

session_commands = typer.Typer(context_settings={"help_option_names": ["-h", "--help"]})
app.add_typer(session_commands, name="sessions")

Model = Annotated[
    str | None,
    typer.Option(
        "-m", "--model", envvar="DSV2_MODEL", help="A converted directory or hub repository. Default: dsv2-nano."
    ),
]
Context = Annotated[int | None, typer.Option(help="Tokens that prompt and answer may have together.")]
Dtype = Annotated[str, typer.Option(help="Activations: float32 or bfloat16.")]
Device = Annotated[
    str, typer.Option(help="cpu, cuda (all GPUs), cuda:0,cuda:1, or auto: GPUs that are able, else the CPU.")
]
Experts = Annotated[str, typer.Option(help="Who computes routed experts: gpu, cpu, stream, hybrid or auto.")]
Vram = Annotated[str | None, typer.Option(help="Of each GPU at most this much: 8GiB, or 8GiB,24GiB.")]
CacheType = Annotated[
    str, typer.Option("--cache-type", help="How latents are kept: bf16, or int8 in 57 % of its bytes.")
]
Threads = Annotated[int | None, typer.Option(help="Of the CPU kernels. Default: one a physical core.")]
System = Annotated[str | None, typer.Option(help="A system message.")]
MaxTokens = Annotated[int | None, typer.Option("--max-tokens", "-n", help="At most this many tokens an answer.")]

_PANEL = "Sampling (default: what the model's makers set)"
Temperature = Annotated[float | None, typer.Option(help="0 is greedy.", rich_help_panel=_PANEL)]
TopP = Annotated[float | None, typer.Option(help="Keep the likeliest tokens of this mass.", rich_help_panel=_PANEL)]
TopK = Annotated[int | None, typer.Option(help="Keep this many tokens.", rich_help_panel=_PANEL)]
MinP = Annotated[float | None, typer.Option(help="Drop below this share of the likeliest.", rich_help_panel=_PANEL)]
Repetition = Annotated[
    float | None, typer.Option("--repetition-penalty", help="Above 1: repeat less.", rich_help_panel=_PANEL)
]
Presence = Annotated[
    float | None, typer.Option("--presence-penalty", help="On tokens already used.", rich_help_panel=_PANEL)
]
Frequency = Annotated[
    float | None, typer.Option("--frequency-penalty", help="On each use of a token.", rich_help_panel=_PANEL)
]
Seed = Annotated[int | None, typer.Option(help="The same seed, the same answer.", rich_help_panel=_PANEL)]
Stop = Annotated[
    list[str] | None, typer.Option(help="End before this string (may be given again).", rich_help_panel=_PANEL)
]


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"dsv2-local {__version__}")
        raise typer.Exit


@app.callback()
def _global(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


@app.command()
def chat(
    model: Model = None,
    session: Annotated[
        str | None, typer.Option(help="Go on with this session, or begin it; it is saved in the end.")
    ] = None,
    system: System = None,
    max_tokens: MaxTokens = None,
    context: Context = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    experts: Experts = "auto",
    vram: Vram = None,
    cache_type: CacheType = "bf16",
    threads: Threads = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    min_p: MinP = None,
    repetition_penalty: Repetition = None,
    presence_penalty: Presence = None,
    frequency_penalty: Frequency = None,
    seed: Seed = None,
    stop: Stop = None,
) -> None:
    """Talk with a model in the terminal."""
    placement = {name: value for name, value in locals().items() if name in _PLACEMENT}
    options = _given(locals(), "max_tokens", *_SAMPLING)
    if session is not None:
        from dsv2_local import sessions

        sessions.file(session)  # before loading, so that a mistake shows at once
    if not sys.stdin.isatty():
        if session is not None:
            raise InputError("--session needs a terminal; `dsv2 run --cache FILE` keeps what a script has read")
        from dsv2_local.console import notice
        from dsv2_local.pipe import gather_prompt

        notice("standard input is not a terminal; answering it as `dsv2 run` would")
        text = gather_prompt(None, [], sys.stdin)
        with _load(**placement) as llm:
            _run(llm, text, options, system=system)
        return
    from dsv2_local.chat import Chat

    with _load(**placement) as llm:
        Chat(llm, system, options, session=session).loop()


@app.command()
def run(
    prompt: Annotated[str | None, typer.Argument(help="Put after what comes from files and standard input.")] = None,
    file: Annotated[list[Path] | None, typer.Option("-f", "--file", help="Put a file before the prompt.")] = None,
    model: Model = None,
    system: System = None,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text itself, without the chat template.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object with text and figures.")] = False,
    stream: Annotated[bool, typer.Option(help="Print words as they come.")] = True,
    stats: Annotated[bool, typer.Option("--stats", help="Print the figures to stderr.")] = False,
    logprobs: Annotated[int | None, typer.Option(help="With --json: this many likeliest tokens a step.")] = None,
    cache: Annotated[
        Path | None, typer.Option(help="Keep what was read in this file; a prompt that begins like it goes on from it.")
    ] = None,
    max_tokens: MaxTokens = None,
    context: Context = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    experts: Experts = "auto",
    vram: Vram = None,
    cache_type: CacheType = "bf16",
    threads: Threads = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    min_p: MinP = None,
    repetition_penalty: Repetition = None,
    presence_penalty: Presence = None,
    frequency_penalty: Frequency = None,
    seed: Seed = None,
    stop: Stop = None,
) -> None:
    """Answer one prompt from arguments, files and standard input, for use in scripts."""
    placement = {name: value for name, value in locals().items() if name in _PLACEMENT}
    options = _given(locals(), "max_tokens", "logprobs", *_SAMPLING)
    from dsv2_local.pipe import gather_prompt

    text = gather_prompt(prompt, file or [], sys.stdin)  # before loading, so that a mistake shows at once
    with _load(**placement) as llm:
        _run(llm, text, options, system=system, raw=raw, json=as_json, stream=stream, stats=stats, cache=cache)


@session_commands.callback(invoke_without_command=True)
def list_sessions(invocation: typer.Context) -> None:
    """List saved chats, or delete some."""
    if invocation.invoked_subcommand is None:
        from dsv2_local import sessions

        with _closed_pipe_is_no_error():
            sessions.show()


@session_commands.command("delete")
def delete_sessions(
    names: Annotated[list[str], typer.Argument(help="As `dsv2 sessions` lists them.")],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Delete saved chats."""
    from dsv2_local import sessions

    sessions.check(names)
    if not yes and not sys.stdin.isatty():
        raise InputError("standard input is no terminal that could be asked; add --yes to delete them")
    if yes or typer.confirm(f"Delete {', '.join(names)}?", err=True):
        sessions.delete(names)


@app.command()
def quantize(
    source: Annotated[str, typer.Argument(help="A directory of safetensors, or a hub repository.")],
    destination: Annotated[Path, typer.Argument(help="The directory to make.")],
    recipe: Annotated[str, typer.Option(help="nf4, mixed, int8 or bf16.")] = "nf4",
    verify: Annotated[bool, typer.Option("--verify", help="Compare the result with the source.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing checkpoint.")] = False,
    revision: Annotated[str | None, typer.Option(help="A hub repository's branch, tag or commit.")] = None,
    token: Annotated[str | None, typer.Option(envvar="HF_TOKEN", help="For gated repositories.")] = None,
) -> None:
    """Convert a DeepSeek-V2 release to 4-bit weights; interrupted, the same command goes on."""
    from dsv2_local import quantizing
    from dsv2_local.quant.schema import Recipe

    if recipe not in list(Recipe):
        raise InputError(f"--recipe {recipe} is not one of {', '.join(Recipe)}")
    quantizing.run(
        source, destination, recipe=Recipe(recipe), check=verify, force=force, revision=revision, token=token
    )


@app.command()
def plan(
    model: Annotated[str, typer.Argument(help="deepseek-v2, deepseek-v2-lite, a config.json or a directory.")],
    recipe: Annotated[str | None, typer.Option(help="nf4, mixed, int8 or bf16.")] = None,
    vram: Annotated[str | None, typer.Option(help="Of each GPU: 24GiB, or 24GiB,24GiB; 0 for none.")] = None,
    ram: Annotated[str | None, typer.Option(help="RAM that may be used, such as 192GiB.")] = None,
    context: Annotated[str | None, typer.Option(help="Tokens that must fit: 8192, or 128K.")] = None,
    cache_type: Annotated[
        str, typer.Option("--cache-type", "--cache", help="How latents are kept: bf16, int8 or fp32.")
    ] = "bf16",
    experts: Experts = "auto",
    rates: Annotated[str, typer.Option(help="GB/s and GFLOP/s to reckon with: ram=80,link=25,vram=900.")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show where a model would lie in memory, here or on another machine, before anything is downloaded."""
    from dsv2_local import planning

    with _closed_pipe_is_no_error():
        planning.run(planning.Request(model, recipe, vram, ram, context, cache_type, rates, experts), as_json)


@app.command()
def inspect(
    model: Annotated[str | None, typer.Argument(envvar="DSV2_MODEL", help="A directory or hub repository.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show a model's architecture, tensors, sizes and cache."""
    from dsv2_local import inspection

    with _closed_pipe_is_no_error():
        inspection.show(model, as_json)


@app.command()
def bench(
    invocation: typer.Context,
    model: Model = None,
    random_weights: Annotated[
        str | None,
        typer.Option(help="Measure random weights of a shape: deepseek-v2, deepseek-v2-lite or a config.json."),
    ] = None,
    layers: Annotated[int | None, typer.Option(help="Only the first layers; the whole is extrapolated.")] = None,
    prompt: Annotated[str | None, typer.Option(help="Tokens of the prompts. Default: 128,512.")] = None,
    decode: Annotated[int, typer.Option(help="Tokens to decode at each context.")] = 32,
    context: Annotated[
        str | None, typer.Option(help="Tokens in the cache before decoding. Default: 0,4096,32768.")
    ] = None,
    cache_type: CacheType = "bf16",
    threads: Threads = None,
    recipe: Annotated[
        str | None, typer.Option(help="Of random weights: nf4, mixed, int8 or bf16. Default: nf4.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    trace: Annotated[
        Path | None, typer.Option(help="Measure nothing; write the experts that a text is routed to, to this file.")
    ] = None,
    text: Annotated[Path | None, typer.Option(help="With --trace: the text. Default: standard input.")] = None,
) -> None:
    """Measure how fast this machine runs a model, or would run one that is not there yet."""
    from dsv2_local import bench, llm
    from dsv2_local.kernels.format import Cache
    from dsv2_local.quant.schema import Recipe

    if recipe is not None and recipe not in list(Recipe):
        raise InputError(f"--recipe {recipe} is not one of {', '.join(Recipe)}")
    source = invocation.get_parameter_source("model")
    if random_weights is not None and source is not None and source.name == "ENVIRONMENT":
        model = None  # $DSV2_MODEL is only a default
    if cache_type not in llm.CACHES:
        raise InputError(f"--cache-type {cache_type} is not one of {', '.join(llm.CACHES)}")
    chosen = None if recipe is None else Recipe(recipe)
    request = bench.Request(model, random_weights, layers, prompt, decode, context, threads, chosen, Cache(cache_type))
    if trace is not None:
        bench.trace(request, trace, text)
        return
    with _closed_pipe_is_no_error():
        bench.run(request, as_json)


_SAMPLING = (
    "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "seed",
    "stop",
)  # fmt: skip


_PLACEMENT = ("model", "context", "dtype", "cache_type", "device", "experts", "vram", "threads")


def _given(values: dict[str, Any], *names: str) -> dict[str, Any]:
    """The options that were given, by name."""
    return {name: values[name] for name in names if values[name] is not None}


def _load(model: str | None, vram: str | None, cache_type: str, **options: Any) -> "LLM":
    from dsv2_local import llm
    from dsv2_local.console import Waiting, notice
    from dsv2_local.kernels import ops
    from dsv2_local.sizes import size

    if model is None:
        notice("using the bundled dsv2-nano; choose another model with -m or $DSV2_MODEL")
    limits = None if vram is None else [size("--vram", part) for part in vram.split(",")]
    experts, kernels = (
        Waiting("bringing experts to page-locked RAM"),
        Waiting("preparing the GPU's kernels", unit="steps"),
    )
    with experts as progress, kernels as preparing:
        loaded = llm.load(
            model, vram=limits, cache=cache_type, progress=progress, preparing=preparing, **options
        )  # fmt: skip
    for warning in (ops.slow_notice(), loaded.threads.warning, *loaded.notes):
        if warning:
            notice(warning)
    return loaded


def _run(llm: "LLM", text: str, options: dict[str, Any], **settings: Any) -> None:
    from dsv2_local import pipe

    with _closed_pipe_is_no_error():
        pipe.run(llm, pipe.Request(text, options, **settings), sys.stdout)


@contextmanager
def _closed_pipe_is_no_error() -> Iterator[None]:
    """End with the shell's code when nobody reads on, and keep the interpreter's last flush quiet."""
    try:
        yield
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(BROKEN_PIPE) from None


def main() -> None:
    """Run the command; an error made on purpose becomes one line on stderr and its exit code."""
    try:
        app()
    except Dsv2Error as error:
        print(f"dsv2: error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
