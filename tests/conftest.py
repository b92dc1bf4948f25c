"""What all tests share: the kernels that they run on, the core, the directories, and the random numbers."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING

import pytest

# A worker of pytest-xdist has a core of its own, so that their threads do not wait for each other. Torch counts the
# cores when it is imported.
if worker := os.environ.get("PYTEST_XDIST_WORKER"):
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[int(worker.removeprefix("gw")) % len(cores)]})

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is first imported, by whichever test or library comes first

from dsv2_local.kernels import cpu
from dsv2_local.runtime import random_weights

if TYPE_CHECKING:
    import openai

    from dsv2_local.server.service import Service


def pytest_xdist_auto_num_workers() -> int | None:
    """On a machine with a GPU one process runs all tests: several would share its memory, and tune kernels at once."""
    return 0 if torch.cuda.is_available() else None  # None: a worker per core


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The slowest tests come first, so that no worker is left with one in the end."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@contextmanager
def kernels(variant: str) -> Iterator[None]:
    """Compute with this variant, or with "reference", until the end of the block."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(cpu.VARIABLE, variant)
        cpu.kernels.cache_clear()
        yield
    cpu.kernels.cache_clear()


@pytest.fixture(scope="module")
def reference_kernels() -> Iterator[None]:
    """The torch reference: exact in fp32, where the native kernels quantise activations."""
    with kernels(cpu.REFERENCE):
        yield


@pytest.fixture(scope="session", autouse=True)
def random_numbers() -> Iterator[None]:
    """Models of random weights are copied from numbers that take a second to draw; tests draw them once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(random_weights, "_RandomNumbers", cache(random_weights._RandomNumbers))
        yield


@pytest.fixture(scope="session", autouse=True)
def homes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What `dsv2 bench` measures while it is tested is not kept for the user's plans, nor are sessions for the user."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
        yield


@pytest.fixture(scope="module")
def server() -> Iterator["tuple[str, Service]"]:
    """dsv2-nano behind the server: its address, and the service."""
    from tests.serving import serving_nano

    with serving_nano() as found:
        yield found


@pytest.fixture
def client(server: "tuple[str, Service]") -> Iterator["openai.OpenAI"]:
    """OpenAI's client of that server; modules about other clients have their own."""
    import openai

    with openai.OpenAI(base_url=f"{server[0]}/v1", api_key="none", max_retries=0) as client:
        yield client
