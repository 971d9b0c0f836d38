"""Our side of benchmarks/training.py: ManyShotTrainer on its rows. Usage: training_ours.py JOB.json ANSWER.json"""

import json
import sys
import tempfile
from pathlib import Path

import torch
from memory import high_water_mark, reset_high_water_mark
from peft import PeftModel
from training import as_lists, make_rows
from updates import UpdateTimer

from manyicl.arguments import training_arguments
from manyicl.attention import use_shared_prefix_attention
from manyicl.config import ObjectiveConfig, TrainingConfig
from manyicl.modeling import load_model
from manyicl.training import ManyShotTrainer, prepare_for_training, to_tensors


def main() -> None:
    """Train on the job's rows and write seconds, losses and peak memory."""
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    torch.set_num_threads(job["threads"])
    rows = make_rows(job["length"], len(job["rows"]))
    if as_lists(rows) != job["rows"]:
        raise SystemExit("the rows made here are not those of the job")
    loaded = load_model(job["model"], dtype=job["dtype"])
    model = PeftModel.from_pretrained(loaded.model, job["adapter"], is_trainable=True)
    without = job.get("without", ())
    if "activations" not in without:
        prepare_for_training(model)
    else:
        use_shared_prefix_attention(model.get_base_model())
    for weight in model.parameters():  # Mapped weights are read once, so that they count as loaded.
        weight.detach().sum()
    settings = {
        "num_steps": len(rows),
        "learning_rate": job["learning_rate"],
        "schedule": "constant",
        "warmup_ratio": 0.0,
        "log_every": 1,
    }
    training = TrainingConfig.model_validate(settings | {"save_every": 1_000_000} | job.get("training", {}))
    with tempfile.TemporaryDirectory() as temporary:
        timer = UpdateTimer()
        trainer = ManyShotTrainer(
            objective=ObjectiveConfig.model_validate({}),
            model=model,
            args=training_arguments(training, Path(temporary), seed=0, validate=False),
            train_dataset=rows,
            data_collator=to_tensors,
            callbacks=[timer],
        )
        trainer.args.save_strategy = "no"
        trainer.in_head = trainer.in_head and "head" not in without
        loaded_bytes = reset_high_water_mark()
        trainer.train()
    answer = {
        "seconds": timer.seconds,
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "loaded_bytes": loaded_bytes,
        "peak_beyond_model_bytes": high_water_mark() - loaded_bytes,
    }
    Path(sys.argv[2]).write_text(json.dumps(answer), encoding="utf-8")


if __name__ == "__main__":
    main()
