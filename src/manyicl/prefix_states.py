"""How a prefix's keys and values are held: in a buffer that leaves room to grow, or as 8-bit integers.

    buffer   [1, K, C, D]   tokens 0 … P … written, P … C spare; a prefix is the view [:, :, :P], which is never rewritten
    int8     layer by layer; the states of one layer become floating point while it is read

Letters: K key-value heads, P tokens of the prefix, C tokens that fit, D head size.

Growing by one demonstration writes that demonstration only, as long as there is room; a buffer is remade a quarter larger, so
that n tokens appended one by one are copied about five times each and not n / 2 times. Spare room is address space that
a processor's memory is not charged for until it is written. Int8 takes a little over half of bf16's memory and changes scores a
little; every forward pass converts every layer once, a few milliseconds each for thousands of tokens.
"""

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, overload

import torch
from torch import Tensor

from manyicl.attention import LayerStates

LEVELS = 255


class StatesBuffer:
    """Room for the keys and values of a growing prefix. Written tokens never change, so prefixes are views of it.

    Args:
        capacity: Tokens that fit, C.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._num_tokens = 0
        self._layers: list[LayerStates] = []
        self._lock = threading.Lock()

    def claim(self, start: int, stop: int) -> bool:
        """Whether the caller may write tokens `[start, stop)`: they fit, and nobody has claimed what follows `start`.

        Of several that extend the same prefix the first gets the room, and the others need buffers of their own.
        """
        with self._lock:
            if start != self._num_tokens or stop > self.capacity:
                return False
            self._num_tokens = stop
            return True

    @torch.inference_mode()
    def write(self, start: int, states: Sequence[LayerStates]) -> None:
        """Put keys and values [1, K, L, D] of every layer at tokens `[start, start + L)`, which the caller has claimed."""
        if not self._layers:
            self._layers = [(self._allocate(key), self._allocate(value)) for key, value in states]
        for own, new in zip(self._layers, states, strict=True):
            for room, part in zip(own, new, strict=True):
                room[:, :, start : start + part.shape[2]] = part

    def _allocate(self, like: Tensor) -> Tensor:
        return like.new_empty(1, like.shape[1], self.capacity, like.shape[3])

    def view(self, stop: int) -> tuple[LayerStates, ...]:
        """Keys and values of tokens `[0, stop)`, not copied."""
        return tuple((key[:, :, :stop], value[:, :, :stop]) for key, value in self._layers) if stop else ()


class Int8Layer(NamedTuple):
    """One layer's states as uint8 with fp32 scales and offsets: state = number · scale + lowest.

    Keys share a scale per head and channel, values per head and token, as their outliers lie (KIVI, arXiv 2402.02750, section 3).
    """

    key: Tensor  # uint8 [1, K, P, D]
    key_scale: Tensor  # fp32 [1, K, 1, D]
    key_lowest: Tensor
    value: Tensor  # uint8 [1, K, P, D]
    value_scale: Tensor  # fp32 [1, K, P, 1]
    value_lowest: Tensor


@dataclass(frozen=True)
class Int8States(Sequence[LayerStates]):
    """Keys and values held as 8-bit integers; `states[layer]` makes one layer's floating-point states anew each time.

    Attributes:
        layers: The integers and their scales.
        dtype: The floating-point type that is given back.
    """

    layers: tuple[Int8Layer, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Memory of integers and scales, in bytes."""
        return sum(tensor.numel() * tensor.element_size() for layer in self.layers for tensor in layer)

    def trim(self, stop: int) -> "Int8States":
        """The states of tokens `[0, stop)`; shares memory with these."""
        return Int8States(tuple(_trim_layer(layer, stop) for layer in self.layers) if stop else (), self.dtype)

    def __len__(self) -> int:
        return len(self.layers)

    @overload
    def __getitem__(self, index: int) -> LayerStates: ...
    @overload
    def __getitem__(self, index: slice) -> list[LayerStates]: ...
    def __getitem__(self, index: int | slice) -> LayerStates | list[LayerStates]:
        if isinstance(index, slice):
            return [self[layer] for layer in range(*index.indices(len(self)))]
        layer = self.layers[index]
        key = (layer.key * layer.key_scale).add_(layer.key_lowest)
        value = (layer.value * layer.value_scale).add_(layer.value_lowest)
        return key.to(self.dtype), value.to(self.dtype)


@torch.inference_mode()
def to_int8(states: Sequence[LayerStates]) -> Int8States:
    """States as 8-bit integers; one layer at a time is held in fp32."""
    dtype = states[0][0].dtype if states else torch.float32
    layers = []
    for key, value in states:
        layers.append(Int8Layer(*_quantise(key, dim=2), *_quantise(value, dim=3)))
    return Int8States(tuple(layers), dtype)


def _quantise(states: Tensor, *, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Integers 0 to 255, scale and lowest value; one scale for all states along `dim`."""
    lowest, highest = states.float().aminmax(dim=dim, keepdim=True)
    scale = ((highest - lowest) / LEVELS).clamp_min(torch.finfo(torch.float32).tiny)
    return ((states.float() - lowest) / scale).round_().clamp_(0, LEVELS).to(torch.uint8), scale, lowest


def _trim_layer(layer: Int8Layer, stop: int) -> Int8Layer:
    value_scale, value_lowest = layer.value_scale[:, :, :stop], layer.value_lowest[:, :, :stop]
    return layer._replace(
        key=layer.key[:, :, :stop], value=layer.value[:, :, :stop], value_scale=value_scale, value_lowest=value_lowest
    )


def name_tensors(states: Sequence[LayerStates]) -> dict[str, Tensor]:
    """Every tensor that holds the states, by the name it has in a file, such as `layers.0.key`."""
    if isinstance(states, Int8States):
        parts: list[dict[str, Tensor]] = [layer._asdict() for layer in states.layers]
    else:
        parts = [{"key": key, "value": value} for key, value in states]
    return {f"layers.{number}.{name}": tensor for number, part in enumerate(parts) for name, tensor in part.items()}


def states_of_tensors(tensors: Mapping[str, Tensor], num_layers: int, *, int8_of: torch.dtype | None) -> Sequence[LayerStates]:
    """The reverse of `name_tensors`.

    Args:
        int8_of: The floating-point type of states that are held as 8-bit integers; None when they are not.

    Raises:
        KeyError: a tensor is missing.
    """
    if int8_of is None:
        return tuple((tensors[f"layers.{layer}.key"], tensors[f"layers.{layer}.value"]) for layer in range(num_layers))
    layers = (Int8Layer(*(tensors[f"layers.{layer}.{name}"] for name in Int8Layer._fields)) for layer in range(num_layers))
    return Int8States(tuple(layers), int8_of)
