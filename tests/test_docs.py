"""The documentation is true: commands parse, links resolve, code uses names that exist, references name every key and option."""

import ast
import importlib.util
import inspect
import re
import shlex
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import annotated_types
import pytest
import typer.main
import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

import manyicl
from manyicl import errors
from manyicl.cli import app
from manyicl.config import Recipe
from manyicl.records import EvaluationRecord, QueryScores
from manyicl.study.recipe import FamilyConfig, SeedsConfig, StudyRecipe
from manyicl.tasks.descriptions import HubSource, TaskFile

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted(DOCS.rglob("*.md"))]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def fences(text: str, language: str) -> list[str]:
    """The contents of the code blocks of one language; "" for those without one."""
    return [content for found, content in _FENCE.findall(text) if found == language]


def command_lines(text: str) -> list[str]:
    """Lines of unmarked code blocks that call manyicl, prompt and comment removed, continued lines joined."""
    joined = "\n".join(fences(text, "")).replace("\\\n", " ")
    lines = (re.sub(r"^\$ ", "", line).partition("  #")[0].strip() for line in joined.splitlines())
    return [line for line in lines if line.startswith("manyicl ")]


def parse_command(line: str) -> None:
    """Parse a command line as the real program would, without running it; raises what the parser raises."""
    command = typer.main.get_command(app)
    for leaf in walk_commands(command):
        leaf.callback = lambda **arguments: None
    command.main(shlex.split(line)[1:], prog_name="manyicl", standalone_mode=False)


def walk_commands(command: Any) -> Iterator[Any]:
    yield command
    for child in getattr(command, "commands", {}).values():
        yield from walk_commands(child)


def leaf_commands(command: Any, prefix: str = "manyicl") -> Iterator[tuple[str, Any]]:
    """Full names of the commands that do something, with their objects."""
    for name, child in command.commands.items():
        if hasattr(child, "commands"):
            yield from leaf_commands(child, f"{prefix} {name}")
        else:
            yield f"{prefix} {name}", child


def option_rows(command: Any) -> list[str]:
    """The table rows of a command's arguments and options."""
    rows = []
    for parameter in command.params:
        if parameter.name == "help":
            continue
        argument = parameter.param_type_name == "argument"
        shown = parameter.name.upper() if argument else ", ".join((*parameter.opts, *parameter.secondary_opts))
        default = "required" if parameter.required else show(parameter.default)
        rows.append(f"| `{shown}` | {default} | {parameter.help} |")
    return rows


def key_rows(section: type[BaseModel], prefix: str = "") -> list[str]:
    """The table rows of a section's keys: name, type, default, description; sub-sections in place."""
    rows = []
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            rows += key_rows(field.annotation, f"{prefix}{name}.")
        else:
            default = "required" if field.is_required() else show(field.get_default(call_default_factory=True))
            rows.append(f"| `{prefix}{name}` | {show_type(field)} | {default} | {field.description} |")
    return rows


def show(value: object) -> str:
    """A default as YAML writes it."""
    if value is None or value == ():
        return "none"
    return f"`{yaml.safe_dump(value, default_flow_style=True, width=1000).removesuffix('...' + chr(10)).strip() or chr(39) * 2}`"


def show_type(field: FieldInfo) -> str:
    """A key's type and range in words."""
    words = type_words(field.annotation)
    for bound in field.metadata:
        for kind, sign in (("ge", "≥"), ("gt", ">"), ("le", "≤"), ("lt", "<")):
            if isinstance(bound, getattr(annotated_types, kind.capitalize())):
                words += f" {sign} {getattr(bound, kind)}"
    return words


def type_words(annotation: Any) -> str:
    origin = get_origin(annotation)
    if origin in (Union, types.UnionType):
        return " or ".join(type_words(member) for member in get_args(annotation))
    if origin is Literal:
        return ", ".join(f"`{choice}`" for choice in get_args(annotation))
    if annotation is type(None):
        return "none"
    if origin in (list, dict):
        return f"{'list' if origin is list else 'mapping'} of {type_words(get_args(annotation)[-1])}"
    return {str: "text", int: "integer", float: "number", bool: "true or false", Any: "anything"}.get(
        annotation, getattr(annotation, "__name__", str(annotation))
    )


def assert_rows(page: str, rows: list[str]) -> None:
    missing = [row for row in rows if row not in read(DOCS / "reference" / page).splitlines()]
    assert not missing, f"docs/reference/{page} lacks these lines:\n" + "\n".join(missing)


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_relative_links_resolve(path: Path) -> None:
    targets = [target.partition("#")[0] for target in _LINK.findall(_FENCE.sub("", read(path)))]
    relative = [target for target in targets if target and not re.match(r"[a-z]+:", target)]
    assert [target for target in relative if not (path.parent / target).exists()] == []


@pytest.mark.parametrize(
    ("path", "line"),
    [(path, line) for path in PAGES for line in command_lines(read(path))],
    ids=lambda value: name_of(value) if isinstance(value, Path) else value,
)
def test_command_of_the_documentation_parses(path: Path, line: str) -> None:
    parse_command(line)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("manyicl evaluate --model default --output x --shot 4", "No such option: --shot"),
        ("manyicl tune recipe.yaml", "No such command 'tune'"),
        ("manyicl predict --model default --queries x --output y", "Missing option '--demonstrations'"),
        ("manyicl inspect recipe.yaml --row many", "Invalid value for '--row'"),
    ],
)
def test_a_wrong_command_does_not_parse(line: str, message: str) -> None:
    # typer 0.29 brings its own copy of click, so no class can be named.
    with pytest.raises(Exception) as raised:  # noqa: PT011
        parse_command(line)
    assert any(base.__name__ == "UsageError" for base in type(raised.value).__mro__)
    assert message in raised.value.format_message()  # type: ignore[attr-defined]


def test_commands_are_found_in_text() -> None:
    text = "```\n$ manyicl tasks list    # comment\nmanyicl export a \\\n  b\nmake demo\n```\n```python\nmanyicl no\n```\n"
    assert command_lines(text) == ["manyicl tasks list", "manyicl export a    b"]


def python_sources() -> list[tuple[str, str]]:
    blocks = [(name_of(path), block) for path in PAGES for block in fences(read(path), "python")]
    return blocks + [(name_of(path), read(path)) for path in EXAMPLES]


@pytest.mark.parametrize(("where", "source"), python_sources(), ids=lambda value: value if "\n" not in value else "code")
def test_python_of_the_documentation_uses_what_exists(where: str, source: str) -> None:
    check_python(source, where)


def check_python(source: str, where: str) -> None:
    """Compile a source; names imported from manyicl must exist, and calls of them must fit their signatures."""
    tree = ast.parse(source, filename=where)
    imported: dict[str, Any] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "manyicl":
            if node.module == "manyicl.lm_eval_adapter" and importlib.util.find_spec("lm_eval") is None:
                continue
            module = __import__(node.module, fromlist=["x"])
            imported |= {alias.asname or alias.name: getattr(module, alias.name) for alias in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "manyicl":
            assert node.attr in manyicl.__all__, f"{where}: manyicl.{node.attr}"
        if not isinstance(node, ast.Call):
            continue
        called = imported.get(node.func.id) if isinstance(node.func, ast.Name) else None
        if called is not None and not any(isinstance(argument, ast.Starred) for argument in node.args):
            keywords = {keyword.arg: None for keyword in node.keywords if keyword.arg}
            inspect.signature(called).bind(*node.args, **keywords)


def test_python_that_is_wrong_is_caught() -> None:
    check_python("from manyicl import load_task\nload_task('x', name='y')\n", "here")
    with pytest.raises(AttributeError, match="load_tasks"):
        check_python("from manyicl import load_tasks\n", "here")
    with pytest.raises(TypeError, match="unexpected keyword argument 'nam'"):
        check_python("from manyicl import load_task\nload_task('x', nam='y')\n", "here")
    with pytest.raises(SyntaxError):
        check_python("load_task('x'", "here")


def test_recipe_reference_holds_every_key() -> None:
    assert_rows("recipe.md", key_rows(Recipe))


def test_study_reference_holds_every_key() -> None:
    rows = key_rows(StudyRecipe) + key_rows(FamilyConfig, "held_out_family.") + key_rows(SeedsConfig, "training_seeds.")
    assert_rows("study-recipe.md", rows)


def test_task_reference_holds_every_key() -> None:
    fields = {name: field for name, field in TaskFile.model_fields.items() if name != "hub"}
    rows = [row for row in key_rows(TaskFile) if row.split("`")[1] in fields]
    assert len(rows) == len(fields)
    assert_rows("task-yaml.md", rows + key_rows(HubSource, "hub."))


def test_records_reference_holds_every_field() -> None:
    text = read(DOCS / "reference" / "records.md")
    names = [*EvaluationRecord.model_fields, *QueryScores.model_fields]
    assert [name for name in names if f"`{name}`" not in text] == []
    described = [field.description for field in EvaluationRecord.model_fields.values() if field.description]
    assert [words for words in described if words not in text] == []


def test_command_reference_holds_every_option() -> None:
    text = read(DOCS / "reference" / "cli.md")
    documented = {}
    for section in text.split("\n## ")[1:]:
        heading, _, body = section.partition("\n")
        documented[heading] = [line for line in body.splitlines() if line.startswith("| `")]
    leaves = dict(leaf_commands(typer.main.get_command(app)))
    assert documented == {name: option_rows(leaf) for name, leaf in leaves.items()}
    assert [leaf.help for leaf in leaves.values() if leaf.help not in text] == []


def test_error_reference_holds_every_error() -> None:
    names = [name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, Exception)]
    text = read(DOCS / "reference" / "errors.md")
    assert [name for name in names if f"`{name}`" not in text] == []


def test_python_reference_holds_every_public_name() -> None:
    text = read(DOCS / "reference" / "python-api.md")
    assert [name for name in manyicl.__all__ if f"`{name}`" not in text] == []


def tree_paths(text: str) -> list[str]:
    """Paths of the annotated tree in the last code block of a page; folders end with a slash, and depth is two spaces."""
    folders: list[str] = []
    paths = []
    for line in fences(text, "")[-1].splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        entry = line.split()[0]
        folders = folders[:depth]
        paths.append("".join(folders) + entry)
        if entry.endswith("/"):
            folders.append(entry)
    return paths


def test_every_path_of_the_annotated_tree_exists() -> None:
    paths = tree_paths(read(ROOT / "README.md"))
    assert {"Makefile", "src/manyicl/", "src/manyicl/tasks/readers.py"} <= set(paths)
    assert [path for path in paths if not (ROOT / path).exists() or path.endswith("/") != (ROOT / path).is_dir()] == []


def test_every_room_stands_in_the_annotated_tree() -> None:
    paths = {path.rstrip("/") for path in tree_paths(read(ROOT / "README.md"))}
    rooms = [path for path in (ROOT / "src" / "manyicl").iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()]
    assert len(rooms) > 20
    assert [name_of(room) for room in rooms if room.name != "__main__.py" and name_of(room) not in paths] == []


def test_every_example_says_what_it_costs() -> None:
    assert [path.name[:3] for path in EXAMPLES] == [f"{number:02}_" for number in range(1, len(EXAMPLES) + 1)]
    in_tree = [path for path in tree_paths(read(ROOT / "README.md")) if path.startswith("examples/0")]
    assert in_tree == [name_of(path) for path in EXAMPLES]
    for path in EXAMPLES:
        documentation = ast.get_docstring(ast.parse(read(path))) or ""
        assert "Costs" in documentation, path.name
