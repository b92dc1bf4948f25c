"""Train dsv2-nano, the small DeepSeek-V2 that ships with dsv2-local, on a CPU and from WordNet alone.

    python tools/train_nano.py --wordnet /usr/share/wordnet --out DIR --minutes 88 [--resume DIR/latest]

The script writes to DIR: ``early/`` (untrained weights), ``latest/`` (updated every five minutes) and ``final/``, which
are checkpoints in the layout of the Hugging Face hub, and ``heldout.jsonl`` and ``log.jsonl``. The learning rate
depends on the elapsed time and not on the step count, so that a busy machine trains on fewer tokens but ends on
schedule. With glibc, keeping freed memory saves a fifth of the time: MALLOC_ARENA_MAX=1 MALLOC_MMAP_MAX_=0
MALLOC_TRIM_THRESHOLD_=17179869184 MALLOC_TOP_PAD_=268435456
"""

from __future__ import annotations

import argparse
import json
import math
import random
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from nano_data import BOS, EOS, Conversation, Corpus, held_out_conversations, pass_over, render
from nano_model import Nano, NanoConfig
from nano_wordnet import WORDNET_NOTICE
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn

CHECKPOINT_SECONDS = 300
SAMPLE_WORDS = (
    "a violin",
    "a dog",
    "an apple",
    "water",
    "a doctor",
    "a bicycle",
    "Paris",
    "anger",
    "a river",
    "a chair",
)
SAMPLE_QUESTIONS = (*(f"What is {word}?" for word in SAMPLE_WORDS), "Who are you?", "Hello")

CHAT_TEMPLATE = (
    "{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}"
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ 'User: ' + message['content'] + '\n\n' }}{% elif message['role'] == 'assistant' %}"
    "{{ 'Assistant: ' + message['content'] + eos_token }}{% elif message['role'] == 'system' %}"
    "{{ message['content'] + '\n\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)

MIT_LICENSE = """MIT License

Copyright (c) 2026 the dsv2-local contributors

Permission is hereby granted, free of charge, to any person obtaining a copy of this software and associated
documentation files (the "Software"), to deal in the Software without restriction, including without limitation the
rights to use, copy, modify, merge, publish, distribute, sublicense, and/or sell copies of the Software, and to permit
persons to whom the Software is furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all copies or substantial portions of the
Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT NOT LIMITED TO THE
WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR
COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR
OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
"""


# ---- tokenizer and batches -------------------------------------------------------------------------------------------


def train_tokenizer(texts: Iterator[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE. It adds no special tokens when it encodes: the chat template writes the BOS."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


@dataclass(frozen=True)
class Example:
    """A conversation as inputs and next-token targets; tokens of questions have target -100, so they cost no loss."""

    inputs: list[int]
    targets: list[int]


def encode(tokenizer: Tokenizer, conversations: list[Conversation], limit: int) -> list[Example]:
    """Tokenize question and answer separately, to know which tokens are answers; cut after ``limit`` tokens."""
    pieces = [piece for conversation in conversations for piece in conversation.pieces]
    encodings = iter(tokenizer.encode_batch([text for text, _ in pieces]))
    examples = []
    for conversation in conversations:
        tokens: list[int] = []
        targets: list[int] = []
        for _, is_answer in conversation.pieces:
            ids = next(encodings).ids
            tokens += ids
            targets += ids if is_answer else [-100] * len(ids)
        examples.append(Example(tokens[:-1][:limit], targets[1:][:limit]))
    return examples


@dataclass(frozen=True)
class Batch:
    """Packed conversations, all [B, T]; padding has document -1 and target -100."""

    tokens: Tensor
    targets: Tensor
    positions: Tensor
    documents: Tensor


def pack(examples: list[Example], length: int, open_rows: int = 32) -> list[list[Example]]:
    """Pack examples into rows of ``length`` tokens, first-fit over the latest ``open_rows`` rows."""
    rows: list[list[Example]] = []
    room: list[int] = []
    for example in examples:
        size = len(example.inputs)
        for i in range(max(0, len(rows) - open_rows), len(rows)):
            if room[i] >= size:
                rows[i].append(example)
                room[i] -= size
                break
        else:
            rows.append([example])
            room.append(length - size)
    return rows


def collate(rows: list[list[Example]], length: int) -> Batch:
    """Turn rows into tensors; positions start at 0 in each conversation."""
    shape = (len(rows), length)
    tokens, positions = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
    targets, documents = torch.full(shape, -100), torch.full(shape, -1)
    for r, row in enumerate(rows):
        start = 0
        for d, example in enumerate(row):
            span = slice(start, start + len(example.inputs))
            tokens[r, span] = torch.tensor(example.inputs)
            targets[r, span] = torch.tensor(example.targets)
            positions[r, span] = torch.arange(len(example.inputs))
            documents[r, span] = d
            start = span.stop
    return Batch(tokens, targets, positions, documents)


def batches(corpus: Corpus, tokenizer: Tokenizer, batch_tokens: int, lengths: tuple[int, int]) -> Iterator[Batch]:
    """Yield batches forever; every pass over the corpus uses new phrasings.

    Short conversations are packed into rows of the first of ``lengths``, longer ones into rows of the second.
    """
    short, long = lengths
    seed = 0
    while True:
        rng = random.Random(seed)
        examples = encode(tokenizer, list(pass_over(corpus.topics, seed)), long)
        rng.shuffle(examples)
        planned = []
        for length in lengths:
            fitting = [e for e in examples if (len(e.inputs) <= short) == (length == short)]
            rows = pack(fitting, length)
            rng.shuffle(rows)
            size = batch_tokens // length
            planned += [(rows[i : i + size], length) for i in range(0, len(rows) - size + 1, size)]
        rng.shuffle(planned)
        for rows, length in planned:
            yield collate(rows, length)
        seed += 1


# ---- training --------------------------------------------------------------------------------------------------------


def answer_loss(model: Nano, batch: Batch, reduction: str = "mean") -> Tensor:
    """Cross-entropy over the tokens of the answers, end-of-sentence tokens included."""
    hidden = model(batch.tokens, batch.positions, batch.documents)
    wanted = batch.targets != -100
    logits = F.linear(hidden[wanted], model.embed_tokens.weight)  # [N, vocab]
    return F.cross_entropy(logits.float(), batch.targets[wanted], reduction=reduction)


def learning_rate(step: int, done: float, peak: float, warmup: int = 100) -> float:
    """Linear warm-up over steps, times linear decay to 0 over time; ``done`` is the fraction of time elapsed."""
    return peak * min(1.0, (step + 1) / warmup) * max(0.0, 1.0 - done)


def make_optimizer(model: Nano) -> torch.optim.AdamW:
    """AdamW, with weight decay on matrices only."""
    matrices = [p for p in model.parameters() if p.dim() == 2]
    norms = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": norms, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)


@dataclass
class TrainingProgress:
    """The values in the log and in the final metrics."""

    step: int = 0
    tokens: int = 0
    answer_tokens: int = 0
    seconds: float = 0.0
    loss: float = 0.0
    balance: float = 0.0
    least_load: float = 0.0  # load of the least used expert, relative to an even load


def train_step(model: Nano, optimizer: torch.optim.AdamW, batch: Batch, rate: float) -> tuple[float, float]:
    """Update float32 weights once, in bfloat16 autocast; returns the loss, and the mean balance loss (1: even)."""
    with torch.autocast("cpu", torch.bfloat16):
        loss = answer_loss(model, batch)
    mixtures = model.mixtures()
    balance = torch.stack([mixture.balance_loss for mixture in mixtures]).sum()
    (loss + mixtures[0].config.aux_loss_alpha * balance).backward()  # type: ignore[no-untyped-call]
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.item(), balance.item() / len(mixtures)


def train(
    model: Nano, stream: Iterator[Batch], save: Callable[[str], None], args: argparse.Namespace
) -> TrainingProgress:
    """Train for ``args.minutes``; ``save(name)`` writes a checkpoint, and is called every five minutes."""
    optimizer, progress = make_optimizer(model), TrainingProgress()
    start, saved = time.monotonic(), 0.0
    loads = torch.zeros(len(model.mixtures()), NanoConfig.n_routed_experts)
    with (args.out / "log.jsonl").open("w") as log:
        while (seconds := time.monotonic() - start) < args.minutes * 60:
            batch = next(stream)
            rate = learning_rate(progress.step, seconds / (args.minutes * 60), args.peak_rate)
            loss, balance = train_step(model, optimizer, batch, rate)
            loads = 0.98 * loads + 0.02 * torch.stack([mixture.load for mixture in model.mixtures()])
            blend = 0.98 if progress.step else 0.0
            progress.step, progress.seconds = progress.step + 1, seconds
            progress.tokens += int((batch.documents >= 0).sum())
            progress.answer_tokens += int((batch.targets != -100).sum())
            progress.loss, progress.balance = blend * progress.loss + (1 - blend) * loss, balance
            if progress.step % 25 == 0:
                progress.least_load = float((loads / loads.mean(1, keepdim=True)).min())
                log.write(json.dumps(asdict(progress) | {"rate": rate}) + "\n")
                log.flush()
            if seconds - saved > CHECKPOINT_SECONDS:
                save("latest")
                saved = seconds
    progress.seconds = time.monotonic() - start
    return progress


# ---- evaluation and output -------------------------------------------------------------------------------------------


@torch.no_grad()
def perplexity(model: Nano, examples: list[Example]) -> float:
    """Perplexity per answer token, in float32."""
    total, count = 0.0, 0
    for example in examples:
        batch = collate([[example]], len(example.inputs))
        total += answer_loss(model, batch, "sum").item()
        count += int((batch.targets != -100).sum())
    return math.exp(total / count)


@torch.no_grad()
def answer(model: Nano, tokenizer: Tokenizer, question: str, limit: int = 60) -> str:
    """Answer one question with greedy decoding."""
    prompt = render([(question, "")]).pieces[0][0]
    tokens = tokenizer.encode(prompt).ids
    prompt_length, end = len(tokens), tokenizer.token_to_id(EOS)
    while len(tokens) < prompt_length + limit and tokens[-1] != end:
        row = torch.tensor([tokens])
        hidden = model(row, torch.arange(len(tokens))[None], torch.zeros_like(row))
        tokens.append(int(F.linear(hidden[0, -1], model.embed_tokens.weight).argmax()))
    return tokenizer.decode(tokens[prompt_length:]).strip()


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON, without escaping non-ASCII characters."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def save_checkpoint(model: Nano, tokenizer: Tokenizer, config: NanoConfig, folder: Path) -> None:
    """Write a checkpoint in the hub's layout, as bfloat16; a rename at the end makes it visible as a whole."""
    fresh = folder.with_name(folder.name + ".new")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    tensors = {f"model.{name}": value.to(torch.bfloat16).contiguous() for name, value in model.state_dict().items()}
    save_file(tensors, fresh / "model.safetensors", {"format": "pt"})
    write_json(fresh / "config.json", config.hub())
    write_json(fresh / "generation_config.json", {"bos_token_id": 0, "eos_token_id": 1, "do_sample": False})
    tokenizer.save(str(fresh / "tokenizer.json"), pretty=False)
    write_json(
        fresh / "tokenizer_config.json",
        {
            "add_bos_token": True,
            "add_eos_token": False,
            "bos_token": BOS,
            "eos_token": EOS,
            "pad_token": EOS,
            "clean_up_tokenization_spaces": False,
            "model_max_length": config.max_position_embeddings,
            "tokenizer_class": "PreTrainedTokenizerFast",
            "chat_template": CHAT_TEMPLATE,
        },
    )
    (fresh / "LICENSE").write_text(MIT_LICENSE, encoding="utf-8")
    (fresh / "NOTICE").write_text(WORDNET_NOTICE, encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    fresh.rename(folder)


def load_weights(model: Nano, folder: Path) -> None:
    """Load the weights of a checkpoint that ``save_checkpoint`` wrote; the optimizer's state is not restored."""
    tensors = load_file(folder / "model.safetensors")
    model.load_state_dict({name.removeprefix("model."): value.float() for name, value in tensors.items()})


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description="Train dsv2-nano from WordNet.")
    parser.add_argument("--wordnet", type=Path, required=True, help="folder with WordNet's database files")
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoints and the log")
    parser.add_argument("--minutes", type=float, default=88.0, help="wall-clock duration of the training")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--batch-tokens", type=int, default=4096, help="tokens per step, padding included")
    parser.add_argument("--resume", type=Path, help="checkpoint folder whose weights and tokenizer to continue from")
    parser.add_argument("--peak-rate", type=float, default=2e-3, help="learning rate after the warm-up")
    return parser.parse_args()


def main() -> None:
    """Build the corpus and the tokenizer, train, and write the final checkpoint with its metrics."""
    args, config = parse_arguments(), NanoConfig()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    corpus = Corpus(args.wordnet)
    held_out = held_out_conversations(corpus)
    lines = [json.dumps({"text": talk.text}, ensure_ascii=False) + "\n" for talk in held_out]
    (args.out / "heldout.jsonl").write_text("".join(lines), encoding="utf-8")
    model = Nano(config)
    if args.resume:
        tokenizer = Tokenizer.from_file(str(args.resume / "tokenizer.json"))
        load_weights(model, args.resume)
    else:
        tokenizer = train_tokenizer((talk.text for talk in pass_over(corpus.topics, 0)), config.vocab_size)

    def save(name: str) -> None:
        save_checkpoint(model, tokenizer, config, args.out / name)

    save("early")
    stream = batches(corpus, tokenizer, args.batch_tokens, (128, 512))
    progress = train(model, stream, save, args)
    save("latest")
    model.to(torch.bfloat16).float()  # so that the metrics are those of the saved weights
    limit = config.rope_scaling["original_max_position_embeddings"]
    metrics = asdict(progress) | {
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "held_out_perplexity": perplexity(model, encode(tokenizer, held_out, limit)),
        "answers": {question: answer(model, tokenizer, question) for question in SAMPLE_QUESTIONS},
    }
    save("final")
    write_json(args.out / "final" / "metrics.json", metrics)


if __name__ == "__main__":
    main()
