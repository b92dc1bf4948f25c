"""The `dsv2` command: parses options and calls `dsv2_local.commands`.

Heavy modules are imported inside the commands, so that help and shell completion are fast.
"""

import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, is_dataclass
from inspect import Parameter, signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dsv2_local import __version__, inlet
from dsv2_local.errors import InputError
from dsv2_local.options import DRAW, drawn_seed, duration, one_of, size, tokens

if TYPE_CHECKING:
    from dsv2_local.commands.batch_options import BatchOptions
    from dsv2_local.commands.remote import RemoteLLM
    from dsv2_local.commands.run_options import RunOptions
    from dsv2_local.llm import LLM

app = typer.Typer(
    name="dsv2",
    help="Run DeepSeek-V2 on your own machine.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

session_commands = typer.Typer(context_settings={"help_option_names": ["-h", "--help"]})
app.add_typer(session_commands, name="sessions")


def _unicode(option: typer.CallbackParam, value: str | list[str] | None) -> str | list[str] | None:
    """Check the text of an option. Paths may have any bytes and are not checked."""
    if isinstance(value, str):
        return inlet.text(value, f"--{option.name}")
    return value and [inlet.text(each, f"--{option.name}") for each in value]


Model = Annotated[
    str | None,
    typer.Option(
        "-m",
        "--model",
        envvar="DSV2_MODEL",
        help="Converted model: a directory or a hub repository. Default: dsv2-nano.",
    ),
]
Experts = Annotated[str, typer.Option(help="Where routed experts are computed: auto, gpu, hybrid, stream or cpu.")]
DeviceNames = Annotated[
    str,
    typer.Option(help="cpu, cuda (all GPUs), cuda:0,cuda:1 and so on, or auto: GPUs if suitable, else the CPU."),
]
Vram = Annotated[str | None, typer.Option(help="Maximum memory to use on each GPU: 8GiB, or 8GiB,24GiB for two GPUs.")]
CacheType = Annotated[
    str, typer.Option("--cache-type", help="Type of the KV cache: bf16, or int8 in 57 % of the bytes.")
]
Threads = Annotated[int | None, typer.Option(help="CPU threads. Default: one per physical core.")]
Host = Annotated[
    str | None,
    typer.Option(
        "--host",
        metavar="URL",
        envvar="DSV2_HOST",
        help="Ask the model of a running `dsv2 serve` there, such as http://127.0.0.1:8000, and load none.",
    ),
]
System = Annotated[str | None, typer.Option(help="System message.", callback=_unicode)]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]

_PANEL = "Sampling (default: the model's generation_config.json)"
_BATCH = "Files of requests"


@dataclass(frozen=True)
class LoadOptions:
    """Options of the commands that generate text: which model, and where it runs."""

    model: Model = None
    context: Annotated[
        int | None,
        typer.Option(
            metavar="TOKENS",
            parser=lambda text: tokens("--context", str(text)),
            help="Maximum tokens of prompt and answer: 8192, or 128K. Default: 8192 or the model's limit.",
        ),
    ] = None
    dtype: Annotated[
        str, typer.Option(help="Activations: float32, bfloat16, or auto: float32 on the CPU, bfloat16 on GPUs.")
    ] = "auto"
    device: DeviceNames = "auto"
    experts: Experts = "auto"
    vram: Vram = None
    cache_type: CacheType = "bf16"
    threads: Threads = None


@dataclass(frozen=True)
class GenerationOptions:
    """Options of the commands that generate text: how to sample. None: the model's default."""

    max_tokens: Annotated[int | None, typer.Option("--max-tokens", "-n", help="Maximum tokens of an answer.")] = None
    temperature: Annotated[
        float | None, typer.Option(help="Above 1: more random. 0: greedy.", rich_help_panel=_PANEL)
    ] = None
    top_p: Annotated[
        float | None,
        typer.Option(help="Keep the most likely tokens up to this sum of probabilities.", rich_help_panel=_PANEL),
    ] = None
    top_k: Annotated[
        int | None, typer.Option(help="Keep this many of the most likely tokens.", rich_help_panel=_PANEL)
    ] = None
    min_p: Annotated[
        float | None,
        typer.Option(help="Drop tokens below this fraction of the largest probability.", rich_help_panel=_PANEL),
    ] = None
    repetition_penalty: Annotated[
        float | None, typer.Option(help="Above 1: less repetition.", rich_help_panel=_PANEL)
    ] = None
    presence_penalty: Annotated[
        float | None,
        typer.Option(help="Subtracted once from the logits of tokens in the answer.", rich_help_panel=_PANEL),
    ] = None
    frequency_penalty: Annotated[
        float | None,
        typer.Option(help="Subtracted each time that a token occurs in the answer.", rich_help_panel=_PANEL),
    ] = None
    seed: Annotated[
        int | None,
        typer.Option(
            help="The same seed repeats the answer, as far as rounding does: a reused prefix may change it. -1: draws "
            "one, and shows it.",
            rich_help_panel=_PANEL,
        ),
    ] = None
    stop: Annotated[
        list[str] | None,
        typer.Option(
            help="End the answer before this string; may be given several times.",
            rich_help_panel=_PANEL,
            callback=_unicode,
        ),
    ] = None

    def given(self) -> dict[str, Any]:
        """The options that were given on the command line, by name; a drawn seed is shown on stderr."""
        given = {name: value for name, value in asdict(self).items() if value is not None}
        if self.seed == DRAW:
            from dsv2_local.commands.console import notice

            given["seed"] = drawn_seed()
            notice(f"drew --seed {given['seed']}")
        return given


def grouped(command: Callable[..., None]) -> Callable[..., None]:
    """Decorate a command that takes dataclasses of options: typer sees each of their fields as an option."""
    own = signature(command)
    groups: dict[str, type[Any]] = {
        name: parameter.annotation
        for name, parameter in own.parameters.items()
        if isinstance(parameter.annotation, type) and is_dataclass(parameter.annotation)
    }

    def spread(**values: Any) -> None:
        objects = {
            name: group(**{field.name: values.pop(field.name) for field in fields(group)})
            for name, group in groups.items()
        }
        command(**objects, **values)

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
        str | None, typer.Option(help="Continue this session, or start it; the chat is saved to it.")
    ] = None,
    system: System = None,
    host: Host = None,
) -> None:
    """Chat with a model in the terminal."""
    if host and session is not None:
        raise InputError("--session keeps the KV cache, which is the server's; `dsv2 serve --cache-dir` keeps it there")
    if session is not None:
        from dsv2_local.commands import sessions

        sessions.file(session)  # checks the name before the model is loaded
    if not sys.stdin.isatty():
        if session is not None:
            raise InputError("--session needs a terminal; in a script use `dsv2 run --cache FILE`")
        from dsv2_local.commands.console import notice
        from dsv2_local.commands.run_options import RunOptions, gather_prompt

        notice("standard input is not a terminal; answering it like `dsv2 run`")
        options = RunOptions(gather_prompt(None, [], sys.stdin), generation.given(), system)
        with _model(load, host) as llm:
            _run(llm, options)
        return
    from dsv2_local.commands.terminal import Terminal

    given = generation.given()
    with Terminal() as terminal, _model(load, host, terminal.collect) as llm:
        from dsv2_local.commands.chat import COMMANDS, Chat
        from dsv2_local.commands.prompt import Prompt

        llm.tokenizer.require_chat_template()
        prompt = Prompt(terminal, COMMANDS)
        Chat(llm, system, given, None, prompt.read, prompt.ask, session, terminal).loop()


@app.command()
@grouped
def run(
    load: LoadOptions,
    generation: GenerationOptions,
    prompt: Annotated[str | None, typer.Argument(help="Prompt; follows the text of files and standard input.")] = None,
    file: Annotated[
        list[Path] | None,
        typer.Option("-f", "--file", help="Put this file before the prompt; may be given several times."),
    ] = None,
    stdin: Annotated[
        bool | None,
        typer.Option(help="Whether to read standard input. Default: unless it is a terminal, or read elsewhere too."),
    ] = None,
    system: System = None,
    host: Host = None,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text without the chat template.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object: the answer and its statistics.")
    ] = False,
    stream: Annotated[bool, typer.Option(help="Print the answer while it is generated.")] = True,
    no_newline: Annotated[
        bool, typer.Option("-N", "--no-newline", help="Do not add a newline after the answer.")
    ] = False,
    stats: Annotated[bool, typer.Option("--stats", help="Print statistics on stderr.")] = False,
    logprobs: Annotated[
        int | None,
        typer.Option(help="With --json or --batch: log probabilities of this many most likely tokens per step."),
    ] = None,
    json_schema: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Answer in JSON that this JSON schema describes. Needs llguidance."),
    ] = None,
    cache: Annotated[
        Path | None,
        typer.Option(help="Save the KV cache to this file; a later prompt that begins the same reuses it."),
    ] = None,
    batch: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help='Answer every line of this file (-: standard input), many at once. {"prompt": TEXT} is continued as '
            'with --raw, {"messages": [...]} answered, with options of their own; or lines of OpenAI\'s batch format. '
            "Options here are for lines without their own. --seed is of line 1, every further line has the next one.",
            rich_help_panel=_BATCH,
        ),
    ] = None,
    output: Annotated[
        str | None,
        typer.Option(
            "-o",
            "--output",
            metavar="FILE",
            help="The results, a line for each; if interrupted, run the same command to continue. Default, or -: "
            "standard output, which cannot be continued.",
            rich_help_panel=_BATCH,
        ),
    ] = None,
    order: Annotated[
        str | None,
        typer.Option(
            metavar="ORDER",
            help="Order of the results: input (default), or finished: as they come.",
            rich_help_panel=_BATCH,
        ),
    ] = None,
    parallel: Annotated[
        int | None,
        typer.Option(help="How many lines to compute at once. Default: from the plan.", rich_help_panel=_BATCH),
    ] = None,
) -> None:
    """Answer one prompt from arguments, files and standard input, or a file of requests; for scripts."""
    from dsv2_local.commands import batch_options
    from dsv2_local.commands.run_options import RunOptions, gather_prompt, read_schema
    from dsv2_local.machine.homes import expanded

    given = generation.given() | ({} if logprobs is None else {"logprobs": logprobs})
    if json_schema is not None:
        given |= read_schema(json_schema)
    if batch is not None:
        batch_options.refuse(
            {"--host": bool(host)}, "is not for --batch, which loads a model itself; leave it out, and unset DSV2_HOST"
        )
        batch_options.refuse(
            {
                "a PROMPT": prompt is not None, "--file": bool(file), "--stdin": stdin is True,
                "--no-stdin": stdin is False, "--raw": raw, "--json": as_json, "--no-stream": not stream,
                "--no-newline": no_newline, "--cache": cache is not None,
            },
            "has no meaning with --batch: the lines of its file are the prompts, and those of its output the answers",
        )  # fmt: skip
        _run_batch(
            load,
            batch_options.BatchOptions(
                batch_options.place(batch, "--batch"),
                None if output is None else batch_options.place(output, "-o"),
                given, system, load.model, one_of("--order", order or batch_options.Order.INPUT, batch_options.Order),
                stats, drawn=generation.seed == DRAW,
            ),
            parallel,
        )  # fmt: skip
        return
    batch_options.refuse(
        {"--output": output is not None, "--order": order is not None, "--parallel": parallel is not None},
        "needs --batch FILE; the answer to one prompt goes to standard output",
    )
    batch_options.refuse(
        {"--cache": bool(host) and cache is not None},
        "keeps the KV cache, which is the server's; `dsv2 serve --cache-dir` keeps it there",
    )
    text = gather_prompt(prompt, file or [], sys.stdin, raw, read_stdin=stdin)
    newline = not no_newline
    options = RunOptions(text, given, system, raw, as_json, stream, stats, cache and expanded(cache), newline)
    with _model(load, host) as llm:
        _run(llm, options)


@app.command()
@grouped
def serve(
    load: LoadOptions,
    host: Annotated[str, typer.Option(help="Address to listen on.", callback=_unicode)] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0: a free one.", min=0, max=65535)] = 8000,
    parallel: Annotated[int | None, typer.Option(help="How many answers to compute at once. Default: 16.")] = None,
    cache_ram: Annotated[
        str | None,
        typer.Option(
            help="RAM for conversations that the KV cache has no room for, such as 8GiB. Default: four times the KV "
            "cache, at most an eighth of the free RAM; 0 with --cache-dir."
        ),
    ] = None,
    cache_dir: Annotated[
        Path | None,
        typer.Option(help="Directory for conversations: what was read is not read again, after a restart either."),
    ] = None,
    cache_disk: Annotated[
        str | None, typer.Option(help="Most bytes in --cache-dir. Default: 16GiB, or half of the free space.")
    ] = None,
    idle_unload: Annotated[
        str | None,
        typer.Option(help="Unload the model after this time without a request, such as 10m; the next one loads it."),
    ] = None,
    drain_timeout: Annotated[
        str, typer.Option(help="How long answers may go on after SIGTERM or Ctrl-C; a second one ends at once.")
    ] = "30s",
    api_key_file: Annotated[
        Path | None,
        typer.Option(help="File with keys, one a line; clients send one of them. $DSV2_API_KEY is a further one."),
    ] = None,
    allowed_host: Annotated[
        list[str] | None,
        typer.Option(help="A further name that the server answers to; can be repeated.", callback=_unicode),
    ] = None,
    cors_origin: Annotated[
        list[str] | None,
        typer.Option(
            help="A page of another server that may use this one, such as http://localhost:3000; can be repeated.",
            callback=_unicode,
        ),
    ] = None,
) -> None:
    """Answer over HTTP as OpenAI's, Anthropic's and Ollama's APIs do, and show a page at /."""
    from dsv2_local.commands.console import notice
    from dsv2_local.commands.process import held_signals

    if load.model is None:
        notice("using the bundled dsv2-nano; choose another model with -m or $DSV2_MODEL")
    with held_signals():
        try:
            import fastapi  # noqa: F401
            import uvicorn  # noqa: F401
        except ImportError as error:
            raise InputError(f"{error.name} is not installed; pip install 'dsv2-local[serve]'") from None
        from dsv2_local.commands import loading
        from dsv2_local.commands import serve as server

    unload = None if idle_unload is None else duration("--idle-unload", idle_unload)
    options = server.ServeOptions(
        host,
        port,
        unload,
        duration("--drain-timeout", drain_timeout),
        api_key_file,
        allowed_host or (),
        cors_origin or (),
    )
    ram = None if cache_ram is None else size("--cache-ram", cache_ram)
    disk = None if cache_disk is None else size("--cache-disk", cache_disk)

    def load_model() -> "LLM":
        return loading.load(**asdict(load), parallel=parallel, cache_ram=ram, cache_dir=cache_dir, cache_disk=disk)

    server.run(options, load.model or "dsv2-nano", load_model)


@session_commands.callback(invoke_without_command=True)
def list_sessions(invocation: typer.Context) -> None:
    """List saved chats, or delete some."""
    if invocation.invoked_subcommand is None:
        from dsv2_local.commands import sessions

        sessions.show()


@session_commands.command("delete")
def delete_sessions(
    names: Annotated[list[str], typer.Argument(help="Names as listed by `dsv2 sessions`.")],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Delete without asking.")] = False,
) -> None:
    """Delete saved chats."""
    from dsv2_local.commands import sessions

    sessions.check(names)
    if not yes and not sys.stdin.isatty():
        raise InputError("cannot ask, since standard input is not a terminal; add --yes to delete without asking")
    if yes or typer.confirm(f"Delete {', '.join(names)}?", err=True):
        sessions.delete(names)


@app.command()
def quantize(
    source: Annotated[str, typer.Argument(help="Release to convert: a directory of safetensors or a hub repository.")],
    destination: Annotated[str, typer.Argument(help="Directory for the converted model: a new or an empty one.")],
    recipe: Annotated[str, typer.Option(help="Formats of the weights: nf4, mixed, int8 or bf16.")] = "nf4",
    verify: Annotated[bool, typer.Option("--verify", help="Compare the result with the source afterwards.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing checkpoint.")] = False,
    revision: Annotated[
        str | None, typer.Option(help="Branch, tag or commit of a hub repository.", callback=_unicode)
    ] = None,
    token: Annotated[
        str | None, typer.Option(envvar="HF_TOKEN", help="Access token for gated repositories.", callback=_unicode)
    ] = None,
) -> None:
    """Convert a DeepSeek-V2 release to 4-bit weights. If interrupted, run the same command to continue."""
    from dsv2_local.commands import quantize
    from dsv2_local.quant.schema import Recipe

    if not destination:  # a Path would be the current directory
        raise InputError("the destination is empty; is a variable not set?")

    quantize.run(
        source,
        Path(destination),
        recipe=one_of("--recipe", recipe, Recipe),
        check=verify,
        force=force,
        revision=revision,
        token=token,
    )


@app.command()
def plan(
    model: Annotated[str, typer.Argument(help="deepseek-v2, deepseek-v2-lite, a config.json or a directory.")],
    recipe: Annotated[str | None, typer.Option(help="Formats of the weights: nf4, mixed, int8 or bf16.")] = None,
    vram: Annotated[str | None, typer.Option(help="Memory of each GPU: 24GiB, or 24GiB,24GiB; 0: no GPU.")] = None,
    ram: Annotated[
        str | None, typer.Option(help="RAM of the machine, such as 192GiB. Default: what is free here.")
    ] = None,
    context: Annotated[str | None, typer.Option(help="Maximum tokens of prompt and answer: 8192, or 128K.")] = None,
    cache_type: Annotated[str, typer.Option("--cache-type", help="Type of the KV cache: bf16, int8 or fp32.")] = "bf16",
    cache: Annotated[str | None, typer.Option("--cache", hidden=True)] = None,
    experts: Experts = "auto",
    parallel: Annotated[
        int | None, typer.Option(help="Maximum sequences that are computed in one step. Default: 16.")
    ] = None,
    rates: Annotated[
        str, typer.Option(help="Rates for the predicted speed, in GB/s and GFLOP/s: ram=80,link=25,vram=900.")
    ] = "",
    as_json: AsJson = False,
) -> None:
    """Show whether and how a model fits in memory, here or on another machine, before a download."""
    from dsv2_local.commands import plan
    from dsv2_local.commands.console import notice

    if cache is not None:
        notice("--cache is now called --cache-type")
    options = plan.PlanOptions(model, recipe, vram, ram, context, cache or cache_type, rates, experts, parallel)
    plan.run(options, as_json)


@app.command()
def inspect(
    model: Annotated[
        str | None, typer.Argument(envvar="DSV2_MODEL", help="Directory or hub repository. Default: dsv2-nano.")
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Compare all files of a converted model with their checksums.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Show a model's architecture, and the sizes of its weights and KV cache."""
    from dsv2_local.commands import inspect

    inspect.show(model, as_json, verify)


@app.command()
def bench(
    invocation: typer.Context,
    model: Model = None,
    random_weights: Annotated[
        str | None,
        typer.Option(help="Measure random weights: deepseek-v2, deepseek-v2-lite or a config.json."),
    ] = None,
    layers: Annotated[int | None, typer.Option(help="Measure only so many layers, and extrapolate.")] = None,
    prompt: Annotated[
        str | None, typer.Option(help="Prompt lengths in tokens. Default: 128,512 on the CPU, 512,4096 on GPUs.")
    ] = None,
    decode: Annotated[
        int | None,
        typer.Option(help="Tokens to decode at each context length. Default: 32 on the CPU, 64 on GPUs."),
    ] = None,
    context: Annotated[
        str | None, typer.Option(help="Context lengths at which to decode, in tokens. Default: 0,4096,32768.")
    ] = None,
    parallel: Annotated[
        str | None,
        typer.Option(help="Numbers of sequences to decode in common steps, at the first context. Default: 1,4,16."),
    ] = None,
    device: DeviceNames = "auto",
    experts: Experts = "auto",
    vram: Vram = None,
    cache_type: CacheType = "bf16",
    threads: Threads = None,
    recipe: Annotated[
        str | None, typer.Option(help="Formats of random weights: nf4, mixed, int8 or bf16. Default: nf4.")
    ] = None,
    as_json: AsJson = False,
    trace: Annotated[
        Path | None,
        typer.Option(help="Offloaded experts: decode with the routing of this trace, so that hits are a real text's."),
    ] = None,
    record_trace: Annotated[
        Path | None,
        typer.Option(help="Instead of measuring, write the experts that each token of a text uses to this file."),
    ] = None,
    text: Annotated[
        Path | None, typer.Option(help="With --record-trace: file with the text. Default: standard input.")
    ] = None,
) -> None:
    """Measure how fast this machine runs a model, or would run one that is not downloaded."""
    from dsv2_local.commands import bench
    from dsv2_local.commands.loading import vram_limits
    from dsv2_local.llm import CACHE_DTYPES
    from dsv2_local.offload.plan_request import Mode
    from dsv2_local.quant.schema import Recipe

    source = invocation.get_parameter_source("model")
    if random_weights is not None and source is not None and source.name == "ENVIRONMENT":
        model = None  # $DSV2_MODEL is only a default
    chosen = None if recipe is None else one_of("--recipe", recipe, Recipe)
    cache_dtype = one_of("--cache-type", cache_type, CACHE_DTYPES)
    options = bench.BenchOptions(
        model, random_weights, layers, prompt, decode, context, threads, chosen, cache_dtype,
        device, one_of("--experts", experts, Mode), vram_limits(vram), trace, parallel,
    )  # fmt: skip
    if record_trace is not None:
        bench.record_trace(options, record_trace, text)
        return
    bench.run(options, as_json)


def _load(options: LoadOptions, begun: Callable[[], None] = lambda: None, **more: Any) -> "LLM":
    """Load a model. Something is on the screen before torch is imported; `begun` is called after that.

    `more` are options of `commands.loading.load` that not every command has.
    """
    from dsv2_local.commands.console import notice, waiting
    from dsv2_local.commands.process import held_signals

    if options.model is None:
        notice("using the bundled dsv2-nano; choose another model with -m or $DSV2_MODEL")
    with waiting(f"loading {options.model or 'dsv2-nano'} ..."):
        begun()
        with held_signals():
            from dsv2_local.commands.loading import load

        return load(**asdict(options), **more)


def _model(options: LoadOptions, host: str | None, begun: Callable[[], None] = lambda: None) -> "LLM | RemoteLLM":
    """The model of a server, or one that is loaded for a single answer at a time; `begun` as for `_load`."""
    if not host:
        return _load(options, begun, parallel=1)
    from dsv2_local.commands.remote import RemoteLLM

    usual = LoadOptions(model=options.model)  # another name is no harm: the server has one model
    if given := [field.name for field in fields(options) if getattr(options, field.name) != getattr(usual, field.name)]:
        name = given[0].replace("_", "-")
        raise InputError(f"--{name} is for loading a model, and the server (--host, $DSV2_HOST) has loaded its own")
    begun()
    return RemoteLLM(host)


def _run(llm: "LLM | RemoteLLM", options: "RunOptions") -> None:
    from dsv2_local.commands import run

    run.run(llm, options, sys.stdout)


def _run_batch(load: LoadOptions, options: "BatchOptions", parallel: int | None) -> None:
    from dsv2_local.commands.batch import Batch

    with Batch(options) as batch:
        if not batch.is_complete():
            with _load(load, parallel=parallel, batch_invariant=True) as llm:
                batch.run(llm)
        code = batch.end()
    raise typer.Exit(code)


def main() -> None:
    """Run the command; it ends with its exit code, and with one line on stderr if it fails."""
    from dsv2_local.commands import process

    process.run(app)
