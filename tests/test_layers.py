"""Who may import whom, and where heavy libraries live: the table of docs/architecture.md, enforced on the syntax tree of src."""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "manyicl"

# Row -> {room: what stands directly to its left on a chain of the same row}. A room is a module of src/manyicl, or a folder
# with all its files. It may import any room of a lower row, and all that stands to its left. A new module of src must be
# placed here, in docs/architecture.md and in the README's tree.
LAYERS: dict[int, dict[str, tuple[str, ...]]] = {
    0: {"errors": (), "config": ("errors",), "files": ("errors",)},
    1: {"tasks": (), "metrics": ("tasks",), "records": ("metrics",), "results": ("records",)},
    2: {"templates": (), "episodes": ("templates",), "selection": ()},
    3: {"encoding": (), "packing": ("encoding",), "inspection": ("packing",)},
    4: {
        "checkpoints": (),
        "default_model": (),
        "dtypes": (),
        "model_names": ("default_model",),
        "modeling": ("model_names", "dtypes"),
        "gguf_export": ("modeling",),
        "kernels": ("default_model",),
        "versions": ("kernels",),
        "activations": (),
        "attention": ("kernels",),
        "objective": ("attention",),
        "accelerators": ("modeling", "attention"),
        "planning": (),
        "process_group": (),
        "prefix_states": ("attention",),
        "prefix": ("prefix_states", "planning"),
        "prefix_files": ("prefix",),
        "prefix_store": ("prefix_files",),
        "label_trie": (),
        "branching": ("prefix", "label_trie"),
        "scoring": ("branching",),
        "label_search": ("scoring",),
        "calibration": ("scoring",),
        "sampling": ("branching",),
        "training_plan": ("objective", "modeling", "planning"),
    },
    5: {"arguments": (), "training": ("arguments",), "engines": ()},
    6: {
        "methods": (),
        "classic": ("methods",),
        "evaluation": ("methods",),
        "forgetting": ("evaluation",),
        "robustness": ("evaluation",),
    },
    7: {
        "runs": (),
        "prediction": (),
        "lm_eval_adapter": (),
        "study": ("runs", "lm_eval_adapter"),
        "estimator": (),
        "reporting": (),
    },
    8: {"serving": ()},
    9: {"cli": ()},
}
# Rooms that see less than their row allows: the highest row that they may import.
CEILINGS = {"reporting": 1}
# Modules outside the table: the public names, loaded lazily, and `python -m manyicl`.
ENTRANCES = ("__init__", "__main__")

# Library -> rooms, or single modules, that may import it. Libraries that are not listed may be imported anywhere.
HOMES: dict[str, tuple[str, ...]] = {
    "transformers": (
        "default_model",
        "model_names",
        "modeling",
        "gguf_export",
        "attention",
        "accelerators",
        "prefix",
        "prefix_files",
        "branching",
        "scoring",
        "label_search",
        "calibration",
        "sampling",
        "arguments",
        "training",
    ),
    "peft": ("modeling",),
    "gguf": ("gguf_export",),
    "datasets": ("tasks.readers",),
    "pyarrow": ("tasks.tables",),
    "sklearn": ("classic", "estimator"),
    "bm25s": ("selection",),
    "scipy": ("metrics",),
    "safetensors": ("files", "model_names", "modeling", "prefix"),
    "huggingface_hub": ("model_names", "modeling"),
    "accelerate": ("arguments", "training"),
    "filelock": ("default_model", "kernels", "prefix_store", "study", "serving"),
    "rich": ("inspection", "reporting"),
    "jinja2": ("reporting",),
    "markupsafe": ("reporting",),
    "typer": ("cli", "serving.commands"),
    "fastapi": ("serving",),
    "httpx": ("serving",),
    "starlette": ("serving",),
    "uvicorn": ("serving",),
    "sqlalchemy": ("serving",),
    "alembic": ("serving",),
    "prometheus_client": ("serving",),
    "vllm": ("engines.vllm",),
    "lm_eval": ("lm_eval_adapter",),
}
FIRST_ROW_WITH_TORCH = 4
NO_TORCH_ROWS = (0, 1, 2)

ROW_OF = {room: row for row, rooms in LAYERS.items() for room in rooms}


def lefts(room: str) -> set[str]:
    """All rooms of the same row that a room may import."""
    direct = LAYERS[ROW_OF[room]][room]
    return {*direct, *(further for left in direct for further in lefts(left))}


def module_names() -> dict[str, Path]:
    """Every module of src by dotted name below the package, `tasks.readers` for instance."""
    names = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)] = path
    return names


def room_of(module: str) -> str:
    return module.partition(".")[0]


def is_type_checking(node: ast.If) -> bool:
    return ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def walk(tree: ast.AST, *, for_types_only: bool = False) -> Iterator[tuple[ast.AST, bool]]:
    """Every node, those inside functions too, and whether it stands under `if TYPE_CHECKING`."""
    for child in ast.iter_child_nodes(tree):
        yield child, for_types_only
        if isinstance(child, ast.If) and is_type_checking(child):
            for statement in child.body:
                yield statement, True
                yield from walk(statement, for_types_only=True)
            for statement in child.orelse:
                yield statement, for_types_only
                yield from walk(statement, for_types_only=for_types_only)
        else:
            yield from walk(child, for_types_only=for_types_only)


def imported_names(source: str, *, module: str) -> list[tuple[str, bool]]:
    """Dotted names that a module imports, and whether for type checking only; relative imports are resolved."""
    found = []
    for node, for_types_only in walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [(alias.name, for_types_only) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parents = ["manyicl", *module.split(".")][: -node.level] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            if base == "manyicl":
                found += [(f"manyicl.{alias.name}", for_types_only) for alias in node.names]
            else:
                found.append((base, for_types_only))
    return found


def violations(module: str, source: str) -> list[str]:
    """What a module imports that the table does not allow, a sentence each."""
    room = room_of(module)
    row = ROW_OF[room]
    ceiling = CEILINGS.get(room, row - 1)
    problems = []
    for name, for_types_only in imported_names(source, module=module):
        library = name.partition(".")[0]
        if library == "manyicl":
            other = room_of(name.removeprefix("manyicl").lstrip("."))
            if other == room:
                continue
            if other not in ROW_OF:
                problems.append(f"{module} imports {name}, which the table does not hold")
            elif ROW_OF[other] > ceiling and other not in lefts(room):
                problems.append(f"{module} (row {row}) imports {other} (row {ROW_OF[other]})")
        elif for_types_only:
            continue
        elif library == "torch" and (row < FIRST_ROW_WITH_TORCH or room == "reporting"):
            problems.append(f"{module} (row {row}) imports torch")
        elif library in HOMES and module not in HOMES[library] and room not in HOMES[library]:
            problems.append(f"{module} imports {library}, whose homes are {', '.join(HOMES[library])}")
    return problems


def torch_free_rooms() -> list[str]:
    return [*(room for row in NO_TORCH_ROWS for room in LAYERS[row]), "reporting"]


def test_every_module_stands_in_the_table_and_nothing_else() -> None:
    rooms = {room_of(module) for module in module_names()} - set(ENTRANCES)
    assert rooms == set(ROW_OF)


def test_same_row_imports_are_drawn_from_left_to_right() -> None:
    for row, rooms in LAYERS.items():
        order = list(rooms)
        for room, direct in rooms.items():
            assert all(order.index(left) < order.index(room) for left in direct), (row, room)


@pytest.mark.parametrize("module", [name for name in module_names() if name not in ENTRANCES])
def test_module_imports_only_what_the_table_allows(module: str) -> None:
    assert violations(module, module_names()[module].read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("module", ENTRANCES)
def test_entrances_import_no_heavy_library(module: str) -> None:
    source = module_names()[module].read_text(encoding="utf-8")
    run_time = {name.partition(".")[0] for name, for_types_only in imported_names(source, module=module) if not for_types_only}
    assert run_time <= {"manyicl", "importlib", "typing"}


@pytest.mark.parametrize(
    ("module", "source", "problem"),
    [
        ("training", "from manyicl.evaluation import Plan", "training (row 5) imports evaluation (row 6)"),
        ("errors", "import manyicl.config", "errors (row 0) imports config (row 0)"),
        ("tasks.task", "from manyicl import metrics", "tasks.task (row 1) imports metrics (row 1)"),
        ("tasks.task", "from ..records import Shots", "tasks.task (row 1) imports records (row 1)"),
        ("reporting.terminal", "from manyicl.episodes import Episode", "reporting.terminal (row 7) imports episodes (row 2)"),
        ("packing", "import torch.nn as nn", "packing (row 3) imports torch"),
        ("reporting.terminal", "import torch", "reporting.terminal (row 7) imports torch"),
        ("metrics", "def f():\n    import torch", "metrics (row 1) imports torch"),
        ("encoding", "from transformers import AutoTokenizer", "encoding imports transformers, whose homes are"),
        ("tasks.checks", "import datasets", "tasks.checks imports datasets, whose homes are tasks.readers"),
        ("cli", "from manyicl.unknown import f", "cli imports manyicl.unknown, which the table does not hold"),
        (
            "errors",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from manyicl.runs import train",
            "errors (row 0) imports runs (row 7)",
        ),
        ("errors", "if TYPE_CHECKING:\n    pass\nelse:\n    import torch", "errors (row 0) imports torch"),
    ],
)
def test_a_forbidden_import_is_caught(module: str, source: str, problem: str) -> None:
    found = violations(module, source)
    assert len(found) == 1
    assert found[0].startswith(problem)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("inspection", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch"),
        ("modeling", "from peft import PeftModel\nfrom manyicl.default_model import DEFAULT_NOTE"),
        ("tasks.readers", "from . import tables\nfrom .task import Task\nfrom manyicl.config import Recipe"),
        ("scoring", "def f():\n    from manyicl.attention import Branches"),
    ],
)
def test_an_allowed_import_passes(module: str, source: str) -> None:
    assert violations(module, source) == []


def test_torch_free_rooms_reach_torch_by_no_path() -> None:
    modules = module_names()
    reached: dict[str, str] = {}
    waiting = [(module, module) for module in modules if room_of(module) in torch_free_rooms()]
    while waiting:
        module, path = waiting.pop()
        if module in reached:
            continue
        reached[module] = path
        for name, for_types_only in imported_names(modules[module].read_text(encoding="utf-8"), module=module):
            if for_types_only:
                continue
            assert name.partition(".")[0] not in ("torch", "transformers"), path
            inner = name.removeprefix("manyicl.")
            if name != inner and inner in modules:
                waiting.append((inner, f"{path} -> {inner}"))
    assert {"config", "tasks.readers", "records", "episodes", "reporting.terminal"} <= reached.keys()


def test_importing_the_torch_free_rooms_loads_neither_torch_nor_transformers() -> None:
    modules = [f"manyicl.{module}" for module in module_names() if room_of(module) in torch_free_rooms()]
    # Row 3 needs no torch either: rows are numpy arrays, and the tokenizer is a Protocol.
    modules += ["manyicl.encoding", "manyicl.packing", "manyicl.inspection"]
    script = (
        f"import importlib, sys\n[importlib.import_module(name) for name in {modules!r}]\n"
        "print([name for name in ('torch', 'transformers') if name in sys.modules])"
    )
    printed = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout
    assert printed == "[]\n"


def test_every_imported_library_is_a_declared_dependency() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = [*project["dependencies"], *(line for extra in project["optional-dependencies"].values() for line in extra)]
    declared = {re.split(r"[<>=!~ \[]", line, maxsplit=1)[0] for line in lines}
    imported = {
        name.partition(".")[0]
        for module, path in module_names().items()
        for name, _ in imported_names(path.read_text(encoding="utf-8"), module=module)
    }
    renamed = {
        "sklearn": "scikit-learn",
        "yaml": "pyyaml",
        "huggingface_hub": "huggingface-hub",
        "lm_eval": "lm-eval",
        "prometheus_client": "prometheus-client",
    }
    libraries = {renamed.get(name, name) for name in imported - sys.stdlib_module_names - {"manyicl"}}
    assert {"torch", "transformers", "pyyaml"} <= libraries
    assert libraries - declared == set()


def test_the_table_is_drawn_in_the_documentation() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    drawn: dict[str, int] = {}
    for row, line in re.findall(r"^(\d)  (\S.*)$", text, flags=re.MULTILINE):
        for room in re.findall(r"[a-z_]+", re.sub(r"\(.*?\)", "", line)):
            drawn[room] = int(row)
    assert drawn == ROW_OF
