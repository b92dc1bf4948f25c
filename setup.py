"""The native kernels: the same sources compiled once for each instruction set, loaded through ctypes.

Each library is optional: without a C++ compiler, or with one that lacks an instruction set, the package installs all
the same, and says at run time what is missing. `kernels/cpu/__init__.py` chooses among them.
"""

import platform
from pathlib import Path

from setuptools import Extension, setup

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

sources, headers = (sorted(str(path) for path in Path("kernels/cpu").glob(kind)) for kind in ("*.cpp", "*.hpp"))
setup(
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
)
