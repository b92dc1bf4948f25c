"""docs/architecture.md against the code: its floors and the imports, its layout and the files, the names it cites."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import typer

from dsv2_local.cli import app

REPOSITORY = Path(__file__).parent.parent
PAGE = REPOSITORY / "docs" / "architecture.md"
TOP_LEVEL = ("quant", "offload", "kernels", "cli.py")
"""What is imported as part of `dsv2_local` and stored beside it; the links to it in dsv2_local/ are not followed."""

HEADER = "| floor | modules |"
FOR_PEOPLE = {"rich", "prompt_toolkit", "markdown_it", "typer"}
SLOW_TO_IMPORT = {"torch", "transformers", "tokenizers", "huggingface_hub", "prompt_toolkit"}


@cache
def modules() -> dict[str, Path]:
    """Every module of the package by its name below `dsv2_local`; a package goes by its own name."""
    inside = (path.relative_to(REPOSITORY / "dsv2_local") for path in (REPOSITORY / "dsv2_local").rglob("*.py"))
    found = {path: REPOSITORY / "dsv2_local" / path for path in inside if path.parts[0] not in TOP_LEVEL}
    for name in TOP_LEVEL:
        beside = REPOSITORY / name
        paths = beside.rglob("*.py") if beside.is_dir() else [beside]
        found |= {path.relative_to(REPOSITORY): path for path in paths}
    names = {".".join(path.with_suffix("").parts): file for path, file in found.items()}
    return {name.removesuffix(".__init__"): file for name, file in names.items()}


@cache
def floors() -> list[list[str]]:
    """The modules of each floor as the page lists them, the lowest floor first."""
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    start = lines.index(HEADER) + 2  # past the header and the line below it
    rows = []
    for line in lines[start:]:
        if not line.startswith("|"):
            break
        rows.append(re.findall(r"`([\w.]+)`", line.split("|")[2]))
    return rows[::-1]


def place(module: str) -> tuple[int, int]:
    """The floor of a module, and its position on the floor; lower places may be imported."""
    found = [(floor, row.index(module)) for floor, row in enumerate(floors()) if module in row]
    assert found, f"{module} has no floor: add it to the table in docs/architecture.md"
    return found[0]


def imports(path: Path) -> set[str]:
    """The modules of this package that a file imports anywhere in it, under TYPE_CHECKING and in functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("dsv2_local"):
            base = node.module.removeprefix("dsv2_local").lstrip(".")
            for alias in node.names:
                name = f"{base}.{alias.name}".lstrip(".")
                found.add(name if name in modules() else base or "__init__")
        elif isinstance(node, ast.Import):
            names = (alias.name for alias in node.names if alias.name.startswith("dsv2_local."))
            found.update(name.removeprefix("dsv2_local.") for name in names)
    return found


def libraries(path: Path) -> set[str]:
    """The first names of everything else that a file imports."""
    names: list[str] = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.append(node.module)
        elif isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
    return {name.partition(".")[0] for name in names}


def test_every_module_is_in_the_table_and_every_name_in_the_table_is_a_module():
    listed = [module for row in floors() for module in row]
    assert sorted(listed) == sorted(set(listed))
    assert set(listed) == set(modules())
    assert all(floors())


@pytest.mark.parametrize("module", sorted(modules()))
def test_imports_go_down(module):
    upwards = {name for name in imports(modules()[module]) if place(name) >= place(module)}
    assert not upwards, f"{module} imports {upwards}, which docs/architecture.md puts above it"


def defined(path: Path) -> set[str]:
    """The names that a file defines: functions, classes, "Class.method", "Class.attribute"; any word of a C++ file."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".py":
        return set(re.findall(r"\w+", text))

    def names(body: list[ast.stmt], prefix: str = "") -> Iterator[str]:
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                yield prefix + node.name
            if isinstance(node, ast.ClassDef):
                yield from names(node.body, f"{node.name}.")
                attributes = (each for each in ast.walk(node) if isinstance(each, ast.Attribute))
                yield from (f"{node.name}.{each.attr}" for each in attributes if isinstance(each.ctx, ast.Store))
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            yield from (prefix + target.id for target in targets if isinstance(target, ast.Name))

    return set(names(ast.parse(text).body))


@pytest.mark.parametrize("page", ["architecture.md", "design.md"])
def test_what_the_pages_cite_is_defined(page):
    """`runtime/engine.py: Engine, Engine.generate` in that file, below dsv2_local; `Engine.generate` in any."""
    text = (PAGE.parent / page).read_text(encoding="utf-8")
    anywhere = set().union(*map(defined, modules().values()))
    unknown = set(re.findall(r"`([A-Z]\w+\.(?!md|in)[a-z_]+)`", text)) - anywhere
    assert not unknown, f"docs/{page}: nothing defines {unknown}"
    for file, names in re.findall(r"`([\w/]+\.(?:py|cpp|hpp)):\s([^`]+)`", text):
        beside = file.partition("/")[0] in TOP_LEVEL
        path = REPOSITORY / file if beside else REPOSITORY / "dsv2_local" / file
        assert path.is_file(), f"docs/{page}: there is no {file}"
        missing = set(re.split(r",\s*", names)) - defined(path)
        assert not missing, f"docs/{page}: {file} does not define {missing}"


def test_the_layout_names_every_source_file_and_nothing_else():
    """The first code block under "The layout": two spaces of indentation a folder, then a name and what it is.

    The line of a folder also stands for its `__init__.py`.
    """
    section = PAGE.read_text(encoding="utf-8").partition("\n## The layout\n")[2]
    folders, listed = list[str](), set[Path]()
    for line in section.split("```")[1].strip().splitlines():
        name = line.split()[0]
        folders[(len(line) - len(line.lstrip())) // 2 :] = [name]
        listed.add(REPOSITORY.joinpath(*folders))
    assert not [path for path in listed if not path.exists()]
    native = {path for path in (REPOSITORY / "kernels").rglob("*") if path.suffix in (".cpp", ".hpp")}
    described = {path for path in modules().values() if path.name == "__init__.py" and path.parent in listed}
    missing = {*modules().values(), *native} - listed - described
    assert not missing, f'docs/architecture.md, "The layout", lacks {missing}'


def test_only_the_commands_know_of_terminals():
    lowest, _ = place("commands.console")
    for name, path in modules().items():
        if place(name)[0] < lowest:
            assert not libraries(path) & FOR_PEOPLE, name


def test_the_plan_is_made_without_torch():
    """What it is made of, too: `dsv2 plan` answers at once, on a machine without a GPU or a model."""
    floor, _ = place("offload.plan")
    wanted = [*floors()[floor], "commands.plan"]
    code = (
        f"import sys, importlib\nfor name in {wanted}:\n    importlib.import_module('dsv2_local.' + name)\n"
        "sys.exit('imported torch' if 'torch' in sys.modules else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def commands() -> Iterator[list[str]]:
    """`dsv2` itself and every command of it, as words of the command line."""
    yield []
    unseen = [([name], command) for name, command in typer.main.get_command(app).commands.items()]  # type: ignore[attr-defined]
    while unseen:
        words, command = unseen.pop()
        yield words
        unseen += [([*words, name], below) for name, below in getattr(command, "commands", {}).items()]


@pytest.mark.parametrize("option", ["-h", "--help"])
@pytest.mark.parametrize("command", list(commands()), ids=" ".join)
def test_help_imports_no_torch(command, option):
    code = (
        "import sys\n"
        f"sys.argv = {['dsv2', *command, option]!r}\n"
        "from dsv2_local.cli import main\n"
        "try:\n    main()\nexcept SystemExit as done:\n    failed = done.code\n"
        f"slow = {SLOW_TO_IMPORT!r} & set(sys.modules)\n"
        "sys.exit(failed or (f'imported {slow}' if slow else 0))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"Usage: dsv2 {' '.join(command)}".strip() in done.stdout
