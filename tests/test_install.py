"""The ways of installing that do not have the symbolic links of a git checkout: an sdist, and an unpacked archive."""

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from dsv2_local.kernels import cpu

ROOT = Path(__file__).parent.parent
BUILT = ("__pycache__", "*.so", "*.egg-info", "build", "dist", ".*cache", ".hypothesis", ".venv", ".git")
ANSWER = "A violin is a bowed stringed instrument"
# Without a compiler an installation takes seconds; the native kernels are compiled by every other test's environment.
NO_COMPILER = {"CC": "false", "CXX": "false", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}


def call(command: list[str | Path], folder: Path, **environment: str) -> str:
    done = subprocess.run(
        [str(part) for part in command], cwd=folder, capture_output=True, text=True, check=False,
        env={**os.environ, **NO_COMPILER, **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def install(source: Path, site: Path) -> None:
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    call([*pip, "--target", site, source], site.parent)


def ask(folder: Path, **environment: str) -> str:
    return call([sys.executable, "-m", "dsv2_local", "run", "What is a violin?"], folder, **environment)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """The sources as they are, with links."""
    return Path(shutil.copytree(ROOT, tmp_path / "tree", symlinks=True, ignore=shutil.ignore_patterns(*BUILT)))


@pytest.mark.slow
def test_an_archive_whose_links_became_text_files(tree, tmp_path):
    """As `python -m zipfile`, a zip that pip fetches, or git with core.symlinks=false leave it."""
    links = [path for path in (tree / "dsv2_local").iterdir() if path.is_symlink()]
    for link in links:
        text = str(link.readlink())
        link.unlink()
        link.write_text(text)
    install(tree, tmp_path / "site")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    answer = ask(elsewhere, PYTHONPATH=str(tmp_path / "site"))
    assert ANSWER in answer
    assert "links" not in answer
    in_the_tree = ask(tree, PYTHONPATH="")
    assert ANSWER in in_the_tree
    notices = [line for line in in_the_tree.splitlines() if "links" in line]
    assert len(notices) == bool(links), in_the_tree
    assert "Traceback" not in in_the_tree


@pytest.mark.slow
def test_an_sdist_installs_and_its_tests_run(tree, tmp_path):
    build = f"from setuptools import build_meta; print(build_meta.build_sdist({str(tmp_path)!r}))"
    call([sys.executable, "-c", build], tree)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as sdist:
        sdist.extractall(tmp_path / "unpacked", filter="data")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    for name in ("quant", "offload", "kernels", "cli.py", "tests", "examples", "docs", "tools", "CONTRIBUTING.md"):
        assert (unpacked / name).exists(), name
    install(unpacked, tmp_path / "site")
    assert ANSWER in ask(tmp_path, PYTHONPATH=str(tmp_path / "site"))
    tests = ["tests/test_config.py", "tests/test_schema.py", "tests/test_floors.py", "tests/test_block_pool.py"]
    pytest_alone = [sys.executable, "-m", "pytest", "-q", "-n0", "-p", "no:cacheprovider"]
    assert " passed" in call([*pytest_alone, "-k", "not million and not help", *tests], unpacked, PYTHONPATH="")


def test_the_gpu_extra_brings_the_kernels_for_gpus(tree, tmp_path):
    prepare = f"from setuptools import build_meta; build_meta.prepare_metadata_for_build_wheel({str(tmp_path)!r})"
    call([sys.executable, "-c", prepare], tree)
    (metadata,) = tmp_path.glob("*.dist-info/METADATA")
    lines = metadata.read_text(encoding="utf-8").splitlines()
    needed = [Requirement(line.removeprefix("Requires-Dist: ")) for line in lines if line.startswith("Requires-Dist: ")]

    def brought(extra: str, system: str) -> set[str]:
        installed = {"extra": extra, "sys_platform": system}
        return {each.name for each in needed if each.marker and each.marker.evaluate(installed)}

    assert brought("gpu", "linux") == {cpu.TRITON, cpu.BITSANDBYTES}
    assert not brought("gpu", "win32")
    assert brought("test", "linux") > {cpu.TRITON, cpu.BITSANDBYTES}
