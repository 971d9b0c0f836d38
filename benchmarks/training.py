"""Tuning speed and memory, ours against TRL's SFTTrainer in one run: python benchmarks/training.py --output FILE

Default model in bf16, LoRA on all linear layers (fp32 adapters of one start), AdamW, 2 threads; rows of made-up text, of which
about a tenth are targets. Both sides read the same token ids, targets and adapter, train on the same rows in the same order, each
cell in a fresh process. First the losses of every update are compared: those of the first, before anything is trained, must
agree to 1e-3 on the mean over rows, in fp32 and in bf16. Then, by row length: tokens/s and supervised answers/s (median over
updates after the first), peak memory beyond the loaded model (the high-water mark is reset after loading), and the share of the
limit.

Then the length: seconds a token = a + b · T and peak memory = c + d · T, fitted by least squares to our cells; attention costs as
much as all else where b · T = a. `--changes` measures instead, at 2,048 tokens, what each kept change brings: ours without it.

TRL is measured with each of its settings in `TRL_SETTINGS` and counted at the fastest of them; ours at one for all rows.

The limit counts multiplications and additions that an update needs (`training_operations` in machine.py): forward and backward
through frozen weights (4 a weight and token), adapters (6), the causal half of attention forward and backward
(6 · T² · H · D a layer), and the vocabulary matrix for target tokens (4); nothing is recomputed. It is divided by the bf16 rate
of the model's own linear layers, measured in this run.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from machine import describe_machine, measure_matrix_rate, training_operations

FOLDER = Path(__file__).parent
LENGTHS = (1_024, 2_048, 4_096, 8_192)
NUM_ROWS = {1_024: 8, 2_048: 6, 4_096: 4, 8_192: 3}
AGREEMENT_LENGTH, AGREEMENT_ROWS = 1_024, 8
LORA = {"rank": 16, "alpha": 32}
LEARNING_RATE = 3e-4
TRL_SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {"gradient_checkpointing": False},
    "autocast": {"gradient_checkpointing": False, "bf16": True},
    "checkpointing": {"gradient_checkpointing": True},
}
COMPILED = {"gradient_checkpointing": False, "torch_compile": True}
# Without checkpointing TRL takes more memory at this length than the machine has.
ONLY_CHECKPOINTING_FROM = 8_192
MOST_DIFFERENCE = 1e-3
CHANGES: dict[str, list[str]] = {
    "everything": [],
    "without the attention kernel": ["kernel"],
    "without fewer activations": ["activations"],
    "without losses in the head": ["head"],
    "without all three": ["kernel", "activations", "head"],
}


def make_task(num_examples: int) -> Any:
    """Examples of some 30 tokens, of which the answer takes two or three with its terminator."""
    from scoring import PERSONS, PLACES, THINGS, VERBS

    from manyicl import Example, Task

    rng = random.Random("training")
    examples = []
    for _ in range(num_examples):
        verb, thing, place = rng.choice(VERBS), rng.choice(THINGS), rng.choice(PLACES)
        person, other = rng.sample(PERSONS, 2)
        text = f"The {person} wants to {verb} a {thing} {place}, and asks the {other} who has done it {rng.choice(PLACES)}"
        examples.append(Example(text, THINGS[(VERBS.index(verb) + THINGS.index(thing)) % len(THINGS)]))
    return Task("requests", "classification", "accuracy", tuple(examples), (), labels=tuple(THINGS))


def make_rows(length: int, num_rows: int) -> list[Any]:
    """Rows of nearly `length` tokens."""
    from manyicl import Encoder
    from manyicl.config import EpisodesConfig
    from manyicl.modeling import load_tokenizer
    from manyicl.packing import RowDataset

    config = EpisodesConfig.model_validate({"max_tokens": length})
    encoder = Encoder(load_tokenizer("default"))
    return list(RowDataset([make_task(length // 12)], config=config, encoder=encoder, seed=0, num_rows=num_rows))


def as_lists(rows: list[Any]) -> list[dict[str, list[int]]]:
    """Rows as other tools read them: token ids, and labels that are -100 where there is no target."""
    lists = []
    for row in rows:
        (sequence,) = row.sequences
        ids = [int(token) for token in sequence.token_ids]
        labels = [token if shot >= 0 else -100 for token, shot in zip(ids, sequence.shots, strict=True)]
        lists.append({"input_ids": ids, "labels": labels})
    return lists


def run_cell(python: Path, script: str, job: dict[str, Any], folder: Path) -> dict[str, Any]:
    """What one side answers about one job, in a process of its own, or why there is no answer."""
    given, answer = folder / "job.json", folder / "answer.json"
    given.write_text(json.dumps(job), encoding="utf-8")
    answer.unlink(missing_ok=True)
    environment = os.environ | {"OMP_NUM_THREADS": str(job["threads"])}
    environment |= {"MANYICL_CPU_KERNEL": "off"} if "kernel" in job.get("without", ()) else {}
    done = subprocess.run(
        [str(python), str(FOLDER / script), str(given), str(answer)],
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
        env=environment,
    )
    if done.returncode:
        return {"absent": f"{script} ended with code {done.returncode}: {done.stderr.strip()[-600:]}"}
    found: dict[str, Any] = json.loads(answer.read_text(encoding="utf-8"))
    return found


def figures(found: dict[str, Any], rows: list[Any], targets: int, config: Any, rate: float) -> dict[str, Any]:
    """Rates of a cell: `seconds` per update, the first left out."""
    tokens = [row.num_tokens for row in rows]
    answers = [row.num_answers for row in rows]
    seconds = statistics.median(own / number for own, number in zip(found["seconds"][1:], tokens[1:], strict=True))
    needed = training_operations(config, tokens, targets=targets, lora_rank=LORA["rank"])
    return found | {
        "tokens_per_second": 1 / seconds,
        "answers_per_second": sum(answers) / sum(tokens) / seconds,
        "share_of_limit": needed / sum(tokens) / rate / seconds,
        "limit_tokens_per_second": sum(tokens) * rate / needed,
    }


def compare_losses(sides: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """How far the two sides' losses are apart: that of the first update, and of all.

    Raises:
        SystemExit: the mean over the rows of a pass without any update differs by more than 1e-3.
    """
    for found in sides.values():
        if "absent" in found:
            raise SystemExit(found["absent"])
    ours, theirs = (sides[name]["losses"] for name in ("ours", "trl"))
    differences = [abs(mine - other) for mine, other in zip(ours, theirs, strict=True)]
    result = {
        "mean_loss": [statistics.mean(ours), statistics.mean(theirs)],
        "difference_of_means": abs(statistics.mean(ours) - statistics.mean(theirs)),
        "largest_difference_of_a_row": max(differences),
    }
    if result["difference_of_means"] > MOST_DIFFERENCE:
        raise SystemExit(f"the two sides do not compute the same loss, so nothing is timed: {json.dumps(result)}")
    return result


def fit_length(cells: dict[str, Any]) -> dict[str, float]:
    """How seconds a token and peak memory grow with the row."""
    lengths = np.array([statistics.mean(cell["tokens"]) for cell in cells.values()])
    seconds = np.array([1 / cell["ours"]["tokens_per_second"] for cell in cells.values()])
    memory = np.array([cell["ours"]["peak_beyond_model_bytes"] for cell in cells.values()])
    slope, start = np.polyfit(lengths, seconds, 1)
    bytes_per_token, fixed = np.polyfit(lengths, memory, 1)
    return {
        "seconds_per_token": float(start),
        "seconds_per_token_and_token_of_length": float(slope),
        "tokens_where_attention_costs_as_much_as_the_rest": float(start / slope),
        "largest_error_of_seconds": float(np.abs((start + slope * lengths) / seconds - 1).max()),
        "bytes_per_token": float(bytes_per_token),
        "fixed_bytes": float(fixed),
        "largest_error_of_memory": float(np.abs((fixed + bytes_per_token * lengths) / memory - 1).max()),
    }


def measure_changes(job: dict[str, Any], side: tuple[Path, str], folder: Path) -> dict[str, Any]:
    """Ours at one length without each kept change, in the same run."""
    result = {}
    for name, without in CHANGES.items():
        found = run_cell(*side, job | {"without": without}, folder)
        tokens = [len(row["input_ids"]) for row in job["rows"]]
        seconds = statistics.median(own / number for own, number in zip(found["seconds"][1:], tokens[1:], strict=True))
        result[name] = {"tokens_per_second": 1 / seconds, "peak_beyond_model_bytes": found["peak_beyond_model_bytes"]}
        print(f"{name}: {1 / seconds:.0f} tokens/s", file=sys.stderr)
    return result


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="JSON; printed too")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--lengths", type=int, nargs="+", default=list(LENGTHS))
    parser.add_argument("--compiled", action="store_true", help="TRL with torch_compile too, at 2,048 tokens (minutes more)")
    parser.add_argument("--changes", action="store_true", help="what each change brings, at 2,048 tokens, and nothing else")
    parser.add_argument("--no-peer", action="store_true", help="ours alone")
    parser.add_argument("--trl-python", type=Path, default=Path(sys.executable), help="a Python with trl, peft and datasets")
    return parser.parse_args()


def settings_at(length: int, *, compiled: bool) -> dict[str, dict[str, Any]]:
    """TRL's settings that are tried at a length."""
    if length >= ONLY_CHECKPOINTING_FROM:
        return {"checkpointing": TRL_SETTINGS["checkpointing"]}
    return TRL_SETTINGS | ({"compiled": COMPILED} if compiled and length == 2_048 else {})


def compare_sides(common: dict[str, Any], sides: dict[str, tuple[Path, str]], folder: Path) -> dict[str, Any]:
    """Losses of the two sides on the same rows, in fp32 and in bf16."""
    agreement = {}
    rows = as_lists(make_rows(AGREEMENT_LENGTH, AGREEMENT_ROWS))
    for dtype in ("float32", "bfloat16"):
        # A rate so small that no weight changes: every row is judged by the model as it is.
        job = common | {"length": AGREEMENT_LENGTH, "rows": rows, "dtype": dtype, "learning_rate": 1e-12, "settings": {}}
        agreement[dtype] = compare_losses({name: run_cell(*side, job, folder) for name, side in sides.items()})
        print(f"losses in {dtype}: {json.dumps(agreement[dtype])}", file=sys.stderr)
    return agreement


def measure_length(
    length: int, common: dict[str, Any], sides: dict[str, tuple[Path, str]], folder: Path, *, compiled: bool
) -> tuple[dict[str, Any], list[Any]]:
    """What both sides answer about rows of a length, TRL with each of its settings; and the rows."""
    built = make_rows(length, NUM_ROWS.get(length, 3))
    rows = as_lists(built)
    job = common | {"length": length, "rows": rows, "dtype": "bfloat16", "settings": {}}
    found = run_cell(*sides["ours"], job, folder)
    if "absent" in found:
        raise SystemExit(found["absent"])
    targets = sum(label >= 0 for row in rows for label in row["labels"])
    cell: dict[str, Any] = {"tokens": [row.num_tokens for row in built], "targets": targets, "ours": found, "trl": {}}
    for name, settings in settings_at(length, compiled=compiled).items() if "trl" in sides else ():
        cell["trl"][name] = run_cell(*sides["trl"], job | {"settings": settings}, folder)
        print(f"{length}, TRL {name}: {cell['trl'][name].get('seconds')}", file=sys.stderr)
    return cell, built


def main() -> None:
    """Compare losses, then measure every cell."""
    from manyicl.config import LoraConfig
    from manyicl.default_model import DEFAULT_NOTE
    from manyicl.modeling import add_lora, export_model, load_model

    arguments = parse_arguments()
    start = time.perf_counter()
    sides = {"ours": (Path(sys.executable), "training_ours.py"), "trl": (arguments.trl_python.absolute(), "peer_trl.py")}
    if arguments.no_peer:
        del sides["trl"]
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        export_model("default", folder / "model")
        loaded = load_model("default", dtype="bfloat16")
        config, rate = loaded.model.config, measure_matrix_rate(loaded.model.config)
        add_lora(loaded.model, LoraConfig.model_validate(LORA), seed=0).save_pretrained(str(folder / "adapter"))
        places = {"model": str(folder / "model"), "adapter": str(folder / "adapter")}
        common = places | {"threads": arguments.threads, "learning_rate": LEARNING_RATE}
        if arguments.changes:
            job = common | {"length": 2_048, "rows": as_lists(make_rows(2_048, NUM_ROWS[2_048])), "dtype": "bfloat16"}
            result["changes"] = measure_changes(job, sides["ours"], folder)
        else:
            result["agreement"] = compare_sides(common, sides, folder) if "trl" in sides else {}
            result["rows"] = cells = {}
            for length in arguments.lengths:
                cell, built = measure_length(length, common, sides, folder, compiled=arguments.compiled)
                cell["ours"] = figures(cell["ours"], built, cell["targets"], config, rate)
                for name, found in cell["trl"].items():
                    cell["trl"][name] = found if "absent" in found else figures(found, built, cell["targets"], config, rate)
                print(f"{length}, ours: {cell['ours']['tokens_per_second']:.0f} tokens/s", file=sys.stderr)
                cells[str(length)] = cell | _against_best(cell)
            result["fit"] = fit_length(cells) if len(cells) > 2 else {}
    result |= {
        "limit": {"matrix_rate_per_second": rate, "formula": __doc__.split("\n\n")[4].strip()},
        "lora": LORA,
        "seconds": time.perf_counter() - start,
        "machine": describe_machine(),
        "model": f"default, bf16, {DEFAULT_NOTE}",
    }
    text = json.dumps(result, indent=2)
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(text + "\n", encoding="utf-8")
    print(text)


def _against_best(cell: dict[str, Any]) -> dict[str, Any]:
    """Ours over TRL at its fastest settings."""
    peers = {name: found for name, found in cell["trl"].items() if "absent" not in found}
    if not peers:
        return {}
    best = max(peers, key=lambda name: peers[name]["tokens_per_second"])
    ours, theirs = cell["ours"], peers[best]
    return {
        "best_trl_settings": best,
        "times_tokens_per_second": ours["tokens_per_second"] / theirs["tokens_per_second"],
        "memory_ratio": ours["peak_beyond_model_bytes"] / theirs["peak_beyond_model_bytes"],
        "memory_ratio_to_leanest": ours["peak_beyond_model_bytes"]
        / min(found["peak_beyond_model_bytes"] for found in peers.values()),
    }


if __name__ == "__main__":
    main()
