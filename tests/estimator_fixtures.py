"""What the tests of the estimators share: texts with labels, and label scores of whole prompts without any cache."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from manyicl import Encoder, ManyShotClassifier, ManyShotGenerator
from manyicl.estimator import shared_models
from manyicl.modeling import load_tokenizer

LABELS = ("music", "travel", "weather")
WORDS = {"music": "play some {} music", "travel": "book a trip to {}", "weather": "will it rain in {}"}
PLACES = ("rome", "oslo", "lima", "jazz", "cairo", "quito", "blues", "paris", "delhi", "tunis")


def labelled_texts(num: int, *, first: int = 0) -> tuple[list[str], list[str]]:
    """Texts and their labels, three kinds in turn, all different."""
    numbers = range(first, first + num)
    labels = [LABELS[number % 3] for number in numbers]
    texts = [
        WORDS[label].format(PLACES[number % 10]) + " now" * (number // 10) for number, label in zip(numbers, labels, strict=True)
    ]
    return texts, labels


class UncachedModel:
    """A model as transformers runs it: whole prompts, no prefix, no shared attention."""

    def __init__(self, folder: Path, *, format: Any = "plain") -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.encoder = Encoder(load_tokenizer(folder), format=format)

    def prompt(self, demonstrations: Sequence[tuple[str, str]], query: str, *, instruction: str = "") -> list[int]:
        """Token ids of a whole prompt."""
        ids = list(self.encoder.encode_opening(instruction))
        for text, answer in demonstrations:
            example = self.encoder.encode_example(text, answer)
            ids += [*example.input_ids, *example.answer_ids, *example.gap_ids]
        return [*ids, *self.encoder.encode_query(query)]

    @torch.inference_mode()
    def label_scores(self, prompt: Sequence[int], labels: Sequence[str]) -> np.ndarray:
        """Log-probability of each label and its terminator after a prompt."""
        scores = []
        for label in labels:
            answer = list(self.encoder.encode_answer(label))
            logits = self.model(input_ids=torch.tensor([[*prompt, *answer]]), use_cache=False).logits[0].double()
            places = range(len(prompt) - 1, len(prompt) + len(answer) - 1)
            scores.append(sum(float(logits[place].log_softmax(-1)[token]) for place, token in zip(places, answer, strict=True)))
        return np.array(scores)

    def label_probabilities(self, prompt: Sequence[int], labels: Sequence[str]) -> np.ndarray:
        """Probabilities of the labels, made to sum to one."""
        scores = self.label_scores(prompt, labels)
        return np.exp(scores - np.logaddexp.reduce(scores))

    @torch.inference_mode()
    def answer(self, prompt: Sequence[int], *, max_tokens: int) -> str:
        """The greedy answer, one whole forward pass per token."""
        ids = list(prompt)
        while len(ids) < len(prompt) + max_tokens:
            token = int(self.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
            if token == self.encoder.terminator_id:
                break
            ids.append(token)
        return str(self.encoder.tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True)).strip()


def classifier(folder: Path, **parameters: Any) -> ManyShotClassifier:
    return ManyShotClassifier(str(folder), **({"dtype": "float32", "random_state": 0} | parameters))


def generator(folder: Path, **parameters: Any) -> ManyShotGenerator:
    return ManyShotGenerator(str(folder), **({"dtype": "float32", "random_state": 0} | parameters))


def block(model: Any, order: int = 0) -> list[tuple[str, str]]:
    return [(model.library_[position].input, model.library_[position].answer) for position in model.blocks_[order]]


def count_forward_tokens(folder: Path, call: Callable[[], Any]) -> int:
    """Tokens that the shared model is fed while `call` runs, padding included."""
    fed = []
    model = shared_models.share_model(folder, "float32").loaded.model
    hook = model.register_forward_pre_hook(lambda _, __, options: fed.append(options["input_ids"].numel()), with_kwargs=True)
    try:
        call()
    finally:
        hook.remove()
    return sum(fed)


def seen_by(model: Any, query: str) -> list[tuple[str, str]]:
    """The demonstrations of a query, from the definition: the block, then the most similar others, the most similar last."""
    (scores,) = model._similarity().scores([query])
    ranked = sorted(range(len(scores)), key=lambda position: (-scores[position], model._tie_break.index(position)))
    outside = [position for position in ranked if position not in model.blocks_[0]][: model.num_nearest]
    return block(model) + [(model.library_[position].input, model.library_[position].answer) for position in outside[::-1]]
