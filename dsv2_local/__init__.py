"""dsv2-local: DeepSeek-V2 on one's own workstation.

import dsv2_local

llm = dsv2_local.load()  # the small model that ships with the package
for chunk in llm.chat([{"role": "user", "content": "What is a violin?"}]):
    print(chunk.text, end="")
"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["LLM", "Dsv2Error", "load"]

if TYPE_CHECKING:
    from dsv2_local.errors import Dsv2Error
    from dsv2_local.llm import LLM, load


def _find_top_level(package: Path) -> None:
    """In a source tree without its links, find quant/, offload/, kernels/ and cli.py where they really lie."""
    link = package / "kernels"
    if link.is_dir():  # an installed package, or a source tree with its links
        return
    __path__.insert(0, str(package.parent))
    if link.is_file():  # git or an archive program wrote the link's text into a plain file
        print(
            f"dsv2: the links in {package} are broken (the source was unpacked without symbolic links); it works, but "
            "`git clone` or an installed package is the better way",
            file=sys.stderr,
        )


_find_top_level(Path(__file__).parent)


def __getattr__(name: str) -> Any:
    """Import the API on first use, so that `dsv2 --help` never waits for torch."""
    if name in ("load", "LLM"):
        from dsv2_local import llm

        return getattr(llm, name)
    if name == "Dsv2Error":
        from dsv2_local.errors import Dsv2Error

        return Dsv2Error
    raise AttributeError(f"module 'dsv2_local' has no attribute {name!r}")
