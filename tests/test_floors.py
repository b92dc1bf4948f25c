"""A module imports only from lower floors (docs/design.md), and the heavy libraries only where they belong."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "dsv2_local"
FLOORS = [
    {"__init__", "config", "errors", "machine", "measured", "numa", "released", "sizes"},
    {"kernels.format", "kernels.layout", "kernels.latents", "pages", "cache", "rope", "kernels.reference"}
    | {"kernels.cpu.recording", "kernels.cpu", "kernels.ops", "kernels.graphs", "kernels.triton.tuning"}
    | {"kernels.triton.dequantize", "kernels.triton.linear", "kernels.triton.experts", "kernels.triton.rows"}
    | {"kernels.triton.likely", "kernels.triton.latents", "kernels.triton.attention", "kernels.triton", "kernels.bnb"},
    {"quant.schema", "quant.nf4", "quant.int8", "quant.quantize", "quant.checkpoint"}
    | {"quant.source", "quant.pieces", "quant.convert", "quant.verify", "quant.hub"},
    {"offload.lru", "offload.trace", "offload.plan", "offload.store", "random_weights", "offload.device"}
    | {"offload.stand_in", "offload.cuda", "offload.slots", "offload.split", "offload.pairs", "offload.stream"}
    | {"offload.schedule", "offload.captured", "offload.calibration", "offload.favourites"},
    {"model", "graph_step", "sampling", "tokenizer", "lookup"},
    {"engine", "placement", "saved"},
    {"llm"},
    {"chat", "pipe", "inspection", "planning", "quantizing", "markdown", "console"}
    | {"conversation", "shortening", "sessions"}
    | {"bench.hardware", "bench.request", "bench.timing", "bench.subject", "bench.report"}
    | {"bench.tracing", "bench"},
    {"cli"},
]
# Within a floor, in the order in which they may import each other; elsewhere a floor's modules are strangers.
ORDERED = [
    ["errors", "config", "released", "__init__"],
    ["errors", "machine", "numa"],
    ["machine", "measured"],
    ["errors", "sizes"],
    [
        "kernels.format",
        "kernels.layout",
        "kernels.latents",
        "rope",
        "kernels.reference",
        "kernels.bnb",
        "kernels.cpu.recording",
        "kernels.cpu",
        "kernels.ops",
    ],
    ["kernels.format", "kernels.latents", "pages", "cache"],
    ["sampling", "lookup", "model", "graph_step"],
    [
        "kernels.format",
        "kernels.layout",
        "kernels.triton.dequantize",
        "kernels.triton.tuning",
        "kernels.triton.linear",
        "kernels.triton.experts",
        "kernels.triton.rows",
        "kernels.triton.likely",
        "kernels.triton.latents",
        "kernels.triton.attention",
        "kernels.triton",
        "kernels.ops",
    ],
    ["quant.schema", "quant.nf4", "quant.int8", "quant.checkpoint", "quant.source", "quant.pieces"],
    ["quant.schema", "quant.checkpoint", "quant.source", "quant.pieces", "quant.convert", "quant.verify"],
    ["quant.nf4", "quant.int8", "quant.quantize", "quant.convert"],
    ["quant.checkpoint", "quant.hub"],
    ["console", "markdown", "conversation", "shortening", "sessions", "pipe", "chat"],
    ["console", "quantizing"],
    ["console", "planning"],
    ["offload.lru", "offload.trace"],
    ["offload.device", "offload.stand_in"],
    ["offload.device", "offload.cuda"],
    ["offload.device", "offload.store"],
    ["offload.device", "offload.lru", "offload.slots", "offload.calibration"],
    ["offload.split", "offload.calibration"],
    ["offload.lru", "offload.favourites"],
    ["offload.lru", "offload.device", "offload.slots", "offload.stream", "offload.captured", "offload.schedule"],
    ["offload.split", "offload.pairs", "offload.plan", "offload.schedule"],
    [
        "console",
        "inspection",
        "pipe",
        "bench.hardware",
        "bench.request",
        "bench.timing",
        "bench.subject",
        "bench.report",
        "bench.tracing",
        "bench",
    ],
]


def modules() -> dict[str, Path]:
    walked = os.walk(ROOT, followlinks=True)
    files = [Path(folder) / name for folder, _, names in walked for name in names if name.endswith(".py")]
    names = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in files}
    return {name.removesuffix(".__init__"): path for name, path in names.items()}


def test_every_folder_is_looked_at():
    assert {"kernels.ops", "quant.convert", "offload.store", "cli", "model"} <= set(modules())


def imports(path: Path) -> set[str]:
    """The modules of this package that a file names in its imports, wherever they stand in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("dsv2_local"):
            base = node.module.removeprefix("dsv2_local").lstrip(".")
            for alias in node.names:
                name = f"{base}.{alias.name}".lstrip(".")
                found.add(name if name in modules() else base or "__init__")
        elif isinstance(node, ast.Import):
            names = (alias.name for alias in node.names if alias.name.startswith("dsv2_local."))
            found.update(name.removeprefix("dsv2_local.") for name in names)
    return found


def floor_of(module: str) -> int:
    found = [number for number, floor in enumerate(FLOORS) if module in floor]
    assert found, f"{module} stands on no floor: give it one here and in docs/design.md"
    return found[0]


def allowed(module: str, imported: str) -> bool:
    if floor_of(imported) < floor_of(module):
        return True
    return any(
        module in order and imported in order and order.index(imported) < order.index(module) for order in ORDERED
    )


@pytest.mark.parametrize("module", [name for name in modules() if name != "__init__"])
def test_imports_go_down(module):
    upwards = {name for name in imports(modules()[module]) if not allowed(module, name)}
    assert not upwards, f"{module} imports {upwards}"


def test_the_policy_and_the_formats_know_nothing_of_terminals():
    for name, path in modules().items():
        if floor_of(name) < floor_of("chat"):
            assert "rich" not in path.read_text().replace("enrich", ""), name


@pytest.mark.parametrize("command", [["--help"], ["run", "--help"], ["chat", "--help"], ["quantize", "--help"]])
def test_help_imports_no_torch(command):
    code = (
        "import sys\n"
        f"sys.argv = ['dsv2', *{command!r}]\n"
        "from dsv2_local.cli import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'transformers', 'tokenizers', 'huggingface_hub', 'prompt_toolkit'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Usage" in done.stdout
