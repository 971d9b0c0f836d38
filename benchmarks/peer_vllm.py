"""Peer of benchmarks/scoring.py: vLLM with prefix caching on given token ids. Usage: peer_vllm.py JOB.json ANSWER.json"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

# The smallest block that runs on processors (16 does not), and the fastest: fewest tokens of the prefix are computed again.
BLOCK_TOKENS = 32


def pick(model: Any, job: dict, cell: dict) -> dict:
    """Constrained greedy labels of all queries at once, the faster of two runs; the prefix and the grammar are warm.

    The two runs have other queries, since vLLM would find those of the first in its cache. It keeps whole blocks of tokens:
    the end of the prefix outside them is computed for every query, so a third run has a prefix that ends with a block.
    """
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    tokenizer = model.get_tokenizer()
    sampling = SamplingParams(
        temperature=0.0,
        max_tokens=32,
        stop_token_ids=[job["terminator"]],
        detokenize=False,
        structured_outputs=StructuredOutputsParams(choice=cell["texts"]),
    )
    warm = [{"prompt_token_ids": [*cell["prefix"], *cell["labels"][0]]}]
    model.generate(warm, sampling, use_tqdm=False)
    whole = cell["prefix"][: len(cell["prefix"]) // BLOCK_TOKENS * BLOCK_TOKENS]
    runs = []
    for prefix, name in ((whole, "more_queries"), (cell["prefix"], "more_queries"), (cell["prefix"], "queries")):
        prompts = [{"prompt_token_ids": [*prefix, *query]} for query in cell[name]]
        start = time.perf_counter()
        outputs = model.generate(prompts, sampling, use_tqdm=False)
        runs.append(time.perf_counter() - start)
    on_whole_blocks, *runs = runs
    texts = [tokenizer.decode([i for i in output.outputs[0].token_ids if i != job["terminator"]]) for output in outputs]
    labels = [text.strip() for text in cell["texts"]]
    return {
        "seconds": min(runs),
        "seconds_of_each_run": runs,
        "tokens_outside_blocks": len(cell["prefix"]) % BLOCK_TOKENS,
        "seconds_on_whole_blocks": on_whole_blocks,
        "picks": [labels.index(text.strip()) for text in texts],
    }


def score(model: Any, cell: dict) -> dict:
    """Exact scores through prompt_logprobs, for which vLLM does not read its prefix cache."""
    from vllm import SamplingParams

    num_queries, num_labels = cell["scored"]
    pairs = [(query, label) for query in cell["queries"][:num_queries] for label in cell["labels"][:num_labels]]
    prompts = [{"prompt_token_ids": [*cell["prefix"], *query, *label]} for query, label in pairs]
    sampling = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0, detokenize=False)
    start = time.perf_counter()
    outputs = model.generate(prompts, sampling, use_tqdm=False)
    seconds = time.perf_counter() - start
    values = []
    for output, (_, label) in zip(outputs, pairs, strict=True):
        last = list(output.prompt_logprobs)[-len(label) :]
        values.append(sum(entry[token].logprob for entry, token in zip(last, label, strict=True)))
    scores = [values[line * num_labels : (line + 1) * num_labels] for line in range(num_queries)]
    return {"seconds": seconds, "scores": scores}


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", f"0-{job['threads'] - 1}" if job["threads"] > 1 else "0")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from vllm import LLM

    model = LLM(
        model=job["model"],
        dtype="bfloat16",
        max_model_len=8192,
        enable_prefix_caching=True,
        enforce_eager=job["eager"],
        block_size=BLOCK_TOKENS,
        max_num_seqs=128,
        disable_log_stats=True,
        seed=0,
    )
    answer: dict = {"picks": {}, "scores": {}}
    for cell in job["cells"]:
        answer["picks"][cell["name"]] = pick(model, job, cell)
        if cell["scored"]:
            answer["scores"][cell["name"]] = score(model, cell)
        print(cell["name"], answer["picks"][cell["name"]]["seconds"], file=sys.stderr, flush=True)
    Path(sys.argv[2]).write_text(json.dumps(answer), encoding="utf-8")


if __name__ == "__main__":
    main()
