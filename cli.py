"""The `dsv2` command: options to calls.

Everything heavy is imported inside the commands, so that help and shell completion are there at once.
"""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, is_dataclass
from inspect import Parameter, signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dsv2_local import __version__
from dsv2_local.errors import Dsv2Error, InputError
from dsv2_local.options import one_of

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
Experts = Annotated[str, typer.Option(help="Who computes the routed experts: gpu, cpu, stream, hybrid or auto.")]
CacheType = Annotated[
    str, typer.Option("--cache-type", help="How the KV cache stores latents: bf16, or int8 in 57 % of the bytes.")
]
Threads = Annotated[int | None, typer.Option(help="CPU threads. Default: one per physical core.")]
System = Annotated[str | None, typer.Option(help="A system message.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]

_PANEL = "Sampling (default: what the model's makers set)"


@dataclass(frozen=True)
class LoadOptions:
    """Which model, and where it runs: the options of every command that answers."""

    model: Model = None
    context: Annotated[int | None, typer.Option(help="Tokens that prompt and answer may have together.")] = None
    dtype: Annotated[str, typer.Option(help="Type of the activations: float32 or bfloat16.")] = "auto"
    device: Annotated[
        str, typer.Option(help="cpu, cuda (all GPUs), cuda:0,cuda:1, or auto: the GPUs that are able, else the CPU.")
    ] = "auto"
    experts: Experts = "auto"
    vram: Annotated[
        str | None, typer.Option(help="The most memory to use of each GPU: 8GiB, or 8GiB,24GiB for two.")
    ] = None
    cache_type: CacheType = "bf16"
    threads: Threads = None


@dataclass(frozen=True)
class GenerationOptions:
    """How an answer is made. None: the model makers' own default."""

    max_tokens: Annotated[
        int | None, typer.Option("--max-tokens", "-n", help="The most tokens that an answer may have.")
    ] = None
    temperature: Annotated[float | None, typer.Option(help="0 is greedy.", rich_help_panel=_PANEL)] = None
    top_p: Annotated[
        float | None, typer.Option(help="Keep the likeliest tokens of this total probability.", rich_help_panel=_PANEL)
    ] = None
    top_k: Annotated[
        int | None, typer.Option(help="Keep this many of the likeliest tokens.", rich_help_panel=_PANEL)
    ] = None
    min_p: Annotated[
        float | None,
        typer.Option(help="Drop tokens below this fraction of the largest probability.", rich_help_panel=_PANEL),
    ] = None
    repetition_penalty: Annotated[float | None, typer.Option(help="Above 1: repeat less.", rich_help_panel=_PANEL)] = (
        None
    )
    presence_penalty: Annotated[
        float | None,
        typer.Option(help="Subtracted once from the logit of a token in the answer.", rich_help_panel=_PANEL),
    ] = None
    frequency_penalty: Annotated[
        float | None,
        typer.Option(help="Subtracted for each time that a token is in the answer.", rich_help_panel=_PANEL),
    ] = None
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same answer.", rich_help_panel=_PANEL)] = (
        None
    )
    stop: Annotated[
        list[str] | None,
        typer.Option(help="End the answer before this string (may be repeated).", rich_help_panel=_PANEL),
    ] = None

    def given(self) -> dict[str, Any]:
        """The options that were given, by name."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def grouped(command: Callable[..., None]) -> Callable[..., None]:
    """Let a command take dataclasses of options: typer sees their fields as options of their own."""
    own = signature(command)
    groups: dict[str, type[Any]] = {
        name: parameter.annotation
        for name, parameter in own.parameters.items()
        if isinstance(parameter.annotation, type) and is_dataclass(parameter.annotation)
    }

    def spread(**values: Any) -> None:
        made = {
            name: group(**{field.name: values.pop(field.name) for field in fields(group)})
            for name, group in groups.items()
        }
        command(**made, **values)

    parameters: list[Parameter] = []
    for name, parameter in own.parameters.items():
        shown = signature(groups[name]).parameters.values() if name in groups else [parameter]
        parameters += [each.replace(kind=Parameter.KEYWORD_ONLY) for each in shown]
    spread.__signature__ = own.replace(parameters=parameters)  # type: ignore[attr-defined]
    spread.__annotations__ = {each.name: each.annotation for each in parameters}
    spread.__name__, spread.__doc__ = command.__name__, command.__doc__
    return spread


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
@grouped
def chat(
    load: LoadOptions,
    generation: GenerationOptions,
    session: Annotated[
        str | None, typer.Option(help="Continue this session, or begin it; it is saved at the end.")
    ] = None,
    system: System = None,
) -> None:
    """Talk with a model in the terminal."""
    if session is not None:
        from dsv2_local.commands import sessions

        sessions.file(session)  # before loading, so that a mistake shows at once
    if not sys.stdin.isatty():
        if session is not None:
            raise InputError("--session needs a terminal; `dsv2 run --cache FILE` keeps what a script has read")
        from dsv2_local.commands.console import notice
        from dsv2_local.commands.run import gather_prompt

        notice("standard input is not a terminal; answering it as `dsv2 run` would")
        text = gather_prompt(None, [], sys.stdin)
        with _load(load) as llm:
            _run(llm, text, generation.given(), system=system)
        return
    from dsv2_local.commands.chat import Chat

    with _load(load) as llm:
        Chat(llm, system, generation.given(), session=session).loop()


@app.command()
@grouped
def run(
    load: LoadOptions,
    generation: GenerationOptions,
    prompt: Annotated[str | None, typer.Argument(help="Put after what comes from files and standard input.")] = None,
    file: Annotated[list[Path] | None, typer.Option("-f", "--file", help="Put a file before the prompt.")] = None,
    system: System = None,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text itself, without the chat template.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object with text and figures.")] = False,
    stream: Annotated[bool, typer.Option(help="Print the answer word by word.")] = True,
    stats: Annotated[bool, typer.Option("--stats", help="Print the figures to stderr.")] = False,
    logprobs: Annotated[
        int | None, typer.Option(help="With --json: log probabilities of this many likeliest tokens a step.")
    ] = None,
    cache: Annotated[
        Path | None,
        typer.Option(help="Save the KV cache to this file; a later prompt that begins alike reuses it."),
    ] = None,
) -> None:
    """Answer one prompt from arguments, files and standard input, for use in scripts."""
    options = generation.given() | ({} if logprobs is None else {"logprobs": logprobs})
    from dsv2_local.commands.run import gather_prompt

    text = gather_prompt(prompt, file or [], sys.stdin)  # before loading, so that a mistake shows at once
    with _load(load) as llm:
        _run(llm, text, options, system=system, raw=raw, json=as_json, stream=stream, stats=stats, cache=cache)


@session_commands.callback(invoke_without_command=True)
def list_sessions(invocation: typer.Context) -> None:
    """List saved chats, or delete some."""
    if invocation.invoked_subcommand is None:
        from dsv2_local.commands import sessions

        with _closed_pipe_is_no_error():
            sessions.show()


@session_commands.command("delete")
def delete_sessions(
    names: Annotated[list[str], typer.Argument(help="As `dsv2 sessions` lists them.")],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Delete saved chats."""
    from dsv2_local.commands import sessions

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
    from dsv2_local.commands import quantize
    from dsv2_local.quant.schema import Recipe

    quantize.run(
        source,
        destination,
        recipe=one_of("--recipe", recipe, Recipe),
        check=verify,
        force=force,
        revision=revision,
        token=token,
    )


@app.command()
def plan(
    model: Annotated[str, typer.Argument(help="deepseek-v2, deepseek-v2-lite, a config.json or a directory.")],
    recipe: Annotated[str | None, typer.Option(help="nf4, mixed, int8 or bf16.")] = None,
    vram: Annotated[str | None, typer.Option(help="Of each GPU: 24GiB, or 24GiB,24GiB; 0 for none.")] = None,
    ram: Annotated[str | None, typer.Option(help="RAM that may be used, such as 192GiB.")] = None,
    context: Annotated[str | None, typer.Option(help="Tokens that must fit: 8192, or 128K.")] = None,
    cache_type: Annotated[
        str, typer.Option("--cache-type", help="How the KV cache stores latents: bf16, int8 or fp32.")
    ] = "bf16",
    cache: Annotated[str | None, typer.Option("--cache", hidden=True)] = None,
    experts: Experts = "auto",
    rates: Annotated[
        str, typer.Option(help="Rates to predict the speed from, in GB/s and GFLOP/s: ram=80,link=25,vram=900.")
    ] = "",
    as_json: AsJson = False,
) -> None:
    """Show where a model would lie in memory, here or on another machine, before anything is downloaded."""
    from dsv2_local.commands import plan
    from dsv2_local.commands.console import notice

    if cache is not None:
        notice("--cache is now spelled --cache-type")
    options = plan.PlanOptions(model, recipe, vram, ram, context, cache or cache_type, rates, experts)
    with _closed_pipe_is_no_error():
        plan.run(options, as_json)


@app.command()
def inspect(
    model: Annotated[str | None, typer.Argument(envvar="DSV2_MODEL", help="A directory or hub repository.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show a model's architecture, tensors, sizes and cache."""
    from dsv2_local.commands import inspect

    with _closed_pipe_is_no_error():
        inspect.show(model, as_json)


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
    as_json: AsJson = False,
    trace: Annotated[
        Path | None, typer.Option(help="Measure nothing; write the experts that a text is routed to, to this file.")
    ] = None,
    text: Annotated[Path | None, typer.Option(help="With --trace: the text. Default: standard input.")] = None,
) -> None:
    """Measure how fast this machine runs a model, or would run one that is not there yet."""
    from dsv2_local.commands import bench
    from dsv2_local.llm import CACHE_DTYPES
    from dsv2_local.quant.schema import Recipe

    source = invocation.get_parameter_source("model")
    if random_weights is not None and source is not None and source.name == "ENVIRONMENT":
        model = None  # $DSV2_MODEL is only a default
    chosen = None if recipe is None else one_of("--recipe", recipe, Recipe)
    kept = one_of("--cache-type", cache_type, CACHE_DTYPES)
    options = bench.BenchOptions(model, random_weights, layers, prompt, decode, context, threads, chosen, kept)
    if trace is not None:
        bench.trace(options, trace, text)
        return
    with _closed_pipe_is_no_error():
        bench.run(options, as_json)


def _load(options: LoadOptions) -> "LLM":
    from dsv2_local.commands.loading import load

    return load(**asdict(options))


def _run(llm: "LLM", text: str, generation: dict[str, Any], **settings: Any) -> None:
    from dsv2_local.commands import run

    with _closed_pipe_is_no_error():
        run.run(llm, run.RunOptions(text, generation, **settings), sys.stdout)


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
