"""Offloaded experts on simulated devices: the same result whatever is copied, late or failing."""

import os
import random
import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dsv2_local.errors import DeviceError
from dsv2_local.kernels import cpu, ops
from dsv2_local.kernels.format import ExpertLayout, Format
from dsv2_local.kernels.layout import expert_matrices
from dsv2_local.offload.balance import Costs
from dsv2_local.offload.expert_cache import ExpertCache, Policy
from dsv2_local.offload.expert_slots import ExpertSlots
from dsv2_local.offload.offloaded_experts import DeviceExperts, OffloadedExperts
from dsv2_local.offload.plan_request import Mode
from dsv2_local.offload.simulated_device import SimulatedDevice

pytestmark = pytest.mark.skipif(cpu.kernels() is None, reason="the reference rounds one token and many differently")

LAYOUT = ExpertLayout(Format.NF4, 64, 64)
EXPERTS, LAYERS, PER_TOKEN = 12, 5, 3
EVEN = Costs(fetch=1.0, read=1.0, token=0.5)


@pytest.fixture(scope="module")
def records() -> dict[int, Tensor]:
    """Random experts by layer; the first layer has none."""
    torch.manual_seed(0)
    by_layer = {}
    for layer in range(1, LAYERS):
        by_layer[layer] = torch.randint(0, 256, (EXPERTS, LAYOUT.nbytes), dtype=torch.uint8)
        for record in by_layer[layer]:
            for matrix in expert_matrices(LAYOUT, record):
                matrix.scales.uniform_(-0.2, 0.2)
    return by_layer


def step(tokens: int, rng: random.Random) -> tuple[Tensor, Tensor, Tensor]:
    """Random input of a layer: x [T, D], ids and weights [T, K]."""
    torch.manual_seed(rng.randrange(1 << 30))
    ids = torch.stack([torch.randperm(EXPERTS)[:PER_TOKEN] for _ in range(tokens)])
    return torch.randn(tokens, LAYOUT.hidden_size), ids, torch.rand(tokens, PER_TOKEN)


def offloaded(
    records: dict[int, Tensor],
    rng: random.Random,
    mode: Mode,
    slots: int,
    buffer: int,
    costs: Costs = EVEN,
    devices: int = 1,
    hook: Callable[[str], None] = lambda step: None,
    policy: Policy = Policy.LRFU,
    link: float | None = None,
) -> OffloadedExperts:
    cut = [0, LAYERS // 2 + 1, LAYERS] if devices == 2 else [0, LAYERS]
    device_experts = []
    for number in range(devices):
        own = {layer: records[layer] for layer in records if cut[number] <= layer < cut[number + 1]}
        cache = ExpertCache(slots, LAYERS, EXPERTS, policy)
        expert_slots = ExpertSlots(SimulatedDevice(number, hook=hook, link=link), LAYOUT, cache, buffer)
        device_experts.append(DeviceExperts(expert_slots, LAYOUT, own, mode, costs))
    return OffloadedExperts(device_experts)


def run_random_schedule(records: dict[int, Tensor], seed: int, faults: bool) -> int:
    """Run a few passes through the layers with a random placement; each result must equal that of the plain kernel.

    Returns:
        The number of results that were compared.
    """
    rng = random.Random(seed)
    delays, failing = rng.random() < 0.5, faults and rng.random() < 0.7

    def hook(what: str) -> None:
        if what in ("copy", "compute"):
            if delays and rng.random() < 0.2:
                time.sleep(rng.random() * 1e-4)
            if failing and rng.random() < 0.01:
                raise DeviceError(f"injected failure of {what}")

    costs = Costs(rng.choice([0.2, 1.0, 5.0]), rng.choice([0.2, 1.0, 5.0]), rng.choice([0.0, 0.1, 1.0]))
    experts = offloaded(
        records, rng, rng.choice([Mode.HYBRID, Mode.STREAM, Mode.CPU]), rng.randrange(EXPERTS * LAYERS + 1),
        rng.randrange(1, EXPERTS + 2), costs, rng.randrange(1, 3), hook, rng.choice(list(Policy)),
    )  # fmt: skip
    steps = 0
    for _ in range(4):
        tokens = rng.choice([1, 1, 1, 2, 5, 40])
        for layer in records:
            x, ids, weights = step(tokens, rng)
            result = experts.start(layer, x, ids, weights)
            if rng.random() < 0.03:
                continue  # interrupted before the result is computed
            got, expected = result(), ops.experts(x, records[layer], LAYOUT, ids, weights)
            assert torch.equal(got, expected), f"seed {seed}, layer {layer}, {tokens} tokens"
            steps += 1
    experts.close()
    return steps


@pytest.mark.slow
@pytest.mark.parametrize("faults", [False, True])
def test_random_placements_do_not_change_the_result(records, faults):
    """`DSV2_SCHEDULES` sets the number of steps; docs/log.md reports a run with 100,000."""
    wanted, steps, seed = int(os.environ.get("DSV2_SCHEDULES", "2000")), 0, 0
    while steps < wanted:
        steps += run_random_schedule(records, seed, faults)
        seed += 1
