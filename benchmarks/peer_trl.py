"""Peer of benchmarks/training.py: TRL's SFTTrainer on given rows. Usage: peer_trl.py JOB.json ANSWER.json"""

import json
import sys
import tempfile
from pathlib import Path

import torch
from datasets import Dataset
from memory import high_water_mark, reset_high_water_mark
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer
from updates import UpdateTimer


def main() -> None:
    """Train on the job's rows and write seconds, losses and peak memory."""
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    torch.set_num_threads(job["threads"])
    base = AutoModelForCausalLM.from_pretrained(job["model"], dtype=job["dtype"])
    model = PeftModel.from_pretrained(base, job["adapter"], is_trainable=True)
    for weight in model.parameters():  # Mapped weights are read once, so that they count as loaded.
        weight.detach().sum()
    with tempfile.TemporaryDirectory() as temporary:
        settings = {"bf16": False, "gradient_checkpointing": False} | job["settings"]
        arguments = SFTConfig(
            output_dir=temporary,
            max_steps=len(job["rows"]),
            per_device_train_batch_size=1,
            gradient_accumulation_steps=1,
            learning_rate=job["learning_rate"],
            lr_scheduler_type="constant",
            train_sampling_strategy="sequential",
            max_length=None,
            dataset_kwargs={"skip_prepare_dataset": True},
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            dataloader_pin_memory=False,
            disable_tqdm=True,
            seed=0,
            **settings,
        )
        timer = UpdateTimer()
        trainer = SFTTrainer(
            model=model,
            args=arguments,
            train_dataset=Dataset.from_list(job["rows"]),
            processing_class=AutoTokenizer.from_pretrained(job["model"]),
            callbacks=[timer],
        )
        loaded_bytes = reset_high_water_mark()
        trainer.train()
    import trl

    answer = {
        "seconds": timer.seconds,
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "loaded_bytes": loaded_bytes,
        "peak_beyond_model_bytes": high_water_mark() - loaded_bytes,
        "trl": trl.__version__,
    }
    Path(sys.argv[2]).write_text(json.dumps(answer), encoding="utf-8")


if __name__ == "__main__":
    main()
