"""Who may import whom: the order of the rooms, read from the syntax trees, and what importing must not cost."""

import ast
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "openelm_mlx"
# Developers' measurements, which are not a part of the wheel.
BENCHMARKS = PACKAGE.parent / "benchmarks"

# A room may import those before it, and itself.
ORDER = [
    ["errors"], ["platforms", "finder"], ["files"], ["arguments", "checks", "outputs"], ["specs", "text"], ["models"], ["hub"],
    ["checkpoint"], ["sources"], ["tokenizers"], ["memory"], ["placement", "experts"], ["runtime"], ["weights"], ["parallel"],
    ["link"], ["decoding"], ["adapters"], ["engine"], ["loading"], ["conversion"], ["exporting"], ["planning"], ["generate"],
    ["tools"], ["conversation"], ["server"], ["training"], ["workers"], ["bench"], ["evaluation"], ["commands"],
    ["__init__", "__main__"],
]  # fmt: skip
RANK = {room: rank for rank, rooms in enumerate(ORDER) for room in rooms}
SLOW = ("mlx_lm", "transformers", "torch", "huggingface_hub", "matplotlib", "wordfreq")


def room_of(parts: tuple[str, ...]) -> str:
    return parts[0].removesuffix(".py")


def imported_rooms(file: Path) -> set[str]:
    parts = file.relative_to(PACKAGE).parts
    rooms = set()
    # What a file does as a command is the command line's part of it.
    for node in nodes(file, with_main=False):
        if isinstance(node, ast.Import):
            rooms |= {name.name.split(".")[1] for name in node.names if name.name.startswith("openelm_mlx.")}
        elif isinstance(node, ast.ImportFrom):
            module = (node.module or "").split(".") if node.module else []
            if node.level:
                base = list(parts[: len(parts) - node.level])
                full = base + module
                rooms |= {full[0]} if full else {name.name for name in node.names}
            elif module[:1] == ["openelm_mlx"]:
                rooms |= {module[1]} if len(module) > 1 else {name.name for name in node.names}
    return rooms - {"__version__"}


# What the tests of this file look at.
LOOKED_AT = (
    ast.Import, ast.ImportFrom, ast.Constant, ast.Call, ast.Attribute, ast.Name, ast.FunctionDef, ast.AsyncFunctionDef,
)  # fmt: skip


@cache
def nodes(file: Path, with_main: bool = True) -> list[ast.AST]:
    """Of a file's syntax tree what these tests look at; without the part for a file that is run by itself."""
    rest, main = read_once(file)
    return [*rest, *main] if with_main else rest


@cache
def read_once(file: Path) -> tuple[list[ast.AST], list[ast.AST]]:
    found: tuple[list[ast.AST], list[ast.AST]] = ([], [])
    for each in ast.parse(file.read_text()).body:
        is_main = isinstance(each, ast.If) and "__main__" in ast.unparse(each.test)
        found[is_main].extend(node for node in ast.walk(each) if isinstance(node, LOOKED_AT))
    return found


@pytest.mark.parametrize("file", sorted(PACKAGE.rglob("*.py")), ids=lambda file: str(file.relative_to(PACKAGE)))
def test_imports_go_one_way(file):
    own = room_of(file.relative_to(PACKAGE).parts)
    if own == "__init__":
        return  # the front door names the public functions of every room
    for room in imported_rooms(file):
        assert RANK[room] < RANK[own] or room == own, f"{file.name} in {own} imports {room}"


def test_nothing_in_the_package_needs_the_benchmarks():
    """Neither an import nor a string that a process is started with; a docstring may name them."""
    for file in PACKAGE.rglob("*.py"):
        assert "benchmarks" not in {line[0] for line in imports(file)}, file
        for node in nodes(file):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                assert not node.value.startswith(("benchmarks.", "benchmarks/")), f"{file}:{node.lineno}"


def test_the_text_room_has_no_mlx_and_models_touch_no_disk():
    for file in (PACKAGE / "text").rglob("*.py"):
        assert "mlx" not in {word for line in imports(file) for word in line}, file
    for file in (PACKAGE / "models").rglob("*.py"):
        words = {word for line in imports(file) for word in line}
        assert not words & {"os", "pathlib", "io", "json"}, file
        called = {ast.unparse(n.func) for n in nodes(file) if isinstance(n, ast.Call)}
        assert not called & {"mx.eval", "mx.async_eval"}, file


def imports(file: Path) -> list[list[str]]:
    found = []
    for node in nodes(file):
        if isinstance(node, ast.Import):
            found += [name.name.split(".") for name in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.append((node.module or "").split("."))
    return found


def run(script: str) -> str:
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.strip()


def test_importing_the_package_loads_nothing():
    script = (
        "import sys; before = set(sys.modules); import openelm_mlx\n"
        "print(sorted(m for m in sys.modules if 'mlx' in m or (m == 'typing' and m not in before)))"
    )
    assert run(script) == "['openelm_mlx']"  # and `typing`, which takes longer than all the rest, does not come along


# Of the standard library too, what commands need only once they run; dataclasses bring `inspect`.
SLOW_FOR_HELP = (
    *SLOW, "dataclasses", "difflib", "hashlib", "inspect", "logging", "mlx", "numpy", "platform", "subprocess", "traceback",
)  # fmt: skip


def test_help_imports_nothing_slow():
    """Beyond what argparse itself imports to show it, which depends on the Python."""
    script = (
        "import argparse, json, pathlib, sys\n"
        "argparse.ArgumentParser().format_help()\n"
        "before = set(sys.modules)\n"
        "from openelm_mlx.commands import main\n"
        "try: main(['--help'])\n"
        f"except SystemExit: print([m for m in {SLOW_FOR_HELP!r} if m in sys.modules and m not in before])"
    )
    shown = run(script).splitlines()
    assert shown[0].startswith("usage: openelm_mlx")
    assert shown[-1] == "[]"


def test_loading_and_generating_import_nothing_slow():
    script = f"import sys, openelm_mlx.generate; print([m for m in {SLOW!r} if m in sys.modules])"
    assert run(script) == "[]"


# What speaks into a pipe that this library reads, and one sentence for a Python that cannot import the rest.
NOT_SHOWN = ("tools/python_worker.py", "tools/sandbox_init.py", "__init__.py")
SHOWING = ("sys.stdout", "sys.stderr", "sys.__stdout__", "sys.__stderr__", "traceback.print_exc", "print")
SHOWING_NAMES = {name.split(".")[-1] for name in SHOWING}


def test_only_one_file_shows_anything():
    """What is shown goes through commands/output.py, where it is made harmless for a terminal."""
    for file in [*PACKAGE.rglob("*.py"), *BENCHMARKS.rglob("*.py")]:
        if PACKAGE in file.parents and file.relative_to(PACKAGE).as_posix() in (*NOT_SHOWN, "commands/output.py"):
            continue
        # Children of the benchmarks write one JSON object for their parent.
        for node in nodes(file, with_main=False):
            if isinstance(node, ast.Attribute | ast.Name):
                name = node.attr if isinstance(node, ast.Attribute) else node.id
                # Most names are another one, and to write a node out as source takes long.
                if name in SHOWING_NAMES:
                    assert ast.unparse(node) not in SHOWING, f"{file}:{node.lineno}: {ast.unparse(node)}"


def test_files_import_each_other_in_no_circle():
    """Also for the type checker alone: who reads a file never has to read another one first that needs this one."""
    graph = {name: imported_files(name, file) for name, file in FILES.items()}
    done: set[str] = set()

    def visit(name: str, way: tuple[str, ...]) -> None:
        assert name not in way, f"a circle: {' -> '.join((*way[way.index(name) :], name))}"
        if name not in done:
            for each in sorted(graph[name]):
                visit(each, (*way, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def name_of(file: Path) -> str:
    return ".".join(file.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


FILES = {name_of(file): file for file in PACKAGE.rglob("*.py") if file.name != "__main__.py" and file.parent != PACKAGE}
FILES |= {name_of(file): file for file in PACKAGE.glob("*.py") if not file.name.startswith("__")}


def imported_files(name: str, file: Path) -> set[str]:
    """The files of the package that a file imports, not within functions: what is imported late closes no circle."""
    package = [*name.split("."), ""] if file.name == "__init__.py" else name.split(".")
    found = set()
    late = {
        inner.lineno
        for node in nodes(file)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        for inner in ast.walk(node)
        if isinstance(inner, ast.ImportFrom)
    }
    for node in nodes(file):
        if not isinstance(node, ast.ImportFrom) or node.lineno in late:
            continue
        if node.level:
            base = package[: len(package) - node.level]
        elif (node.module or "").split(".")[0] == "openelm_mlx":
            base = []
        else:
            continue
        module = (node.module or "").split(".") if node.module else []
        whole = base + [part for part in module if part != "openelm_mlx"]
        for alias in node.names:
            inner = ".".join([*whole, alias.name])
            found.add(inner if inner in FILES else ".".join(whole))
    return {each for each in found if each in FILES and each != name}


# Modules whose package has another name, or comes along with a listed one.
PACKAGE_OF = {
    "yaml": "pyyaml",
    "pydantic_core": "pydantic", "filelock": "huggingface_hub", "anyio": "mcp", "mcp_types": "mcp",
    "h11": "uvicorn",
}  # fmt: skip
# Extras for who works on the package: nothing that a user runs may need them.
OF_DEVELOPERS = ("test", "dev", "docs", "train", "browser")


def test_every_library_that_is_imported_is_asked_for():
    """A library that only the tests' extra brings would be missing where the package is installed."""
    project = (PACKAGE.parent / "pyproject.toml").read_text()
    begin = project.index("[project.optional-dependencies]")
    extras = project[begin : project.index("\n[", begin + 1)]
    own = project[project.index("\ndependencies = [") : begin]
    for extra in OF_DEVELOPERS:
        extras = re.sub(rf"^{extra} = \[.*?\]$", "", extras, flags=re.MULTILINE | re.DOTALL)
    listed = {re.split(r"[\[>=<; ]", each)[0].replace("-", "_") for each in re.findall(r'"([^"]+)"', own + extras)}
    for file in PACKAGE.rglob("*.py"):
        for line in imports(file):
            library = PACKAGE_OF.get(line[0], line[0])
            assert library in {*sys.stdlib_module_names, "openelm_mlx", *listed}, f"{file}: {line[0]}"
