"""A fitted estimator in a folder that another machine opens: JSON for texts and settings, safetensors for keys and values.

    folder/estimator.json    parameters, classes, every example, their orders, the model's hash       written last
    folder/prefix-0/ …       the prefilled block of each order, unless fit_mode is "lazy" (see prefix_files)

Nothing is unpickled, and no weights are kept: the model is named, and must have the hash that it had at fit. Keys and values of
another dtype than this machine's are not used; the demonstrations are then prefilled again, and a warning says so.
"""

import shutil
import warnings
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError
from sklearn.utils.validation import check_is_fitted

from manyicl.estimator.base import FIXED_AT_FIT, KeptInMemory, ManyShotEstimator
from manyicl.estimator.inputs import DataError
from manyicl.files import storage_errors, write_text_atomic
from manyicl.prefix import Prefix
from manyicl.prefix_files import load_prefix, read_prefix_facts, save_prefix
from manyicl.selection import Embed
from manyicl.tasks.task import Example

ESTIMATOR_FILE = "estimator.json"


class SavedClasses(BaseModel):
    """Labels as they were given: a NumPy dtype and their values."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    dtype: str
    values: list[bool | int | float | str]


class SavedEstimator(BaseModel):
    """What estimator.json holds."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: Literal[1] = 1
    estimator: str
    parameters: dict[str, Any]
    uses_embed: bool
    classes: SavedClasses | None
    library: list[tuple[str, str]]
    blocks: list[list[int]]
    tie_break: list[int]
    num_batches: int
    num_left_out: int
    seed: int
    fingerprint: str


def save_estimator(estimator: ManyShotEstimator, folder: Path) -> None:
    """Write a fitted estimator to a folder.

    Raises:
        NotFittedError: it is not fitted.
        DataError: random_state is a generator, which JSON cannot hold, or the labels are neither text nor numbers.
        StorageError: the disk is full or the folder cannot be written.
    """
    check_is_fitted(estimator)
    parameters = estimator.get_params(deep=False)
    embed = parameters.pop("embed")
    seed = parameters["random_state"]
    if seed is not None and not isinstance(seed, int | np.integer):
        raise DataError(f"random_state={seed!r} cannot be written as JSON. Give a whole number: set_params(random_state=0).")
    parameters |= {"random_state": None if seed is None else int(seed), "model": str(estimator.model)}
    saved = SavedEstimator(
        estimator=type(estimator).__name__,
        parameters={name: value.item() if isinstance(value, np.generic) else value for name, value in parameters.items()},
        uses_embed=embed is not None,
        classes=_save_classes(getattr(estimator, "classes_", None)),
        library=[(example.input, example.answer) for example in estimator.library_],
        blocks=estimator.blocks_,
        tie_break=estimator._tie_break,
        num_batches=estimator._num_batches,
        num_left_out=estimator.num_left_out_,
        seed=estimator._seed,
        fingerprint=estimator.fingerprint_,
    )
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        # Without it the folder holds no estimator: what is being written is never read together with what was there.
        (folder / ESTIMATOR_FILE).unlink(missing_ok=True)
        for old in folder.glob("prefix-[0-9]*/prefix.json"):
            shutil.rmtree(old.parent)
    if estimator.fit_mode != "lazy":
        for order, prefix in enumerate(estimator.open_prefixes() if estimator.num_demonstrations_ else []):
            save_prefix(prefix, estimator._facts(estimator._engine()), folder / f"prefix-{order}")
    write_text_atomic(folder / ESTIMATOR_FILE, saved.model_dump_json(indent=1) + "\n")


def load_estimator(kind: type[ManyShotEstimator], folder: Path, *, model: Any, embed: Embed | None) -> Any:
    """The estimator of a folder.

    Raises:
        DataError: the folder holds none, a broken one, another kind, or one of another model; or `embed` is missing.
        PrefixError: a prefix is damaged.
        ModelError: the model cannot be loaded.
    """
    saved = _read(folder)
    if saved.estimator != kind.__name__:
        raise DataError(f"{folder}: holds a {saved.estimator}, not a {kind.__name__}. Use {saved.estimator}.from_pretrained.")
    if saved.uses_embed != (embed is not None):
        raise DataError(
            f"{folder}: was fitted {'with' if saved.uses_embed else 'without'} embeddings. "
            + ("Give the same function again: embed=…" if saved.uses_embed else "Leave embed out.")
        )
    unknown = set(saved.parameters) - set(kind._get_param_names())
    if unknown:
        raise DataError(f"{folder / ESTIMATOR_FILE}: unknown parameters {sorted(unknown)}. Use the version that wrote it.")
    estimator: Any = kind(**saved.parameters, embed=embed)
    if model is not None:
        estimator.model = model
    if saved.classes is not None:
        estimator.classes_ = np.array(saved.classes.values, dtype=np.dtype(saved.classes.dtype))
    estimator.library_ = [Example(text, answer) for text, answer in saved.library]
    estimator.blocks_ = saved.blocks
    estimator.num_demonstrations_ = len(saved.blocks[0])
    estimator.num_left_out_ = saved.num_left_out
    estimator.fingerprint_ = saved.fingerprint
    estimator._tie_break = saved.tie_break
    estimator._num_batches = saved.num_batches
    estimator._seed = saved.seed
    estimator._kept = KeptInMemory()
    estimator._fixed = {name: getattr(estimator, name) for name in FIXED_AT_FIT if hasattr(estimator, name)}
    estimator._engine()  # Refuses another model.
    prefixes = {} if estimator.fit_mode == "lazy" else _load_prefixes(estimator, folder)
    if estimator.fit_mode == "store":
        for prefix in prefixes.values():
            estimator._store().put(prefix, estimator._facts(estimator._engine()))
    else:
        estimator._kept.prefixes = prefixes
    return estimator


def _load_prefixes(estimator: ManyShotEstimator, folder: Path) -> dict[int, Prefix]:
    """The prefixes of a folder, of each order; none where they are of another dtype than the model here."""
    engine = estimator._engine()
    identity = estimator._facts(engine).identity
    prefixes = {}
    for order in (order for order, block in enumerate(estimator.blocks_) if block):
        path = folder / f"prefix-{order}"
        saved = read_prefix_facts(path).identity
        if saved.dtype != identity.dtype and saved.model_copy(update={"dtype": identity.dtype}) == identity:
            warnings.warn(
                f"{folder}: its keys and values are {saved.dtype}, the model here is {identity.dtype}: the demonstrations are "
                "prefilled again at the first query.",
                UserWarning,
                stacklevel=4,
            )
            return {}
        prefix, _ = load_prefix(path, identity, device=engine.loaded.model.device)
        if prefix.token_ids != estimator._block_tokens(engine, order):
            raise DataError(f"{path}: holds other demonstrations than {folder / ESTIMATOR_FILE} says. Save the estimator again.")
        prefixes[order] = prefix
    return prefixes


def _save_classes(classes: Any) -> SavedClasses | None:
    if classes is None:
        return None
    if classes.dtype.kind not in "biufUO" or not all(isinstance(label, bool | int | float | str) for label in classes.tolist()):
        raise DataError(f"labels of the type {classes.dtype} cannot be written as JSON. Use strings, integers or booleans.")
    return SavedClasses(dtype=classes.dtype.str, values=classes.tolist())


def _read(folder: Path) -> SavedEstimator:
    path = folder / ESTIMATOR_FILE
    try:
        text = path.read_text(encoding="utf-8")
        return SavedEstimator.model_validate_json(text)
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error}). Give a folder written by save_pretrained.") from error
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"])) or "the file"
        raise DataError(f"{path}: {where}: {problem['msg']}. Save the estimator again.") from error
