"""A prefix in a folder, opened again in milliseconds: JSON for what it is, safetensors for its keys and values.

    folder/prefix.json                       whose it is, what it holds, checksums           written last, replaced in one step
    folder/states-<checksum>.safetensors     keys, values, token ids, stops                  mapped into memory, not read

In: a prefix and facts about it. Out: bit for bit the same prefix. Cost of opening: one pass of a checksum over the file (10 ms
for 170 MB whose pages are in memory; otherwise the disk's speed), and memory that is shared by every process that opens it.

The states file is named by its content, so that at any moment, and after a kill at any moment, `prefix.json` names a whole one.
A prefix is refused when it was made by another model, adapter, tokenizer, dtype or format, and when a single byte of either
file is missing, changed or too many. The checksum (XXH3, 128 bits) tells damage, not intent: who may write the folder may
put there what they like. Files are data, and nothing in them is run. One writer at a time; any number of readers. Files are
replaced and never written in place: what has been opened stays as it is, even after the folder is gone.
"""

import dataclasses
import importlib.metadata
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
import xxhash
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from manyicl.encoding import Encoder
from manyicl.errors import PrefixError
from manyicl.files import storage_errors, write_bytes_atomic
from manyicl.planning import read_shape
from manyicl.prefix import Prefix
from manyicl.prefix_states import name_tensors, states_of_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PREFIX_FILE = "prefix.json"
ALIGNMENT = 64
_AGAIN = "The file is damaged, or of another version of manyicl; prefill and save again."

# Names of types in a safetensors header.
_CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.uint8: "U8",
}
_TYPES = {code: dtype for dtype, code in _CODES.items()}


class PrefixIdentity(BaseModel):
    """What keys and values depend on besides their tokens: a prefix serves only who has an equal one.

    Attributes:
        fingerprint: SHA-256 over the files of model, adapter and tokenizer (`LoadedModel.fingerprint`).
        dtype: The model's dtype, such as "bfloat16".
        format: "plain" or "chat".
        layout: The fixed text around inputs and answers, by the names of `templates.Layout`.
        terminator_id: The token that ends every answer.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    fingerprint: str
    dtype: str
    num_layers: int
    num_key_value_heads: int
    head_size: int
    format: str
    layout: dict[str, str | bool | None]
    terminator_id: int


class PrefixFacts(BaseModel):
    """What is kept beside keys and values, and comes back with them.

    Attributes:
        instruction: The sentence before the demonstrations; empty for none.
        labels: The label words that queries are scored against, in their order; empty for free text.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    identity: PrefixIdentity
    instruction: str = ""
    labels: tuple[str, ...] = ()


class _StatesFile(BaseModel):
    """Name, size and XXH3 checksum of the file of keys and values."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    file: str = Field(pattern=r"^states-[0-9a-f]{32}\.safetensors$")
    num_bytes: int
    checksum: str


class _PrefixFile(BaseModel):
    """What prefix.json holds; its own checksum is that of the rest."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format_version: Literal[1] = 1
    versions: dict[str, str]
    facts: PrefixFacts
    num_tokens: int
    num_shots: int
    is_int8: bool
    states: _StatesFile
    checksum: str = ""

    def render(self) -> bytes:
        """The one text that stands for this content, checksum included."""
        checksum = xxhash.xxh3_128_hexdigest(self.model_dump_json(exclude={"checksum"}).encode())
        return (self.model_copy(update={"checksum": checksum}).model_dump_json(indent=1) + "\n").encode()


def identify_prefix(model: "PreTrainedModel", fingerprint: str, encoder: Encoder) -> PrefixIdentity:
    """The identity of prefixes that this model and encoder make; `fingerprint` is that of the `LoadedModel`."""
    shape = read_shape(model.config)
    return PrefixIdentity(
        fingerprint=fingerprint,
        dtype=_dtype_name(model.dtype),
        num_layers=shape.num_layers,
        num_key_value_heads=shape.num_key_value_heads,
        head_size=shape.head_size,
        format=encoder.format,
        layout=dataclasses.asdict(encoder.layout),
        terminator_id=encoder.terminator_id,
    )


def save_prefix(prefix: Prefix, facts: PrefixFacts, folder: Path) -> None:
    """Write a prefix to a folder; one that is there already is replaced in one step.

    One layer at a time is copied. Until prefix.json is renamed, last, the folder holds what it held before.

    Raises:
        PrefixError: the prefix is not one of the model that `facts` names.
        StorageError: the disk is full or the folder cannot be written.
    """
    _check_own(prefix, facts.identity)
    tensors = name_tensors(prefix.states)
    tensors["token_ids"] = torch.tensor(prefix.token_ids, dtype=torch.int32)
    tensors["stops"] = torch.tensor(prefix.stops, dtype=torch.int32)
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        states = _write_states(tensors, folder)
        saved = _PrefixFile(
            versions={name: importlib.metadata.version(name) for name in ("manyicl", "torch", "transformers")},
            facts=facts,
            num_tokens=prefix.num_tokens,
            num_shots=prefix.num_shots,
            is_int8=prefix.is_int8,
            states=states,
        )
        write_bytes_atomic(folder / PREFIX_FILE, saved.render())
        for path in [*folder.glob("states-*.safetensors"), *folder.glob(".states-*.tmp")]:
            if path.name != states.file:
                path.unlink(missing_ok=True)


def load_prefix(folder: Path, identity: PrefixIdentity, *, device: torch.device | str = "cpu") -> tuple[Prefix, PrefixFacts]:
    """The prefix of a folder and the facts saved with it, verified to the last byte.

    On a processor the states are the file's own pages, copied only if something should write to them.

    Args:
        identity: That of the model at hand, see `identify_prefix`.

    Raises:
        PrefixError: there is none, it is another model's or format's, or it is damaged.
    """
    saved = _read_prefix_file(folder)
    _check_identity(folder, saved.facts.identity, identity)
    return _map_prefix(folder, saved, device), saved.facts


def open_any_prefix(folder: Path, *, device: torch.device | str = "cpu") -> tuple[Prefix, PrefixFacts]:
    """Like `load_prefix` for callers that check by themselves whose prefix it is.

    Raises:
        PrefixError: there is none, or it is damaged.
    """
    saved = _read_prefix_file(folder)
    return _map_prefix(folder, saved, device), saved.facts


def read_prefix_facts(folder: Path) -> PrefixFacts:
    """What a folder says of its prefix; keys and values are not looked at.

    Raises:
        PrefixError: there is none, or prefix.json is damaged.
    """
    return _read_prefix_file(folder).facts


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _check_own(prefix: Prefix, identity: PrefixIdentity) -> None:
    """Refuse to save a prefix under the name of a model that cannot have made it."""
    dtype = getattr(prefix.states, "dtype", None) or (prefix.states[0][0].dtype if prefix.states else None)
    found = {"dtype": _dtype_name(dtype) if dtype else identity.dtype, "num_layers": len(prefix.states) or identity.num_layers}
    wrong = [
        f"{name} {value}, not {getattr(identity, name)}" for name, value in found.items() if value != getattr(identity, name)
    ]
    if wrong:
        raise PrefixError(
            f"the prefix has {' and '.join(wrong)} as the given identity says. Give that of the model that made it."
        )


def _check_identity(folder: Path, saved: PrefixIdentity, identity: PrefixIdentity) -> None:
    names = [name for name in PrefixIdentity.model_fields if getattr(saved, name) != getattr(identity, name)]
    if names:
        differences = "; ".join(
            f"{name} was {_show(getattr(saved, name))}, here it is {_show(getattr(identity, name))}" for name in names
        )
        raise PrefixError(
            f"{folder / PREFIX_FILE}: the prefix was made by another model, tokenizer, dtype or format: {differences}. "
            "Load what it was made with, or prefill and save again."
        )


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}…"


def _read_prefix_file(folder: Path) -> _PrefixFile:
    path = folder / PREFIX_FILE
    try:
        content = path.read_bytes()
    except OSError as error:
        raise PrefixError(
            f"{path}: cannot be read ({error.strerror or error}). Give a folder that save_prefix has written."
        ) from error
    try:
        saved = _PrefixFile.model_validate_json(content)
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"])) or "the file"
        raise PrefixError(f"{path}: {where}: {problem['msg']}. {_AGAIN}") from error
    if saved.render() != content:
        raise PrefixError(
            f"{path}: its {len(content)} bytes do not have the checksum {saved.checksum!r} that it states. {_AGAIN}"
        )
    return saved


def _map_prefix(folder: Path, saved: _PrefixFile, device: torch.device | str) -> Prefix:
    """The prefix of a states file that is mapped into memory, its checksum verified on the very bytes that are used."""
    path, states = folder / saved.states.file, saved.states
    try:
        num_bytes = path.stat().st_size
        if num_bytes != states.num_bytes:
            raise PrefixError(f"{path}: has {num_bytes} bytes, {PREFIX_FILE} says {states.num_bytes}. {_AGAIN}")
        content = torch.from_file(str(path), shared=False, size=num_bytes, dtype=torch.uint8)
    except (OSError, RuntimeError) as error:  # torch 2.8 to 2.13 raises a RuntimeError for a file that cannot be opened.
        raise PrefixError(f"{path}: cannot be read ({error}). {_AGAIN}") from error
    checksum = xxhash.xxh3_128_hexdigest(content.numpy().data)
    if checksum != states.checksum:
        raise PrefixError(f"{path}: its {num_bytes} bytes have the checksum {checksum}, not {states.checksum}. {_AGAIN}")
    try:
        tensors = {name: tensor.to(device) for name, tensor in _split_tensors(content).items()}
        return _build_prefix(tensors, saved)
    except (KeyError, ValueError, RuntimeError) as error:
        raise PrefixError(f"{path}: does not hold what {PREFIX_FILE} says ({error}). {_AGAIN}") from error


def _build_prefix(tensors: Mapping[str, Tensor], saved: _PrefixFile) -> Prefix:
    """The prefix of named tensors.

    Raises:
        KeyError: one is missing.
        ValueError: they hold another number of tokens, demonstrations or heads.
    """
    identity = saved.facts.identity
    num_layers = identity.num_layers if saved.num_tokens else 0
    int8_of = getattr(torch, identity.dtype) if saved.is_int8 else None
    states = states_of_tensors(tensors, num_layers, int8_of=int8_of)
    prefix = Prefix(tuple(tensors["token_ids"].tolist()), tuple(tensors["stops"].tolist()), states)
    shapes = {tuple(tensor.shape[:3:2]) for name, tensor in tensors.items() if name.endswith((".key", ".value"))}
    if (prefix.num_tokens, prefix.num_shots) != (saved.num_tokens, saved.num_shots) or shapes - {(1, saved.num_tokens)}:
        raise ValueError(f"{prefix.num_tokens} tokens and {prefix.num_shots} demonstrations, states of (1, tokens) {shapes}")
    return prefix


def _split_tensors(content: Tensor) -> dict[str, Tensor]:
    """The tensors of a safetensors file, as views of its bytes."""
    start = 8 + int.from_bytes(content[:8].numpy().tobytes(), "little")
    header = json.loads(content[8:start].numpy().tobytes())
    tensors = {}
    for name, entry in header.items():
        first, last = entry["data_offsets"]
        tensors[name] = content[start + first : start + last].view(_TYPES[entry["dtype"]]).view(entry["shape"])
    return tensors


def _write_states(tensors: Mapping[str, Tensor], folder: Path) -> _StatesFile:
    """Write a safetensors file named by its checksum: a temporary file, synced, then renamed.

    Not by the library of that name, which would hold a second copy of everything: here one tensor at a time is copied.
    """
    # Wide types first, so that every tensor stands at a multiple of its width.
    ordered = dict(sorted(tensors.items(), key=lambda item: -item[1].element_size()))
    digest, num_bytes = xxhash.xxh3_128(), 0
    descriptor, name = tempfile.mkstemp(dir=folder, prefix=".states-", suffix=".tmp")
    temporary = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as stream:
            for block in _render_blocks(ordered):
                stream.write(block)
                digest.update(block)
                num_bytes += len(block)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.chmod(0o644)
        checksum = digest.hexdigest()
        file = f"states-{checksum}.safetensors"
        temporary.replace(folder / file)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return _StatesFile(file=file, num_bytes=num_bytes, checksum=checksum)


def _render_blocks(tensors: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    """The bytes of a safetensors file: its header, padded so that the data is aligned, and one tensor after another."""
    header, stop = {}, 0
    for name, tensor in tensors.items():
        start, stop = stop, stop + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, stop]}
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    yield len(text).to_bytes(8, "little") + text
    for tensor in tensors.values():
        yield tensor.contiguous().cpu().flatten().view(torch.uint8).numpy().data
