"""Models that the estimators of a process share, so that clones, folds and threads load each of them once.

In: a model's name and dtype. Out: the model, its tokenizer and encoders. The last two models used are kept; estimators hold no
reference to them, so that clones and pickles carry no weights. A folder that was written to again is loaded again.
"""

import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from manyicl.attention import use_shared_prefix_attention
from manyicl.encoding import Encoder
from manyicl.engines.native import NativeEngine
from manyicl.modeling import Dtype, LoadedModel, load_model

MAX_MODELS = 2

Format = Literal["plain", "chat"]

_models: "OrderedDict[tuple[str, int, str], SharedModel]" = OrderedDict()
_lock = threading.RLock()


class LockedTokenizer:
    """A tokenizer that one thread uses at a time.

    transformers (5.19 to 5.23) sets `encode_special_tokens` on the shared tokenizer before each call, so that one thread could
    read another's text with special tokens in it.
    """

    bos_token_id: int | None
    eos_token_id: int | None
    all_special_ids: list[int]
    chat_template: Any
    apply_chat_template: Any
    decode: Any

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._lock = threading.Lock()

    def __call__(self, text: str, **options: Any) -> Mapping[str, Any]:
        """Token ids of a text, under "input_ids"."""
        with self._lock:
            found: Mapping[str, Any] = self._tokenizer(text, **options)
        return found

    def __getattr__(self, name: str) -> Any:
        """Everything else is the tokenizer's own."""
        return getattr(self._tokenizer, name)


@dataclass(frozen=True)
class SharedModel:
    """A loaded model and the encoders that its users share."""

    loaded: LoadedModel
    tokenizer: LockedTokenizer
    encoders: dict[str, Encoder] = field(default_factory=dict)

    def engine(self, format: Format, context_tokens: int | None) -> NativeEngine:
        """An engine on this model.

        Raises:
            ModelError: the tokenizer has no chat template, and `format` asks for it.
            BudgetError: the context is wider than the model's positions.
        """
        with _lock:
            if format not in self.encoders:
                self.encoders[format] = Encoder(self.tokenizer, format=format)
        return NativeEngine(self.loaded, self.encoders[format], context_tokens=context_tokens)


def share_model(name: str | Path, dtype: Dtype) -> SharedModel:
    """The model of that name, loaded by the first who asks.

    Raises:
        ModelError: see `modeling.load_model`.
    """
    key = (*_place(str(name)), dtype)
    with _lock:
        if key not in _models:
            loaded = load_model(name, dtype=dtype)
            use_shared_prefix_attention(loaded.model)
            _models[key] = SharedModel(loaded, LockedTokenizer(loaded.tokenizer))
        _models.move_to_end(key)
        while len(_models) > MAX_MODELS:
            _models.popitem(last=False)
        return _models[key]


def _place(name: str) -> tuple[str, int]:
    """A name that means the same from any working folder, and when its weights were last written, 0 for other names."""
    path = Path(name)
    if name == "default" or not path.is_dir():
        return name, 0
    return str(path.resolve()), max((file.stat().st_mtime_ns for file in path.glob("*.safetensors")), default=0)
