"""Models that the estimators of a process share, so that clones, folds and threads load each of them once.

In: a model's name and dtype. Out: the model, its tokenizer and encoders. The last two models used are kept; estimators hold no
reference to them, so that clones and pickles carry no weights. A folder that was written to again is loaded again.
"""

import threading
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from manyicl.attention import use_shared_prefix_attention
from manyicl.dtypes import Dtype
from manyicl.encoding import Encoder
from manyicl.engines.native import NativeEngine
from manyicl.modeling import LoadedModel, load_model

MAX_MODELS = 2

Format = Literal["plain", "chat"]

_models: "OrderedDict[tuple[str, int, str], SharedModel]" = OrderedDict()
_lock = threading.RLock()


@dataclass(frozen=True)
class SharedModel:
    """A loaded model and the encoders that its users share."""

    loaded: LoadedModel
    encoders: dict[str, Encoder] = field(default_factory=dict)

    def engine(self, format: Format, context_tokens: int | None) -> NativeEngine:
        """An engine on this model.

        Raises:
            ModelError: the tokenizer has no chat template, and `format` asks for it.
            BudgetError: the context is wider than the model's positions.
        """
        with _lock:
            if format not in self.encoders:
                self.encoders[format] = Encoder(self.loaded.tokenizer, format=format)
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
            _models[key] = SharedModel(loaded)
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
