"""What a tuned model lost: bits per byte of plain text, which tuning on tasks does not aim at."""

import codecs
import math
from dataclasses import dataclass
from pathlib import Path

import torch

from manyicl.errors import UserInputError
from manyicl.modeling import LoadedModel


@dataclass(frozen=True)
class CorpusLoss:
    """How well a model predicts a corpus; lower is better.

    Attributes:
        bits_per_byte: Bits of all predicted tokens over the bytes of the text.
        num_tokens: Tokens predicted: all but the first of each window.
        window_bits: Bits of the predicted tokens of each window, which pair models with one tokenizer.
    """

    bits_per_byte: float
    num_bytes: int
    num_tokens: int
    window_bits: tuple[float, ...]


def read_corpus(path: Path, *, max_bytes: int) -> str:
    """The first `max_bytes` bytes of a text, cut back to a whole character.

    Raises:
        UserInputError: the file cannot be read, is empty or is not UTF-8.
    """
    try:
        with path.open("rb") as stream:
            content = stream.read(max_bytes)
        text = codecs.getincrementaldecoder("utf-8")().decode(content)  # A character cut in two at the end is left out.
    except OSError as error:
        raise UserInputError(f"{path}: cannot be read ({error.strerror}). Give a plain text file.") from error
    except UnicodeDecodeError as error:
        raise UserInputError(f"{path}: byte {error.start} is not UTF-8. Save the text as UTF-8.") from error
    if not text:
        raise UserInputError(f"{path}: {len(content)} bytes hold no text. Give a plain text file.")
    return text


def corpus_loss(loaded: LoadedModel, text: str, *, window_tokens: int = 2048) -> CorpusLoss:
    """Bits per byte of a text, read in windows that do not overlap; the first token of each window is context only.

    The bytes counted are those of the whole text, so that models with one tokenizer compare exactly.

    Raises:
        UserInputError: the window is wider than the model's positions.
    """
    if window_tokens > loaded.context_tokens:
        raise UserInputError(
            f"a window of {window_tokens} tokens is more than the {loaded.context_tokens} positions of {loaded.name}. Lower it."
        )
    token_ids = torch.tensor(loaded.tokenizer(text, add_special_tokens=False)["input_ids"])
    bits, predicted = [], 0
    for window in token_ids.split(window_tokens):
        if len(window) < 2:
            continue
        with torch.inference_mode():
            logits = loaded.model(input_ids=window.unsqueeze(0).to(loaded.model.device), use_cache=False).logits[0, :-1]
        loss = torch.nn.functional.cross_entropy(logits.float(), window[1:].to(logits.device), reduction="sum")
        bits.append(float(loss) / math.log(2))
        predicted += len(window) - 1
    num_bytes = len(text.encode("utf-8"))
    return CorpusLoss(sum(bits) / num_bytes, num_bytes, predicted, tuple(bits))
