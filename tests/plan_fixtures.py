"""What the tests of plans share: a tiny config, its sizes by hand, and jobs on it."""

from typing import Any

import torch
import transformers

from manyicl.config import parse_recipe
from manyicl.training_plan import Layout, TrainingJob, read_decoder
from manyicl.training_plan.jobs import ONE_DEVICE

SIZES: dict[str, Any] = {
    "vocab_size": 100,
    "hidden_size": 12,
    "intermediate_size": 20,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "max_position_embeddings": 4096,
}
CONFIG = transformers.LlamaConfig(**SIZES)
# q and o: 12·24, k and v: 12·12, gate, up and down: 12·20.
LAYER_WEIGHTS = 2 * 12 * 24 + 2 * 12 * 12 + 3 * 12 * 20
PARAMETERS = 3 * LAYER_WEIGHTS + 2 * 100 * 12 + 7 * 12
# Inputs and outputs of the seven linear layers of one decoder layer.
FEATURES = (12 + 24) + (12 + 12) + (12 + 12) + (24 + 12) + (12 + 20) + (12 + 20) + (20 + 12)


def make_job(config: Any = CONFIG, *, layout: Layout = ONE_DEVICE, max_tokens: int = 200, **training: Any) -> TrainingJob:
    content = {"episodes": {"max_tokens": max_tokens}, "training": {"lora": {"rank": 4}, "num_steps": 10, **training}}
    dtype = torch.float32 if training.get("dtype") == "float32" else torch.bfloat16
    return TrainingJob(parse_recipe(content), read_decoder("tiny", config), dtype, layout, on_cpu=True)
