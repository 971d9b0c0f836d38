"""Builders that the tests of the model side share: rows, runs and a plain reference of the loss."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from manyicl.config import EpisodesConfig, LoraConfig, ObjectiveConfig, Recipe, parse_recipe
from manyicl.encoding import Encoder, encode_episode
from manyicl.episodes import Episode
from manyicl.modeling import add_lora, load_model, save_model
from manyicl.packing import Row
from manyicl.tasks.task import Example, Task
from manyicl.training import to_tensors

Config = ObjectiveConfig.model_validate
Lora = LoraConfig.model_validate
INPUT = torch.arange(3, 60).unsqueeze(0)


def letter_example(number: int) -> Example:
    """Examples of different lengths: inputs of 3 to 9 and answers of 1 to 4 bytes."""
    return Example("q" * (3 + number % 7) + str(number % 10), "abcd"[: 1 + number % 4])


def letter_task(name: str = "letters", *, num_train: int = 40, num_test: int = 4) -> Task:
    examples = tuple(letter_example(number) for number in range(num_train + num_test))
    return Task(name, "qa", "exact_match", examples[:num_train], examples[num_train:])


def sequence_of(encoder: Encoder, numbers: Sequence[int], *, index: int = 0) -> Any:
    """The sequence of the letter examples of these numbers."""
    return encode_episode(Episode("letters", "", tuple(map(letter_example, numbers)), (), index), encoder)


def make_batch(encoder: Encoder, *rows: Sequence[Sequence[int]]) -> dict[str, torch.Tensor]:
    """A batch: each row is a list of sequences, each sequence a list of example numbers."""
    return to_tensors([make_row(encoder, *row) for row in rows])


def make_row(encoder: Encoder, *sequences: Sequence[int]) -> Row:
    return Row(tuple(sequence_of(encoder, numbers) for numbers in sequences))


class FixedRows:
    """A dataset of rows made beforehand, for `train_model`; remembers which were asked for."""

    def __init__(self, rows: Sequence[Row], *, seed: int = 0) -> None:
        self.rows = list(rows)
        self.seed = seed
        self.asked: list[int] = []

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Row:
        self.asked.append(index)
        return self.rows[index]


def reference_loss(model: torch.nn.Module, rows: Sequence[Sequence[Any]], config: ObjectiveConfig) -> tuple[torch.Tensor, int]:
    """The weighted sum of losses and the number of units, by plain loops over whole logits of one sequence at a time."""
    total, units = torch.zeros(()), 0
    for sequence in [sequence for row in rows for sequence in row]:
        logits = model(input_ids=torch.tensor([sequence.token_ids]), use_cache=False).logits[0].float()
        answers = []
        for start, stop in sequence.answer_spans:
            picked = [-logits[place - 1].log_softmax(-1)[sequence.token_ids[place]] for place in range(start, stop)]
            answers.append(torch.stack(picked))
        if config.name == "last_answer":
            answers = answers[-1:]
        weights = [1.0] * len(answers)
        if config.name == "reweighted":
            weights = reference_shot_weights([float(answer.detach().mean()) for answer in answers], config)
        num_tokens = sum(len(answer) for answer in answers)
        if config.normalisation == "token":
            total, units = total + sum(w * a.sum() for w, a in zip(weights, answers, strict=True)), units + num_tokens
        elif config.normalisation == "answer":
            total, units = total + sum(w * a.mean() for w, a in zip(weights, answers, strict=True)), units + len(answers)
        else:
            total, units = total + sum(w * a.sum() for w, a in zip(weights, answers, strict=True)) / num_tokens, units + 1
    return total, units


def reference_shot_weights(means: Sequence[float], config: ObjectiveConfig) -> list[float]:
    raw = []
    for place, mean in enumerate(means):
        window = means[max(0, place - config.reweight_window) : place]
        advantage = sum(window) / len(window) - mean if window else 0.0
        raw.append(math.exp(min(2.0, max(-2.0, advantage)) / config.reweight_temperature))
    return [value * len(raw) / sum(raw) for value in raw]


def gradients_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The gradients that a backward pass left, which are taken away."""
    found = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def largest_difference(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> float:
    """The largest absolute difference between tensors of the same names."""
    assert left.keys() == right.keys()
    return max(float((left[name].float() - right[name].float()).abs().max()) for name in left)


def weights_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in model.named_parameters() if weight.requires_grad}


def logits(model: torch.nn.Module) -> torch.Tensor:
    """Of one fixed input."""
    with torch.inference_mode():
        found: torch.Tensor = model(input_ids=INPUT).logits.float()
    return found


def randomise(model: Any, seed: int = 5) -> Any:
    """Give an adapter weights that change the model, as B starts at zero."""
    with torch.no_grad():
        draw = torch.Generator().manual_seed(seed)
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight.copy_(torch.randn(weight.shape, generator=draw) * 0.05)
    return model


def write_run(folder: Path, base: Path, tokenizer: Any) -> Any:
    """Write a finished run's folder over a base, and return the adapted model whose logits it must give."""
    adapted = randomise(add_lora(load_model(base, dtype="float32").model, Lora({"rank": 4, "alpha": 4}), seed=0)).eval()
    save_model(adapted, tokenizer, folder, base=str(base), note="a note")
    return adapted


def make_recipe(model: Path | str, tasks: Path | str, output: Path, **sections: Any) -> Recipe:
    """A recipe of a run of seconds; sections are merged into its small defaults."""
    content: dict[str, Any] = {
        "model": str(model),
        "tasks": str(tasks),
        "output": str(output),
        "episodes": {"max_tokens": 128},
        "training": {"num_steps": 6, "save_every": 2, "log_every": 1, "learning_rate": 0.01, "dtype": "float32"},
    }
    for name, value in sections.items():
        content[name] = {**content.get(name, {}), **value} if isinstance(value, dict) else value
    return parse_recipe(content)


def write_recipe(path: Path, recipe: Recipe) -> Path:
    path.write_text(yaml.safe_dump(recipe.model_dump(mode="json")), encoding="utf-8")
    return path


def count_calls(monkeypatch: Any, owner: Any, name: str) -> list[tuple[Any, ...]]:
    """Replace `owner.name` by itself, and return the list into which the arguments of every call go."""
    calls: list[tuple[Any, ...]] = []
    original: Callable[..., Any] = getattr(owner, name)

    def counted(*arguments: Any, **options: Any) -> Any:
        calls.append(arguments)
        return original(*arguments, **options)

    monkeypatch.setattr(owner, name, counted)
    return calls


def episodes_config(**fields: Any) -> EpisodesConfig:
    return EpisodesConfig.model_validate(fields)


def write_tiny_gguf(path: Path, model: Any, tokenizer: Any, *, end_token: bool = True) -> Path:
    """Write a tiny llama (its vocabulary one larger than the tokenizer's, for a merge) and its tokenizer as an F32 GGUF file."""
    import gguf
    import numpy as np

    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    tokens = [token for token, _ in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])] + ["he"]
    writer.add_token_list(tokens)
    writer.add_token_types([1] * 256 + [3] * 5 + [1])
    writer.add_token_merges(["h e"])
    if end_token:
        writer.add_eos_token_id(256)
    names = {
        "embed_tokens": "token_embd",
        "norm": "output_norm",
        "lm_head": "output",
        "q_proj": "attn_q",
        "k_proj": "attn_k",
        "v_proj": "attn_v",
        "o_proj": "attn_output",
        "gate_proj": "ffn_gate",
        "up_proj": "ffn_up",
        "down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, weight in model.state_dict().items():
        parts = name.removeprefix("model.").removesuffix(".weight").split(".")
        array = weight.float().numpy()
        if parts[-1] in heads:  # GGUF keeps the two halves of a rotary head side by side.
            array = array.reshape(heads[parts[-1]], 2, -1, config.hidden_size).swapaxes(1, 2).reshape(array.shape)
        place = f"blk.{parts[1]}." if parts[0] == "layers" else ""
        array = np.ascontiguousarray(array)
        writer.add_tensor(f"{place}{names[parts[-1]]}.weight", array, raw_dtype=gguf.GGMLQuantizationType.F32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
