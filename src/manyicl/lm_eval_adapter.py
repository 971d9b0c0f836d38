"""lm-evaluation-harness with our scoring: requests that share a context's beginning share one prefix.

In: the harness' requests. Out: what its own `hf` model answers, from a fraction of the work: requests are grouped by the longest
common beginning of their contexts, which is prefilled once; the continuations of a context are a label trie. What is lost:
nothing within bf16 rounding; `loglikelihood_rolling` (perplexity of documents) is not offered.

Contexts share a beginning only if the shots are the same for every document. The harness draws new ones for each unless the
task says `fewshot_config: {sampler: first_n}`.

    python -m manyicl.lm_eval_adapter run --model manyicl --model_args model=default --tasks TASK --num_fewshot 64

The extra `lm-eval` installs the harness.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from manyicl.attention import use_shared_prefix_attention
from manyicl.branching import check_positions, flatten_branches, judge_tokens, plan_batches, query_branch
from manyicl.dtypes import Dtype
from manyicl.encoding import Encoder
from manyicl.errors import ModelError
from manyicl.label_trie import LabelTrie, TokenIds, build_trie
from manyicl.modeling import load_model
from manyicl.prefix import Prefix, prefill
from manyicl.scoring import generate_answers

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
except ImportError as error:
    raise ModelError("lm-eval is not installed. Type: pip install 'manyicl[lm-eval]'") from error

MIN_SHARED_TOKENS = 32

Request = tuple[tuple[str, str], list[int], list[int]]


@register_model("manyicl")  # type: ignore[misc, untyped-decorator, unused-ignore]
class ManyICLModel(TemplateLM):  # type: ignore[misc, unused-ignore]
    """The model `manyicl` of lm-evaluation-harness.

    Args:
        model: A model's name as everywhere in manyicl: `default`, a folder, a hub id, a .gguf file or a run.
        dtype: auto, bfloat16 or float32.
        max_gen_toks: Tokens that a generation may have, where its task does not say.
        options: What the harness hands to every model (`batch_size`, `device`, …); batches are chosen from free memory.
    """

    def __init__(self, model: str = "default", dtype: Dtype = "auto", max_gen_toks: int = 256, **options: Any) -> None:
        super().__init__()
        loaded = load_model(model, dtype=dtype)
        self.model = loaded.model
        self.tokenizer = loaded.tokenizer
        self.max_length = loaded.context_tokens
        self.max_gen_toks = max_gen_toks
        use_shared_prefix_attention(self.model)

    @property
    def eot_token_id(self) -> int:
        """The end token."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """What stands before a continuation without context: the start token, or the end token where there is none."""
        start = self.tokenizer.bos_token_id
        return self.eot_token_id if start is None else int(start)

    @property
    def tokenizer_name(self) -> str:
        """Under which name the harness keeps what it has rendered."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The text of a conversation, by the tokenizer's own template."""
        return str(
            self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids; special tokens as the tokenizer adds them by itself, but no second start token."""
        options = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        start = self.tokenizer.bos_token
        if add_special_tokens is None and start and string.startswith(start):
            options = {"add_special_tokens": False}
        return list(self.tokenizer.encode(string, **options))

    @torch.inference_mode()
    def _loglikelihood_tokens(self, requests: Sequence[Request], **_: Any) -> list[tuple[float, bool]]:
        """(log-probability, whether greedy decoding gives it) of each continuation."""
        contexts: dict[TokenIds, list[int]] = {}
        for place, request in enumerate(requests):
            contexts.setdefault(tuple(request[1]), []).append(place)
        answers: list[tuple[float, bool]] = [(float("nan"), False)] * len(requests)
        for shared, group in group_contexts(list(contexts)):
            prefix = prefill(self.model, _Opening(shared), ())
            tries = [build_trie([tuple(requests[place][2]) for place in contexts[context]]) for context in group]
            queries = [context[len(shared) :] for context in group]
            for context, judged in zip(group, _judge(self.model, prefix, queries, tries), strict=True):
                for place, answer in zip(contexts[context], judged, strict=True):
                    answers[place] = answer
        return answers

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Not offered: documents without a context share no prefix.

        Raises:
            ModelError: always.
        """
        raise ModelError(f"{len(requests)} requests ask for the perplexity of documents, which shares no prefix. Use --model hf.")

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Greedy text up to the end token or the first stop string; stop strings are looked for when a text is whole.

        Raises:
            ModelError: a request asks for sampling.
        """
        places: dict[TokenIds, list[int]] = {}
        for place, request in enumerate(requests):
            text, options = request.args
            if options.get("do_sample") and options.get("temperature", 1.0):
                raise ModelError(f"request {place} asks for sampling (do_sample). Only greedy decoding is offered.")
            places.setdefault(tuple(self.tok_encode(text)), []).append(place)
        texts = [""] * len(requests)
        for shared, group in group_contexts(list(places)):
            prefix = prefill(self.model, _Opening(shared), ())
            members = [place for context in group for place in places[context]]
            queries = [context[len(shared) :] for context in group for _ in places[context]]
            most = max(int(requests[place].args[1].get("max_gen_toks", self.max_gen_toks)) for place in members)
            found = generate_answers(self.model, prefix, queries, terminator_id=self.eot_token_id, max_new_tokens=most)
            for place, tokens in zip(members, found, strict=True):
                texts[place] = self._cut(tokens, requests[place].args[1])
        return texts

    def _cut(self, tokens: TokenIds, options: dict[str, Any]) -> str:
        """The text of an answer, up to its first stop string."""
        text = str(self.tokenizer.decode(list(tokens)[: int(options.get("max_gen_toks", self.max_gen_toks))]))
        until = options.get("until") or []
        for stop in [until] if isinstance(until, str) else until:
            if stop:
                text = text.split(stop)[0]
        return text


@dataclass(frozen=True)
class HarnessScore:
    """One metric of one task, as the harness reports it; no standard error where it has none."""

    task: str
    metric: str
    value: float
    standard_error: float | None


def evaluate_harness_tasks(
    model: str, tasks: Sequence[str], *, dtype: Dtype = "auto", include_path: str | None = None, limit: int | None = None
) -> list[HarnessScore]:
    """Scores of a model on tasks of the harness, each with the shots that the task itself asks for.

    Args:
        include_path: A folder of further tasks in the harness' own format.
        limit: Documents of each task at most.

    Raises:
        ModelError: a task is unknown, or its data set cannot be reached.
    """
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=include_path)
    unknown = [task for task in tasks if task not in manager.all_tasks]
    if unknown:
        raise ModelError(f"lm-eval knows no task {', '.join(unknown)}. `lm_eval --tasks list` shows its tasks.")
    try:
        found = simple_evaluate(
            model=ManyICLModel(model, dtype=dtype),
            tasks=list(tasks),
            limit=limit,
            task_manager=manager,
            log_samples=False,
            bootstrap_iters=1000,
        )
    except (OSError, ValueError) as error:
        raise ModelError(f"lm-eval cannot run {', '.join(tasks)}: {error}") from error
    scores = []
    for task, metrics in found["results"].items():
        for name, value in metrics.items():
            metric, _, rule = name.partition(",")
            if isinstance(value, (int, float)) and rule and not metric.endswith("_stderr"):
                spread = metrics.get(f"{metric}_stderr,{rule}")
                scores.append(HarnessScore(task, metric, float(value), spread if isinstance(spread, float) else None))
    return scores


class _Opening(Encoder):
    """Token ids in place of an opening, so that they are prefilled like any prefix."""

    def __init__(self, token_ids: TokenIds) -> None:
        self.token_ids = token_ids

    def encode_opening(self, instruction: str = "") -> TokenIds:
        return self.token_ids


def group_contexts(contexts: Sequence[TokenIds]) -> Iterator[tuple[TokenIds, list[TokenIds]]]:
    """Contexts by shared beginnings: (tokens that all of a group begin with, the group).

    A context joins the group before it (in the order of their tokens) if the group still shares half of the context's tokens,
    and `MIN_SHARED_TOKENS` at least. The last token of a context is never shared: its logits are needed.
    """
    group: list[TokenIds] = []
    shared: TokenIds = ()
    for context in sorted(contexts):
        common = _common(shared, context[:-1]) if group else context[:-1]
        if group and len(common) < max(MIN_SHARED_TOKENS, len(context) // 2):
            yield (shared if len(group) > 1 else ()), group
            group, common = [], context[:-1]
        group.append(context)
        shared = common
    if group:
        yield (shared if len(group) > 1 else ()), group


def _common(left: TokenIds, right: TokenIds) -> TokenIds:
    length = next((place for place, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))
    return left[:length]


def _judge(model: Any, prefix: Prefix, queries: Sequence[TokenIds], tries: Sequence[LabelTrie]) -> list[list[tuple[float, bool]]]:
    """(log-probability, whether greedy) of each continuation of each query."""
    check_positions(model, prefix, [len(query) + trie.num_answer_tokens - 1 for query, trie in zip(queries, tries, strict=True)])
    lengths = [len(query) + len(trie.tokens) for query, trie in zip(queries, tries, strict=True)]
    answers: list[list[tuple[float, bool]]] = [[] for _ in queries]
    for batch in plan_batches(model, lengths, [1 + len(trie.tokens) for trie in tries], max_batch_tokens=None):
        row = flatten_branches([query_branch(queries[i], tries[i]) for i in batch], prefix, model.device)
        ends = [int(start) + len(queries[i]) - 1 for start, i in zip(row.starts, batch, strict=True)]
        sources = np.concatenate([end + tries[i].edge_columns for end, i in zip(ends, batch, strict=True)])
        values, is_best = judge_tokens(model, row, sources, np.concatenate([tries[i].edge_tokens for i in batch]))
        stop = 0
        for i in batch:
            own = slice(stop, stop + len(tries[i].edges))
            greedy = [bool(is_best[own][list(path)].all()) for path in tries[i].paths]
            answers[i] = list(zip(tries[i].totals(values[own]).tolist(), greedy, strict=True))
            stop = own.stop
    return answers


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
