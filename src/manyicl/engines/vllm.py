"""The vLLM engine: the same tokens as the native engine, through vLLM's prefix cache.

In: a plain checkpoint, which `manyicl export` writes, and text that our encoder turns into token ids; vLLM is never given text.
Out: text; labels chosen by constrained decoding; or exact label scores.

What is lost: `pick` decodes greedily within the label strings. It takes the most probable next token that some label still
allows, which need not lead to the most probable label, and it may spell a label in other tokens than the encoder's. `choose`
asks for the log-probability of every label token, which is exact and costs the whole prefix for every query and label, since
vLLM reads no cache for it. For label tasks the native engine is the one to take.

vLLM is imported when an engine is made; the extra `vllm` installs it. It reads its own environment variables, such as
VLLM_CPU_KVCACHE_SPACE (GiB of its cache) and VLLM_CPU_OMP_THREADS_BIND.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from manyicl.encoding import Encoder
from manyicl.errors import BudgetError, ModelError
from manyicl.tasks.task import Example


@dataclass(frozen=True)
class TokenPrefix:
    """Demonstrations as token ids; their keys and values lie in vLLM's cache.

    Attributes:
        token_ids: The tokens, opening included.
        stops: `stops[k]` is the number of tokens of the opening and the first k demonstrations.
    """

    token_ids: tuple[int, ...]
    stops: tuple[int, ...]

    @property
    def num_shots(self) -> int:
        """Demonstrations in the prefix."""
        return len(self.stops) - 1

    @property
    def num_tokens(self) -> int:
        """Tokens in the prefix."""
        return len(self.token_ids)

    def trim(self, num_shots: int) -> TokenPrefix:
        """The prefix of the first `num_shots` demonstrations.

        Raises:
            BudgetError: the prefix holds fewer demonstrations.
        """
        if not 0 <= num_shots <= self.num_shots:
            raise BudgetError(
                f"the prefix holds {self.num_shots} demonstrations, not {num_shots}. Prefill more, or ask for fewer."
            )
        return TokenPrefix(self.token_ids[: self.stops[num_shots]], self.stops[: num_shots + 1])


class VllmEngine:
    """Runs a merged checkpoint in vLLM.

    Args:
        folder: A plain checkpoint, as `manyicl export` writes it; adapters must be merged.
        encoder: Turns text into the tokens that the model was tuned on; its tokenizer reads answers back.
        context_tokens: Tokens that demonstrations, query and answer may have together.
        options: Arguments of `vllm.LLM`, such as `enforce_eager=True`, `max_num_seqs` or `kv_cache_memory_bytes`.

    Raises:
        ModelError: vLLM is not installed, or the folder is no plain checkpoint.
    """

    def __init__(self, folder: str | Path, encoder: Encoder, *, context_tokens: int, **options: Any) -> None:
        if not (Path(folder) / "config.json").is_file():
            raise ModelError(f"{folder}: no plain checkpoint (config.json is missing). Make one: manyicl export RUN {folder}")
        try:
            import vllm
        except ImportError as error:
            raise ModelError("vLLM is not installed. Type: pip install 'manyicl[vllm]'") from error
        self.encoder = encoder
        self.context_tokens = context_tokens
        self._vllm = vllm
        defaults = {"enable_prefix_caching": True, "disable_log_stats": True, "seed": 0}
        self._model = vllm.LLM(model=str(folder), max_model_len=context_tokens, **(defaults | options))

    def prefill(self, demonstrations: Sequence[Example], *, instruction: str = "") -> TokenPrefix:
        """Compute ordered demonstrations once; vLLM keeps them while its cache has room.

        Raises:
            BudgetError: they are longer than the context.
        """
        token_ids = list(self.encoder.encode_opening(instruction))
        stops = [len(token_ids)]
        for demonstration in demonstrations:
            encoded = self.encoder.encode_example(demonstration.input, demonstration.answer)
            token_ids += [*encoded.input_ids, *encoded.answer_ids, *encoded.gap_ids]
            stops.append(len(token_ids))
        prefix = TokenPrefix(tuple(token_ids), tuple(stops))
        if token_ids:
            self._generate([prefix.token_ids], [self._sampling(1)], most_new_tokens=1)
        return prefix

    def pick(self, prefix: TokenPrefix, inputs: Sequence[str], choices: Sequence[Sequence[str]]) -> list[int]:
        """The index of each query's label by greedy decoding within the label strings; see the module about what that is.

        Raises:
            BudgetError: a query does not fit behind the prefix.
        """
        lead = self.encoder.layout.answer_lead
        # In other tokens than the encoder's a label may take as many as it has bytes.
        longest = max((len((lead + choice).encode()) for own in choices for choice in own), default=0) + 1
        sampling = [
            self._sampling(
                longest,
                structured_outputs=self._vllm.sampling_params.StructuredOutputsParams(choice=[lead + text for text in own]),
            )
            for own in choices
        ]
        needed = max((self.answer_tokens(own) for own in choices), default=0)
        outputs = self._generate(self._prompts(prefix, inputs), sampling, most_new_tokens=needed)
        written = [self._read(output) for output in outputs]
        return [[text.strip() for text in own].index(answer) for own, answer in zip(choices, written, strict=True)]

    def choose(
        self, prefix: TokenPrefix, inputs: Sequence[str], choices: Sequence[Sequence[str]], *, normalise: bool = False
    ) -> list[npt.NDArray[np.float64]]:
        """Log-probability of each choice of each query, exact: the sum over its tokens and terminator, or their mean.

        Raises:
            TaskError: a choice is empty, or two have the same tokens.
            BudgetError: a query does not fit behind the prefix.
        """
        queries = self._prompts(prefix, inputs)
        labels = [self.encoder.encode_labels(own) for own in choices]
        prompts = [(*query, *label) for query, own in zip(queries, labels, strict=True) for label in own]
        # vLLM does not read its prefix cache for such prompts: each costs the whole prefix.
        sampling = self._sampling(1, prompt_logprobs=0)
        outputs = iter(self._generate(prompts, [sampling] * len(prompts), most_new_tokens=0))
        scores = []
        for own in labels:
            sums = [_sum_of_last(next(outputs).prompt_logprobs, label) for label in own]
            lengths = [len(label) for label in own]
            scores.append(np.array(sums) / lengths if normalise else np.array(sums))
        return scores

    def write(self, prefix: TokenPrefix, inputs: Sequence[str], *, max_new_tokens: int) -> list[str]:
        """Greedy answers as text, up to the terminator.

        Raises:
            BudgetError: a query and its answer do not fit behind the prefix.
        """
        prompts = self._prompts(prefix, inputs)
        outputs = self._generate(prompts, [self._sampling(max_new_tokens)] * len(prompts), most_new_tokens=max_new_tokens)
        return [self._read(output) for output in outputs]

    def answer_tokens(self, answers: Sequence[str]) -> int:
        """Tokens of the longest of the answers, its terminator included."""
        return max(len(self.encoder.encode_answer(answer)) for answer in answers)

    def _prompts(self, prefix: TokenPrefix, inputs: Sequence[str]) -> list[tuple[int, ...]]:
        return [prefix.token_ids + self.encoder.encode_query(text) for text in inputs]

    def _sampling(self, max_new_tokens: int, **options: Any) -> Any:
        """Greedy decoding that stops at our terminator and keeps no text."""
        return self._vllm.SamplingParams(
            temperature=0.0,
            max_tokens=max_new_tokens,
            stop_token_ids=[self.encoder.terminator_id],
            detokenize=False,
            **options,
        )

    def _generate(self, prompts: Sequence[tuple[int, ...]], sampling: Sequence[Any], *, most_new_tokens: int) -> list[Any]:
        longest = max(map(len, prompts), default=0)
        if longest + most_new_tokens > self.context_tokens:
            raise BudgetError(
                f"the longest prompt takes {longest} tokens and its answer up to {most_new_tokens}, more than the context of "
                f"{self.context_tokens}. Use fewer demonstrations; queries are never cut."
            )
        tokens = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        return list(self._model.generate(tokens, list(sampling), use_tqdm=False)) if tokens else []

    def _read(self, output: Any) -> str:
        ids = [token for token in output.outputs[0].token_ids if token != self.encoder.terminator_id]
        return str(self.encoder.tokenizer.decode(ids)).strip()


def _sum_of_last(log_probabilities: Sequence[Any], label: Sequence[int]) -> float:
    """Sum of the log-probabilities of a prompt's last tokens, which are those of the label."""
    last = list(log_probabilities)[-len(label) :]
    return float(sum(entry[token].logprob for entry, token in zip(last, label, strict=True)))
