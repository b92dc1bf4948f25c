"""Converts a random checkpoint in V2-Lite's shape: measures speed and peak memory, and resumes after random kills.

    python benchmarks/convert.py DIRECTORY [--layers 3] [--kills 10] [--recipe nf4]

DIRECTORY must not exist or must be empty. It takes 5 GB with three layers and 40 GB with all 27; the files are deleted
at the end. Loading is timed from the start of a process to its first token, with the files in the page cache. Prints
one JSON object; exits with a non-zero status if a resumed conversion differs from an uninterrupted one.
"""

import argparse
import hashlib
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from safetensors.torch import save_file

from dsv2_local.architectures.config import ModelConfig
from dsv2_local.architectures.families import parse_config
from dsv2_local.quant.schema import parameters, source_shapes

LITE: dict[str, Any] = {
    "model_type": "deepseek_v2", "vocab_size": 102400, "hidden_size": 2048, "intermediate_size": 10944,
    "moe_intermediate_size": 1408, "num_attention_heads": 16, "kv_lora_rank": 512, "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64, "v_head_dim": 128, "max_position_embeddings": 163840, "n_routed_experts": 64,
    "n_shared_experts": 2, "num_experts_per_tok": 6, "first_k_dense_replace": 1,
}  # fmt: skip
SHARD_BYTES = 1 << 30


def write_source(directory: Path, layers: int) -> ModelConfig:
    """Write Gaussian weights in bf16, in shards of 1 GiB; all tensors repeat one random block."""
    directory.mkdir(parents=True)
    raw = {**LITE, "num_hidden_layers": layers}
    (directory / "config.json").write_text(json.dumps(raw))
    config = parse_config(raw)
    block = (torch.randn(1 << 22, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()
    index: dict[str, str] = {}
    shard: dict[str, torch.Tensor] = {}
    number = 1

    for name, shape in source_shapes(config).items():
        if sum(tensor.nbytes for tensor in shard.values()) > SHARD_BYTES:
            save_file(shard, directory / f"model-{number:05d}.safetensors")
            shard, number = {}, number + 1
        index[name] = f"model-{number:05d}.safetensors"
        count = torch.Size(shape).numel()
        shard[name] = block.repeat(-(-count // len(block)))[:count].view(shape)
    save_file(shard, directory / f"model-{number:05d}.safetensors")
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return config


def command(source: Path, destination: Path, recipe: str) -> list[str]:
    """The command line of a conversion."""
    code = "from dsv2_local.cli import main; main()"
    return [sys.executable, "-c", code, "quantize", str(source), str(destination), "--recipe", recipe]


def measure(args: list[str]) -> dict[str, float]:
    """Run a process to its end -> wall and CPU seconds, peak resident bytes.

    The peak is VmHWM, polled, because ru_maxrss would include the memory of this process at the time of the fork.
    """
    before, start, peak = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter(), 0
    with subprocess.Popen(args, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None:
            status = Path(f"/proc/{process.pid}/status").read_text()
            peak = max(peak, *(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")), 0)
            time.sleep(0.02)
    seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    if process.returncode:
        sys.exit(f"{args} failed")
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"seconds": seconds, "cpu_seconds": cpu, "peak_rss_bytes": peak * 1024}


def first_token_seconds(directory: Path) -> float:
    """Median time of five processes, after one that reads the files into the page cache."""
    code = (
        f"import dsv2_local; next(dsv2_local.load({str(directory)!r}, context=4096).generate([1, 2, 3], max_tokens=1))"
    )
    runs = [measure([sys.executable, "-c", code])["seconds"] for _ in range(6)]
    return median(runs[1:])


def killed_run(args: list[str], after: float) -> bool:
    """Start a process and kill it after `after` seconds with SIGKILL -> whether it was still running."""
    with subprocess.Popen(args, stderr=subprocess.DEVNULL) as process:
        try:
            process.wait(after)
        except subprocess.TimeoutExpired:
            process.kill()
            return True
    return False


def digests(directory: Path) -> dict[str, str]:
    """The sha256 of each file."""
    found = {}
    for path in directory.iterdir():
        with path.open("rb") as file:
            found[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def kill_and_resume(source: Path, directory: Path, recipe: str, kills: int, seconds: float) -> list[bool]:
    """Convert repeatedly with `kills` kills at random moments -> whether each result has the expected bytes.

    `seconds` is the duration of a whole conversion; kills are spread over all of it.
    """
    whole, again, same, done = directory / "whole", directory / "again", [], 0
    expected = digests(whole)
    while done < kills or (again / ".partial").exists():
        if done < kills and killed_run(command(source, again, recipe), random.uniform(1, seconds)):
            done += 1
            continue
        if not (again / "manifest.json").exists():
            subprocess.run(command(source, again, recipe), check=True, stderr=subprocess.DEVNULL)
        same.append(digests(again) == expected)
        shutil.rmtree(again)
    return same


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="new or empty directory for the model and its conversions")
    parser.add_argument("--layers", type=int, default=3, help="layers of the model (default: 3)")
    parser.add_argument("--kills", type=int, default=10, help="number of kills (default: 10)")
    parser.add_argument("--recipe", default="nf4", help="recipe of the conversion (default: nf4)")
    args = parser.parse_args()
    source, whole = args.directory / "source", args.directory / "whole"
    weights = parameters(write_source(source, args.layers))
    measured = measure(command(source, whole, args.recipe))
    loading = first_token_seconds(whole)
    size = sum(path.stat().st_size for path in whole.iterdir())
    same = kill_and_resume(source, args.directory, args.recipe, args.kills, measured["seconds"])
    cores = len(os.sched_getaffinity(0))
    report = {
        "source_bytes": 2 * weights,
        "stored_bytes": size,
        "bits_per_weight": round(8 * size / weights, 3),
        **{name: round(value, 2) for name, value in measured.items()},
        "cores": cores,
        "weights_per_second_per_core": round(weights / measured["seconds"] / cores),
        "seconds_to_first_token": round(loading, 2),
        "kills": args.kills,
        "conversions_finished_after_kills": len(same),
        "identical": all(same),
    }
    print(json.dumps(report, indent=2))
    shutil.rmtree(source)
    shutil.rmtree(whole)
    sys.exit(not all(same))


if __name__ == "__main__":
    main()
