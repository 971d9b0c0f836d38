"""The adapter answers what lm-eval's own model answers; grouping by shared beginnings. Skipped where lm-eval is absent."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install lm-eval")

from manyicl import lm_eval_adapter
from manyicl.errors import ModelError
from manyicl.lm_eval_adapter import ManyICLModel, evaluate_harness_tasks, group_contexts

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning", "ignore::FutureWarning")


@pytest.fixture(scope="module")
def folder(tiny_model_folder: Callable[..., Path]) -> Path:
    return tiny_model_folder("llama")


@pytest.fixture(scope="module")
def own(folder: Path) -> ManyICLModel:
    return ManyICLModel(str(folder), dtype="float32")


@pytest.fixture(scope="module")
def harness(folder: Path) -> Any:
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=1)


def requests_of(shots: str) -> list[Any]:
    contexts = [f"{shots}question {number}:" for number in ("one", "two", "three")] + [""]
    pairs = [(context, f" {answer}") for context in contexts for answer in ("yes", "yesterday", "no", "a")]
    return [SimpleNamespace(args=pair) for pair in pairs]


@pytest.mark.parametrize("shots", ["", "question zero: yes\n" * 5])
def test_log_likelihoods_equal_those_of_the_harness_own_model(own: Any, harness: Any, shots: str) -> None:
    requests = requests_of(shots)
    expected = harness.loglikelihood(requests, disable_tqdm=True)
    found = own.loglikelihood(requests, disable_tqdm=True)
    assert len(found) == 16
    for mine, theirs in zip(found, expected, strict=True):
        assert mine[0] == pytest.approx(theirs[0], abs=1e-3)
        assert mine[1] == theirs[1]


def test_a_greedy_continuation_is_known_as_one(own: Any, harness: Any) -> None:
    context = own.tok_encode("question one:")
    text = own.generate_until([SimpleNamespace(args=("question one:", {"until": [], "max_gen_toks": 3}))])[0]
    tokens = own.tok_encode(text)[:2]
    requests = [(("", ""), context, tokens), (("", ""), context, [tokens[0], (tokens[1] + 1) % 256])]
    found = own._loglikelihood_tokens(requests)
    expected = harness._loglikelihood_tokens(requests, disable_tqdm=True)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]


def test_generations_stop_at_the_first_stop_string(own: Any) -> None:
    whole, cut = own.generate_until(
        [
            SimpleNamespace(args=("abc", {"until": [], "max_gen_toks": 6})),
            SimpleNamespace(args=("abc", {"until": [], "max_gen_toks": 6})),
        ]
    )
    assert whole == cut
    stop = whole[1:2]
    assert own.generate_until([SimpleNamespace(args=("abc", {"until": stop, "max_gen_toks": 6}))]) == [whole.split(stop)[0]]


def test_sampling_and_perplexity_are_refused(own: Any) -> None:
    with pytest.raises(ModelError, match=r"request 0 asks for sampling"):
        own.generate_until([SimpleNamespace(args=("a", {"do_sample": True, "temperature": 0.7}))])
    with pytest.raises(ModelError, match="1 requests ask for the perplexity"):
        own.loglikelihood_rolling([SimpleNamespace(args=("a",))])


def test_contexts_are_grouped_by_what_they_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lm_eval_adapter, "MIN_SHARED_TOKENS", 2)
    first, second, other, alone = (1, 2, 3, 4), (1, 2, 3, 5, 6), (7, 8, 9), (9, 9, 9)
    assert list(group_contexts([alone, second, first, other])) == [
        ((1, 2, 3), [first, second]),
        ((), [other]),
        ((), [alone]),
    ]
    assert list(group_contexts([(1, 2, 3), (1, 2, 3, 4)])) == [((1, 2), [(1, 2, 3), (1, 2, 3, 4)])]
    assert list(group_contexts([])) == []


@pytest.fixture
def odd_task(tmp_path: Path) -> Path:
    """A folder with a task of the harness, `odd`, of six documents."""
    rows = [{"question": f"is {number} odd", "answer": number % 2} for number in range(12)]
    for split, part in (("train", rows[:6]), ("test", rows[6:])):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part), encoding="utf-8")
    (tmp_path / "odd.yaml").write_text(
        f"""task: odd
dataset_path: json
dataset_kwargs: {{data_files: {{train: {tmp_path}/train.jsonl, test: {tmp_path}/test.jsonl}}}}
output_type: multiple_choice
training_split: train
test_split: test
fewshot_split: train
fewshot_config: {{sampler: first_n}}
doc_to_text: "{{{{question}}}}:"
doc_to_choice: ["no", "yes"]
doc_to_target: answer
metric_list: [{{metric: acc}}]
""",
        encoding="utf-8",
    )
    return tmp_path


def test_a_task_of_the_harness_gives_the_same_result(own: Any, harness: Any, odd_task: Path) -> None:
    import lm_eval
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(odd_task), include_defaults=False)
    results = []
    for model in (own, harness):
        outcome = lm_eval.simple_evaluate(
            model=model, tasks=["odd"], num_fewshot=4, task_manager=manager, bootstrap_iters=0, log_samples=True
        )
        likelihoods = [pair[0] for line in outcome["samples"]["odd"] for pair in line["filtered_resps"]]
        results.append((outcome["results"]["odd"]["acc,none"], likelihoods))
    assert len(results[0][1]) == 12
    assert results[0][0] == results[1][0]
    assert results[0][1] == pytest.approx(results[1][1], abs=1e-3)


def test_scores_of_tasks_are_those_of_the_harness(own: Any, folder: Path, odd_task: Path) -> None:
    import lm_eval
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(odd_task))
    expected = lm_eval.simple_evaluate(model=ManyICLModel(str(folder)), tasks=["odd"], limit=5, task_manager=manager)
    found = evaluate_harness_tasks(str(folder), ["odd"], include_path=str(odd_task), limit=5)
    assert [(score.task, score.metric, score.value) for score in found] == [
        ("odd", "acc", expected["results"]["odd"]["acc,none"])
    ]
    assert found[0].standard_error == pytest.approx(expected["results"]["odd"]["acc_stderr,none"])
    with pytest.raises(ModelError, match="lm-eval knows no task even, nor"):
        evaluate_harness_tasks(str(folder), ["odd", "even", "nor"], include_path=str(odd_task))


def test_a_data_set_that_is_not_there_is_named(folder: Path, odd_task: Path) -> None:
    (odd_task / "test.jsonl").unlink()
    with pytest.raises(ModelError, match=r"lm-eval cannot run odd: .*test\.jsonl"):
        evaluate_harness_tasks(str(folder), ["odd"], include_path=str(odd_task))
