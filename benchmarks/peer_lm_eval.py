"""Peer of benchmarks/scoring.py: lm-evaluation-harness' HFLM on given token ids. Usage: peer_lm_eval.py JOB.json ANSWER.json"""

import json
import sys
import time
from pathlib import Path

import torch


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    torch.set_num_threads(job["threads"])
    from lm_eval.models.huggingface import HFLM

    model = HFLM(pretrained=job["model"], device="cpu", dtype="bfloat16", batch_size=1, max_length=8192)
    answer: dict = {"scores": {}}
    for cell in job["cells"]:
        num_queries, num_labels = cell["scored"]
        requests = [
            (("", ""), [*cell["prefix"], *query], label)
            for query in cell["queries"][:num_queries]
            for label in cell["labels"][:num_labels]
        ]
        model._loglikelihood_tokens([(("", ""), cell["prefix"][:32], cell["labels"][0])], disable_tqdm=True)
        start = time.perf_counter()
        found = model._loglikelihood_tokens(requests, disable_tqdm=True)
        seconds = time.perf_counter() - start
        values = [value for value, _ in found]
        scores = [values[line * num_labels : (line + 1) * num_labels] for line in range(num_queries)]
        answer["scores"][cell["name"]] = {"seconds": seconds, "scores": scores}
    Path(sys.argv[2]).write_text(json.dumps(answer), encoding="utf-8")


if __name__ == "__main__":
    main()
