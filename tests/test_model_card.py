"""The card of a run holds what the run's files and records say, in a form that the Hub reads, and overwrites nobody's words."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import pytest
import yaml

from manyicl.config import parse_recipe
from manyicl.errors import RecordsError, UserInputError
from manyicl.records import EvaluationRecord, read_records
from manyicl.reporting.model_card import MARK, render_model_card, write_model_card, write_study_cards
from manyicl.reporting.terminal import markdown_curves

FOUNDATION = Path(__file__).parents[1] / "docs" / "results" / "foundation"
NAME = "runs/foundation/tuned"


@pytest.fixture(scope="module")
def records() -> list[EvaluationRecord]:
    return read_records(FOUNDATION / "records.jsonl.gz")


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """A finished run, of which there are only the files that the card is made from."""
    folder = tmp_path / "my-run"
    folder.mkdir()
    for name in ("recipe.yaml", "run.json", "summary.json"):
        shutil.copy(FOUNDATION / name, folder / name)
    return folder


def change_recipe(folder: Path, **changes: object) -> None:
    content = yaml.safe_load((folder / "recipe.yaml").read_text(encoding="utf-8"))
    (folder / "recipe.yaml").write_text(yaml.safe_dump(content | changes), encoding="utf-8")


def test_the_hub_reads_the_front_matter(run_folder: Path, records: list[EvaluationRecord]) -> None:
    path = write_model_card(run_folder, records, model=NAME)
    assert path == run_folder / "README.md"
    card = huggingface_hub.ModelCard.load(path)
    assert card.data.base_model == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert card.data.library_name == "peft"
    assert card.data.tags == ["manyicl", "in-context-learning", "many-shot"]
    found = {(each.dataset_name, each.metric_name): each for each in card.data.eval_results}
    own = [record.value for record in records if (record.model, record.task, record.shots) == (NAME, "sms_spam", "max")]
    assert len(own) == 3
    best = found["sms_spam", "macro_f1, max shots, 3 orders of demonstrations"]
    assert best.metric_value == round(100 * sum(own) / 3, 2)
    assert (best.task_type, best.metric_type) == ("text-classification", "macro_f1")
    points = {(record.task, record.shots) for record in records if record.model == NAME}
    assert len(found) == len(points) > 50


def test_the_card_says_what_the_files_say(run_folder: Path, records: list[EvaluationRecord]) -> None:
    text = write_model_card(run_folder, records, model=NAME).read_text(encoding="utf-8")
    summary = json.loads((run_folder / "summary.json").read_text(encoding="utf-8"))
    run = json.loads((run_folder / "run.json").read_text(encoding="utf-8"))
    for line in (
        MARK,
        "# my-run",
        f"| updates | {summary['updates']} |",
        f"| tokens | {summary['tokens']:,} |",
        f"| answers | {summary['answers']:,} |",
        f"| time of updates | {summary['seconds'] / 60:.0f} min |",
        f"| peak memory | {summary['peak_memory_bytes'] / 2**30:.1f} GiB |",
        "The base model is dequantised from Q4_1.",
        f"Tasks whose examples training and validation read: {', '.join(run['data'])}.",
        f"Versions: {', '.join(f'{name} {version}' for name, version in run['versions'].items())}.",
    ):
        assert line in text.splitlines()
    assert markdown_curves([record for record in records if record.model == NAME]) in text
    assert "default, " not in text
    block = text.partition("```yaml\n")[2].partition("```")[0]
    assert parse_recipe(yaml.safe_load(block)) == parse_recipe(
        yaml.safe_load((run_folder / "recipe.yaml").read_text(encoding="utf-8"))
    )


def test_without_records_there_are_no_results(run_folder: Path) -> None:
    text = render_model_card(run_folder)
    assert "model-index" not in text
    assert "## Results" not in text
    assert "Each training row holds examples of one task." in text


def test_a_base_that_is_no_hub_id_is_left_out(run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "mine").mkdir(parents=True)
    for model, base in (
        ("models/mine", None),
        ("a/model.gguf", None),
        ("/some/where/else", None),
        ("mistralai/Mistral-7B-v0.3", "mistralai/Mistral-7B-v0.3"),
    ):
        change_recipe(run_folder, model=model)
        data = huggingface_hub.ModelCard(render_model_card(run_folder)).data
        assert data.base_model == base, model


def test_whole_weights_and_packed_rows_are_said(run_folder: Path) -> None:
    change_recipe(run_folder, training={"tune": "full"}, episodes={"num_shots": 5, "pack": True})
    text = render_model_card(run_folder)
    assert "library_name: transformers" in text
    assert "All weights of `HuggingFaceTB/SmolLM2-135M-Instruct`" in text
    assert "Each training row holds" not in text


def test_a_card_that_somebody_has_written_is_kept(run_folder: Path) -> None:
    path = write_model_card(run_folder)
    first = path.read_text(encoding="utf-8")
    assert write_model_card(run_folder).read_text(encoding="utf-8") == first
    path.write_text("# My own words\n", encoding="utf-8")
    with pytest.raises(UserInputError, match=r"README.md: was not written by this command. Move it away, or keep it.$"):
        write_model_card(run_folder)
    assert path.read_text(encoding="utf-8") == "# My own words\n"


def test_records_of_other_models_are_refused(run_folder: Path, records: list[EvaluationRecord]) -> None:
    with pytest.raises(RecordsError) as raised:
        write_model_card(run_folder, records)
    assert str(raised.value) == (
        f"none of {len(records)} records is of {str(run_folder)!r} (default, {NAME}). Name it: --model NAME."
    )
    assert not (run_folder / "README.md").exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("summary.json", None, "summary.json: cannot be read (No such file or directory). A run was started here and has not"),
        ("run.json", None, "run.json: cannot be read (No such file or directory). Give the folder of a finished run."),
        ("summary.json", "{", "summary.json: is damaged (Expecting property name enclosed in double quotes"),
        ("summary.json", '{"updates": 3, "tokens": 4}', "summary.json: has no answers, seconds, peak_memory_bytes. Give"),
        ("run.json", "[]", "run.json: holds a list, not a mapping. Give the folder of a finished run."),
        ("recipe.yaml", "modle: x\n", "recipe.yaml: unknown key 'modle'; the nearest valid one is 'model'"),
    ],
)
def test_a_broken_run_is_refused(run_folder: Path, name: str, content: str | None, message: str) -> None:
    if content is None:
        (run_folder / name).unlink()
    else:
        (run_folder / name).write_text(content, encoding="utf-8")
    with pytest.raises(UserInputError) as raised:
        write_model_card(run_folder)
    assert message in str(raised.value)


def test_the_command_writes_the_card(run_folder: Path, run_cli: Callable[..., tuple[int, str, str]]) -> None:
    records = FOUNDATION / "records.jsonl.gz"
    code, printed, _ = run_cli("card", run_folder, "--records", records, "--model", NAME)
    assert (code, printed) == (0, f"written to {run_folder / 'README.md'}\n")
    own = [record for record in read_records(records) if record.model == NAME]
    assert (run_folder / "README.md").read_text(encoding="utf-8") == render_model_card(run_folder, own)


def test_the_published_card_of_the_study_is_made_from_its_run_and_its_records(tmp_path: Path) -> None:
    results = FOUNDATION.parent
    shutil.copytree(results / "study-card", tmp_path / "run")
    records = read_records(results / "study" / "records.jsonl.gz")
    assert write_study_cards({"all_answers/seed-0": tmp_path / "run"}, records) == []
    assert (tmp_path / "run" / "README.md").read_text(encoding="utf-8") == (results / "study-card.md").read_text(encoding="utf-8")


def test_a_card_of_ones_own_hinders_no_other(tmp_path: Path) -> None:
    """A family left out has a task that is trained on elsewhere, and its card shows it."""
    results = FOUNDATION.parent
    runs = {name: tmp_path / name.replace("/", "-") for name in ("zero_shot/seed-0", "all_answers/family/seed-0")}
    for folder in runs.values():
        shutil.copytree(results / "study-card", folder)
    own, other = (folder / "README.md" for folder in runs.values())
    own.write_bytes(b"caf\xe9")
    records = read_records(results / "study" / "records.jsonl.gz")
    (refused,) = write_study_cards(runs, records)
    assert refused.startswith(f"{own}: was not written by this command.")
    assert own.read_bytes() == b"caf\xe9"
    card = huggingface_hub.ModelCard.load(other)
    assert {each.dataset_name for each in card.data.eval_results} == {"rte", "sick"}


@pytest.mark.parametrize(
    ("num_shots", "words"),
    [
        (0, "tuned without demonstrations with"),
        (5, "tuned behind 5 demonstrations with"),
        (None, "tuned by many-shot in-context"),
    ],
)
def test_a_card_says_how_the_run_was_tuned(run_folder: Path, num_shots: int | None, words: str) -> None:
    recipe = yaml.safe_load((run_folder / "recipe.yaml").read_text(encoding="utf-8"))
    change_recipe(run_folder, episodes=recipe["episodes"] | {"num_shots": num_shots})
    assert words in render_model_card(run_folder)
