"""The hub catalogue: every task.yaml reads rows with its data set's columns; roles keep related sets on one side.

The hub is not reached. `datasets.load_dataset` hands out the invented rows of catalogue_rows.yaml, so that the reader is the
real one: hub ids, splits, templates, labels, options and rows left out are held, but not what the hub holds today.
"""

import json
import re
import types
from pathlib import Path
from typing import Any

import pytest
import yaml

from manyicl.config import load_recipe
from manyicl.metrics import read_number
from manyicl.tasks.descriptions import TaskFile, read_task_file
from manyicl.tasks.readers import load_suite, load_task
from manyicl.tasks.task import FAMILIES

ROOT = Path(__file__).parents[1]
CATALOGUE = ROOT / "recipes" / "catalogue"
DATA: dict[str, dict[str, Any]] = yaml.safe_load((Path(__file__).parent / "catalogue_rows.yaml").read_text(encoding="utf-8"))
ROLES: dict[str, list[str]] = yaml.safe_load((CATALOGUE / "suite.yaml").read_text(encoding="utf-8"))
FILES = {path.parent.name: read_task_file(path) for path in sorted(CATALOGUE.glob("*/task.yaml"))}
RECIPES = [f"{model}-{length}" for model in ("mistral-7b", "gemma-7b", "llama-3-8b") for length in ("8k", "32k")]
COLLECTIONS = ("nyu-mll/glue", "aps/super_glue")  # Parts with nothing in common; the parts of any other set are related.
RELATED = (
    ("glue_sst2", "rotten_tomatoes", "subjectivity"),
    ("glue_mnli", "wanli"),
    ("glue_qnli", "squad"),
    ("scitail", "sciq", "arc_easy", "arc_challenge"),
    ("boolq", "nq_open"),
    ("aqua_rat", "math_qa"),
    ("svamp", "mawps", "multiarith"),
)


@pytest.fixture
def hub(monkeypatch):
    """Hands out the rows of whichever task `hub.name` says, and keeps what was asked for."""
    datasets = pytest.importorskip("datasets")
    state = types.SimpleNamespace(name="", asked=[])

    def load_dataset(path, name=None, *, revision=None, split=None):
        state.asked.append((path, name, revision, split))
        names = [state.name] if state.name else [task for task, file in FILES.items() if matches(file, path, name, split)]
        return datasets.Dataset.from_list(DATA[names[0]]["rows"])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return state


def matches(file: TaskFile, path: str, name: str | None, split: str) -> bool:
    assert file.hub is not None
    return (file.hub.path, file.hub.name) == (path, name) and split in (file.hub.train_split, file.hub.test_split)


def row_number(source: str) -> int:
    return int(source.rpartition(":")[2])


def role_of(name: str) -> str:
    return next(role for role, names in ROLES.items() if name in names)


def test_there_are_enough_tasks_in_every_family() -> None:
    assert len(FILES) >= 45
    families = [file.family for file in FILES.values()]
    assert {family: families.count(family) >= 5 for family in FAMILIES} == dict.fromkeys(FAMILIES, True)


def test_every_task_has_rows_here_and_one_role() -> None:
    assert sorted(DATA) == sorted(FILES)
    assert set(ROLES) == {"meta_training", "validation", "held_out"}
    assert sorted(name for names in ROLES.values() for name in names) == sorted(FILES)


def test_every_role_has_all_families() -> None:
    for role in ("meta_training", "validation", "held_out"):
        assert {FILES[name].family for name in ROLES[role]} == set(FAMILIES), role


@pytest.mark.parametrize("name", FILES)
def test_a_task_names_its_source(name: str) -> None:
    file = FILES[name]
    assert file.hub is not None
    assert re.fullmatch(r"[\w.-]+/[\w.-]+", file.hub.path)
    assert file.hub.revision == "main" or re.fullmatch(r"[0-9a-f]{40}", file.hub.revision or "")
    assert file.hub.train_split != file.hub.test_split
    assert file.hub.shuffle_seed == 0
    assert file.instruction
    assert (file.metric in ("accuracy", "macro_f1")) == bool(file.labels or file.options)
    assert (file.max_answer_tokens is None) == bool(file.labels or file.options)


@pytest.mark.parametrize("name", FILES)
def test_rows_become_the_examples_that_are_meant(name: str, hub) -> None:
    hub.name, file, data = name, FILES[name], DATA[name]
    task = load_task(CATALOGUE / name)
    assert file.hub is not None
    source = (file.hub.path, file.hub.name, file.hub.revision)
    assert hub.asked == [(*source, file.hub.train_split), (*source, file.hub.test_split)]
    assert (task.name, task.family, task.metric, task.instruction) == (name, file.family, file.metric, file.instruction)
    nothing: list[list[str]] = [[] for _ in data["examples"]]
    for split, examples in ((file.hub.train_split, task.train), (file.hub.test_split, task.test)):
        ordered = sorted(examples, key=lambda example: row_number(example.source))
        assert [[example.input, example.answer] for example in ordered] == data["examples"]
        assert [list(example.options) for example in ordered] == data.get("options", nothing)
        assert [list(example.accepted) for example in ordered] == data.get("accepted", nothing)
        assert {example.source.rpartition(":")[0] for example in ordered} == {f"{file.hub.path}/{split}"}


@pytest.mark.parametrize("name", [name for name, file in FILES.items() if file.labels])
def test_labels_cover_the_classes_with_distinct_words(name: str) -> None:
    classes, labels = DATA[name]["classes"], FILES[name].labels
    assert labels is not None
    if isinstance(classes, dict):
        assert len(labels) == classes["count"]
    else:
        raw = [str(number) for number in range(classes)] if isinstance(classes, int) else classes
        assert sorted(labels) == sorted(raw)
    words = [word.casefold() for word in (labels.values() if isinstance(labels, dict) else labels)]
    assert len(set(words)) == len(words)


@pytest.mark.parametrize("name", [name for name, file in FILES.items() if file.metric == "numeric_match"])
def test_the_number_compared_is_the_answer(name: str) -> None:
    assert [read_number(answer) for _, answer in DATA[name]["examples"]] == DATA[name]["numbers"]


def test_the_rows_of_a_task_share_their_columns() -> None:
    for name, data in DATA.items():
        columns = [set(row) for row in data["rows"]]
        assert all(each == columns[0] for each in columns), name


def test_the_suite_is_read_with_its_roles(hub) -> None:
    suite = load_suite(CATALOGUE)
    assert (suite.name, len(suite.tasks)) == ("catalogue", len(FILES))
    assert {role: list(getattr(suite, role)) for role in ROLES} == ROLES
    assert suite.tasks["anli_r2"].train[0].source.startswith("facebook/anli/train_r2:")


def test_related_sets_have_one_role() -> None:
    groups: dict[str, set[str]] = {}
    for name, file in FILES.items():
        assert file.hub is not None
        if file.hub.path not in COLLECTIONS:
            groups.setdefault(file.hub.path, set()).add(name)
    for group in [*groups.values(), *RELATED]:
        assert len({role_of(name) for name in group}) == 1, group


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_runs_the_catalogue(name: str) -> None:
    recipe = load_recipe(ROOT / "recipes" / f"{name}.yaml")
    assert (recipe.tasks, recipe.output, recipe.meta_training) == ("recipes/catalogue", f"runs/{name}", None)
    assert recipe.model.split("/")[-1].lower().replace("meta-", "").startswith(name.rpartition("-")[0])
    assert recipe.episodes.max_tokens == {"8k": 8192, "32k": 32768}[name.rpartition("-")[2]]
    training = recipe.training
    assert (training.tune, training.gradient_checkpointing, training.validate_checkpoints) == ("lora", True, True)
    assert recipe.episodes.max_tokens * training.rows_per_step == 131072
    assert training.num_steps % training.save_every == 0


@pytest.mark.parametrize("kind", ["llama", "gemma"])
def test_the_page_makes_a_model_with_more_positions(tmp_path: Path, monkeypatch, kind: str) -> None:
    """The page's code, run on a tiny config in the download's place."""
    import huggingface_hub
    import transformers

    def snapshot_download(repo_id: str, *, local_dir: str, **options: Any) -> str:
        folder = tmp_path / local_dir
        folder.mkdir(parents=True)
        config = {
            "model_type": kind,
            "architectures": [{"llama": "LlamaForCausalLM", "gemma": "GemmaForCausalLM"}[kind]],
            "max_position_embeddings": 8192,
            "rope_theta": 5000.0,
            "vocab_size": 32,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 8,
        }
        (folder / "config.json").write_text(json.dumps(config))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    page = (ROOT / "docs" / "how-to" / "full-size-study.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"^```python\n(.*?)^```$", page, flags=re.MULTILINE | re.DOTALL)
    exec(compile(code, "full-size-study.md", "exec"), {})
    folders = {path.parent.name: path.parent for path in tmp_path.rglob("config.json")}
    named = {load_recipe(ROOT / "recipes" / f"{name}.yaml").model for name in ("gemma-7b-32k", "llama-3-8b-32k")}
    assert {f"models/{name}" for name in folders} == named
    for folder in folders.values():
        config = transformers.AutoConfig.from_pretrained(folder)
        rotary = transformers.AutoModelForCausalLM.from_config(config).model.rotary_emb
        assert config.max_position_embeddings == 32768
        assert (rotary.rope_type, config.rope_parameters["rope_theta"], config.rope_parameters["factor"]) == ("yarn", 5000.0, 4.0)
