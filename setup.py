"""What `pyproject.toml` cannot say: where the package's folders lie, and how the native kernels are compiled.

`quant/`, `offload/`, `kernels/` and `cli.py` lie at the top level of the repository and are installed inside
`dsv2_local`. The mapping below does that, so no build depends on the symbolic links in `dsv2_local/`
(docs/architecture.md, "Packaging").

The native kernels are the same sources compiled once per instruction set and loaded through ctypes. Each library is
optional: without a C++ compiler, or with one that lacks an instruction set, the package installs all the same and says
at run time what is missing. `kernels/cpu/__init__.py` chooses among them.
"""

import platform
from pathlib import Path

from setuptools import Extension, find_namespace_packages, setup
from setuptools.command.build_py import build_py

TOP_LEVEL = ("quant", "offload", "kernels")

AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni", "-mavx2", "-mfma", "-mf16c"]
VARIANTS = {"portable": []}
if platform.machine() in ("x86_64", "AMD64"):
    VARIANTS |= {
        "avx512bf16": [*AVX512, "-mavx512bf16", "-mavx512vbmi"],
        "avx512": AVX512,
        "avx2": ["-mavx2", "-mfma", "-mf16c"],
    }

# GCC 12 takes its own undefined vectors for mistakes, and notes an ABI that no call here depends on.
FLAGS = ["-std=c++17", "-O3", "-g0", "-fvisibility=hidden", "-Wall", "-Wextra"]
FLAGS += ["-Wno-psabi", "-Wno-uninitialized", "-Wno-maybe-uninitialized"]


class BuildPy(build_py):
    """Takes `dsv2_local.cli` from the top level; `dsv2_local/cli.py` is a link, or the text of one."""

    def find_package_modules(self, package: str, package_dir: str) -> list[tuple[str, str, str]]:
        modules = [found for found in super().find_package_modules(package, package_dir) if found[1] != "cli"]
        return [*modules, (package, "cli", "cli.py")] if package == "dsv2_local" else modules


def packages() -> list[str]:
    inside = find_namespace_packages(include=["dsv2_local*"], exclude=[f"dsv2_local.{name}*" for name in TOP_LEVEL])
    beside = find_namespace_packages(include=[f"{name}*" for name in TOP_LEVEL])
    every = [*inside, *(f"dsv2_local.{name}" for name in beside)]
    return [name for name in every if "__pycache__" not in name]


sources, headers = (sorted(str(path) for path in Path("kernels/cpu").glob(kind)) for kind in ("*.cpp", "*.hpp"))
setup(
    packages=packages(),
    package_dir={f"dsv2_local.{name}": name for name in TOP_LEVEL},
    cmdclass={"build_py": BuildPy},
    ext_modules=[
        Extension(
            f"dsv2_local.kernels.cpu._{variant}",
            sources,
            depends=headers,
            extra_compile_args=[*FLAGS, *flags],
            extra_link_args=["-pthread"],
            language="c++",
            optional=True,
        )
        for variant, flags in VARIANTS.items()
    ]
    + [
        Extension(
            "dsv2_local.kernels.cuda._native",
            sorted(str(path) for path in Path("kernels/cuda").glob("*.cpp")),
            depends=["kernels/cuda/driver.hpp"],
            extra_compile_args=FLAGS,
            language="c++",
            optional=True,
        )
    ],
)
