"""`dsv2 inspect`: a model's architecture and the sizes of its parts, from its configuration and manifest alone."""

import math
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from dsv2_local.architectures.config import ModelConfig
from dsv2_local.architectures.families import load_config
from dsv2_local.architectures.tensors import Kind, TensorSpec
from dsv2_local.commands.console import ProgressBar, format_bytes, json_text, report_console
from dsv2_local.llm import bundled_model
from dsv2_local.quant import checksums, hub
from dsv2_local.quant.checkpoint import Manifest, is_checkpoint
from dsv2_local.quant.local import require_config
from dsv2_local.quant.schema import Recipe, dense_files, expert_layout, stored_bytes
from dsv2_local.runtime.cache import bytes_per_token

CONTEXTS = (8_192, 32_768, 131_072)


@dataclass
class KindSummary:
    """Sums over all tensors of one kind; `tensors` counts stored matrices and norms."""

    tensors: int = 0
    parameters: int = 0
    bytes: int = 0
    format: str = ""


def summarise(config: ModelConfig, recipe: Recipe) -> dict[Kind, KindSummary]:
    """Tensors, parameters and stored bytes by kind; routers and norms count 16 bits per weight."""
    kinds: dict[Kind, KindSummary] = {}
    for specs in dense_files(config).values():
        for spec in specs:
            _add(kinds.setdefault(spec.kind, KindSummary()), spec, recipe)
    layout, experts = expert_layout(config, recipe), len(config.moe_layers) * config.n_routed_experts
    if experts:
        size = sum(math.prod(shape) for shape in layout.shapes.values())
        kinds[Kind.ROUTED] = KindSummary(3 * experts, size * experts, layout.nbytes * experts, layout.format)
    return kinds


def _add(summary: KindSummary, spec: TensorSpec, recipe: Recipe) -> None:
    count = math.prod(spec.shape)
    format = recipe.format_of(spec.kind) if spec.quantised else None
    summary.tensors += 1
    summary.parameters += count
    summary.bytes += stored_bytes(spec, recipe)
    summary.format = format or "as released"


def describe(directory: Path) -> dict[str, Any]:
    """Everything that `dsv2 inspect` shows, as plain values: the object that --json prints."""
    config = load_config(directory)
    manifest = Manifest.load(directory) if is_checkpoint(directory) else None
    recipe = manifest.recipe if manifest else Recipe.NF4
    kinds = summarise(config, recipe)
    layout = expert_layout(config, recipe)
    return {
        "directory": str(directory),
        "converted": manifest is not None,
        "recipe": recipe,
        "source": manifest.source if manifest else None,
        "architecture": asdict(config),
        "parameters": sum(kind.parameters for kind in kinds.values()),
        "bytes": sum(kind.bytes for kind in kinds.values()),
        "kinds": {str(name): asdict(kind) for name, kind in kinds.items()},
        "recipes": {str(r): sum(kind.bytes for kind in summarise(config, r).values()) for r in Recipe},
        "expert_bytes": layout.nbytes if config.moe_layers else 0,
        "expert_bytes_per_token": layout.nbytes * config.num_experts_per_tok * len(config.moe_layers),
        "cache_bytes_per_token": bytes_per_token(config),
    }


def show(model: str | None, as_json: bool, verify: bool = False) -> None:
    """Describe a directory or hub repository (None: the bundled model) on stdout.

    `verify`: compare all files with the checksums of the conversion first.

    Raises:
        CheckpointError: with `verify`, the model is not converted, or files differ from their checksums.
        ConfigError: it has no config.json, or one that is not supported.
    """
    directory = bundled_model() if model is None else _directory(model, verify)
    require_config(directory)
    if verify:
        with ProgressBar("comparing files with their checksums") as progress:
            checksums.verify(directory, progress)
    facts = describe(directory) | ({"verified": True} if verify else {})
    if as_json:
        sys.stdout.write(json_text(facts, indent=2) + "\n")
        return
    console = report_console()
    console.print(_heading(facts), markup=False, soft_wrap=True)
    for table in (_architecture(facts), _tensors(facts), _memory(facts)):
        console.print(table)
    sys.stdout.flush()


def _directory(model: str, verify: bool) -> Path:
    """The model's directory; with `verify` its weights are fetched too, but not those of a release."""
    return hub.resolve_converted(model) if verify else hub.resolve(model, hub.DESCRIPTION)


def _heading(facts: dict[str, Any]) -> str:
    if facts["converted"]:
        checked = "; all files match their checksums" if "verified" in facts else ""
        return f"{facts['directory']}: converted from {facts['source']}, recipe {facts['recipe']}{checked}"
    return f"{facts['directory']}: not converted; the sizes are those after `dsv2 quantize` with recipe nf4"


def _architecture(facts: dict[str, Any]) -> Table:
    table = Table("config.json", "value", title="Architecture", title_justify="left")
    for name, value in facts["architecture"].items():
        shown = ", ".join(f"{k} {v:g}" for k, v in value.items()) if isinstance(value, dict) else str(value)
        table.add_row(name, shown)
    return table


def _tensors(facts: dict[str, Any]) -> Table:
    table = Table("kind", "tensors", "parameters", "format", "bits each", "size", title="Weights", title_justify="left")
    for column in (1, 2, 4, 5):
        table.columns[column].justify = "right"
    for name, kind in facts["kinds"].items():
        table.add_row(name, f"{kind['tensors']:,}", f"{kind['parameters']:,}", kind["format"], *_size(kind))
    total = {"bytes": facts["bytes"], "parameters": facts["parameters"]}
    table.add_section()
    table.add_row("all", "", f"{facts['parameters']:,}", "", *_size(total))
    return table


def _memory(facts: dict[str, Any]) -> Table:
    table = Table("", "size", title="Memory", title_justify="left")
    table.columns[1].justify = "right"
    table.add_row("one routed expert", format_bytes(facts["expert_bytes"]))
    table.add_row("routed experts read per token", format_bytes(facts["expert_bytes_per_token"]))
    per_token = facts["cache_bytes_per_token"]
    table.add_row("KV cache per token (bf16)", f"{per_token:,} B")
    limit = facts["architecture"]["max_position_embeddings"]
    for context in (*(context for context in CONTEXTS if context < limit), limit):
        table.add_row(f"KV cache of {context:,} tokens (bf16)", format_bytes(per_token * context))
    for recipe, size in facts["recipes"].items():
        table.add_row(f"weights as {recipe}", format_bytes(size))
    return table


def _size(kind: dict[str, int]) -> tuple[str, str]:
    return f"{kind['bytes'] * 8 / kind['parameters']:.2f}", format_bytes(kind["bytes"])
