"""A saved prefix comes back bit for bit, and is refused when it is another model's or when a single byte is not right."""

import errno
import json
import os
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from manyicl.encoding import Encoder
from manyicl.errors import PrefixError, StorageError
from manyicl.modeling import load_model
from manyicl.prefix import Prefix, extend, prefill, quantise
from manyicl.prefix_files import (
    PREFIX_FILE,
    PrefixFacts,
    PrefixIdentity,
    identify_prefix,
    load_prefix,
    open_any_prefix,
    read_prefix_facts,
    save_prefix,
)
from manyicl.scoring import score_labels
from manyicl.tasks.task import Example
from plain_fixtures import ARCHITECTURES

IDENTITY = PrefixIdentity(
    fingerprint="a1",
    dtype="bfloat16",
    num_layers=2,
    num_key_value_heads=3,
    head_size=4,
    format="plain",
    layout={"opening": "", "is_markup": False, "before_instruction": None},
    terminator_id=7,
)
FACTS = PrefixFacts(identity=IDENTITY, instruction="Übersetze \u2028 “so”\n", labels=("ja", "nein", "日本語"))


def demonstrations(count: int) -> list[Example]:
    return [Example("q" * (1 + number % 5) + str(number), "yes" if number % 2 else "no") for number in range(count)]


def make_prefix(num_tokens: int = 6, *, seed: int = 0, num_shots: int = 2) -> Prefix:
    """A prefix of `IDENTITY`'s model, made of random numbers."""
    random = torch.Generator().manual_seed(seed)
    layers = (torch.randn(2, 1, 3, num_tokens, 4, generator=random).bfloat16().unbind() for _ in range(2))
    stops = [num_tokens * shot // num_shots for shot in range(num_shots + 1)] if num_shots else [num_tokens]
    token_ids = torch.randint(0, 1000, (num_tokens,), generator=random).tolist()
    return Prefix(tuple(token_ids), tuple(stops), tuple(tuple(pair) for pair in layers) if num_tokens else ())


def assert_same(first: Prefix, second: Prefix) -> None:
    assert (first.token_ids, first.stops, first.is_int8) == (second.token_ids, second.stops, second.is_int8)
    assert len(first.states) == len(second.states)
    for own, other in zip(first.states, second.states, strict=True):
        assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(own, other, strict=True))


def states_file(folder: Path) -> Path:
    (found,) = folder.glob("states-*.safetensors")
    return found


@contextmanager
def file_size_limit(num_bytes: int) -> Iterator[None]:
    """As on a full disk, the system refuses to write more than that to any file."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("as_int8", [False, True])
def test_a_saved_prefix_comes_back_bit_for_bit(
    tiny_loaded: Callable[..., Any], tmp_path: Path, architecture: str, as_int8: bool
) -> None:
    loaded = tiny_loaded(architecture)
    encoder = Encoder(loaded.tokenizer, format="chat")
    made = prefill(loaded.model, encoder, demonstrations(6), instruction="Say yes or no.")
    made = quantise(made) if as_int8 else made
    identity = identify_prefix(loaded.model, loaded.fingerprint, encoder)
    facts = PrefixFacts(identity=identity, instruction="Say yes or no.", labels=("yes", "no"))
    save_prefix(made, facts, tmp_path)
    opened, found = load_prefix(tmp_path, identity)
    assert_same(opened, made)
    assert found == facts == read_prefix_facts(tmp_path)
    queries, labels = [encoder.encode_query("qq1")], encoder.encode_labels(["yes", "no"])
    scores = [score_labels(loaded.model, prefix, queries, [labels]) for prefix in (made, opened)]
    assert np.array_equal(*scores)
    assert_same(opened.trim(3), made.trim(3))
    if not as_int8:
        more = [Example("new", "no")]
        assert_same(extend(loaded.model, encoder, opened, more), extend(loaded.model, encoder, made, more))


@pytest.mark.parametrize(
    "prefix",
    [
        make_prefix(),
        make_prefix(0, num_shots=0),
        make_prefix(5, num_shots=0),
        make_prefix(9).trim(1),
        quantise(make_prefix(7)).trim(1),
    ],
    ids=["plain", "empty", "opening alone", "trimmed", "int8 trimmed"],
)
def test_every_kind_of_prefix_comes_back(tmp_path: Path, prefix: Prefix) -> None:
    save_prefix(prefix, FACTS, tmp_path / "new" / "folder")
    opened, facts = load_prefix(tmp_path / "new" / "folder", IDENTITY)
    assert_same(opened, prefix)
    assert facts == FACTS


def test_the_states_file_is_one_that_safetensors_reads(tmp_path: Path) -> None:
    prefix = quantise(make_prefix(7))
    save_prefix(prefix, FACTS, tmp_path)
    tensors = safetensors.torch.load_file(states_file(tmp_path))
    assert torch.equal(tensors.pop("token_ids"), torch.tensor(prefix.token_ids, dtype=torch.int32))
    assert torch.equal(tensors.pop("stops"), torch.tensor(prefix.stops, dtype=torch.int32))
    expected = {
        f"layers.{i}.{name}": part for i, layer in enumerate(prefix.states.layers) for name, part in layer._asdict().items()
    }
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)


def test_prefix_json_says_what_is_in_the_folder(tmp_path: Path) -> None:
    save_prefix(make_prefix(), FACTS, tmp_path)
    content = json.loads((tmp_path / PREFIX_FILE).read_text(encoding="utf-8"))
    assert sorted(path.name for path in tmp_path.iterdir()) == [PREFIX_FILE, content["states"]["file"]]
    assert content["versions"].keys() == {"manyicl", "torch", "transformers"}
    assert content["facts"]["labels"] == ["ja", "nein", "日本語"]
    assert (content["num_tokens"], content["num_shots"], content["is_int8"]) == (6, 2, False)
    assert content["states"]["num_bytes"] == states_file(tmp_path).stat().st_size
    assert states_file(tmp_path).name == f"states-{content['states']['checksum']}.safetensors"


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("fingerprint", "b2", "fingerprint was 'a1', here it is 'b2'"),
        ("dtype", "float32", "dtype was 'bfloat16', here it is 'float32'"),
        ("num_layers", 3, "num_layers was 2, here it is 3"),
        ("num_key_value_heads", 1, "num_key_value_heads was 3, here it is 1"),
        ("head_size", 8, "head_size was 4, here it is 8"),
        ("format", "chat", "format was 'plain', here it is 'chat'"),
        ("layout", {"opening": "x"}, "layout was {'opening': '', .*}, here it is {'opening': 'x'}"),
        ("terminator_id", 8, "terminator_id was 7, here it is 8"),
    ],
)
def test_a_prefix_of_something_else_is_refused_by_name(tmp_path: Path, field: str, value: Any, message: str) -> None:
    save_prefix(make_prefix(), FACTS, tmp_path)
    with pytest.raises(
        PrefixError, match=f"prefix.json: the prefix was made by another .*: {message}. Load what it was made with"
    ):
        load_prefix(tmp_path, IDENTITY.model_copy(update={field: value}))


def change_model(folder: Path, other: Path) -> None:
    shutil.copy(other / "model.safetensors", folder)


def change_tokenizer(folder: Path, other: Path) -> None:
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    content["pre_tokenizer"]["add_prefix_space"] = True
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")


def change_template(folder: Path, other: Path) -> None:
    (folder / "chat_template.jinja").write_text("{{ messages }}", encoding="utf-8")


@pytest.mark.parametrize("change", [change_model, change_tokenizer, change_template])
def test_a_changed_model_or_tokenizer_on_disk_is_refused(
    tiny_model_folder: Callable[..., Path], tmp_path: Path, change: Callable[[Path, Path], None]
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model_folder(), folder)
    loaded = load_model(folder)
    encoder = Encoder(loaded.tokenizer)
    identity = identify_prefix(loaded.model, loaded.fingerprint, encoder)
    save_prefix(prefill(loaded.model, encoder, demonstrations(2)), PrefixFacts(identity=identity), tmp_path / "prefix")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    change(folder, tiny_model_folder(seed=1))
    assert before != {path.name: path.read_bytes() for path in folder.iterdir()}
    again = load_model(folder)
    with pytest.raises(PrefixError, match="fingerprint was"):
        load_prefix(tmp_path / "prefix", identify_prefix(again.model, again.fingerprint, Encoder(again.tokenizer)))


def test_a_prefix_is_not_saved_as_that_of_a_model_that_cannot_have_made_it(tmp_path: Path) -> None:
    other = IDENTITY.model_copy(update={"dtype": "float32", "num_layers": 5})
    with pytest.raises(PrefixError, match="the prefix has dtype bfloat16, not float32 and num_layers 2, not 5"):
        save_prefix(make_prefix(), PrefixFacts(identity=other), tmp_path)
    with pytest.raises(PrefixError, match="dtype bfloat16, not float32"):
        save_prefix(quantise(make_prefix()), PrefixFacts(identity=IDENTITY.model_copy(update={"dtype": "float32"})), tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("as_int8", [False, True])
def test_every_third_byte_is_noticed_when_it_changes(tmp_path: Path, as_int8: bool) -> None:
    prefix = make_prefix(4)
    save_prefix(quantise(prefix) if as_int8 else prefix, FACTS, tmp_path)
    for path in (tmp_path / PREFIX_FILE, states_file(tmp_path)):
        content = path.read_bytes()
        for place in range(0, len(content), 3):
            flipped = bytes([content[place] ^ (1 << place % 8)])
            path.write_bytes(content[:place] + flipped + content[place + 1 :])
            with pytest.raises(PrefixError, match=r"prefill and save again|another model|cannot be read"):
                load_prefix(tmp_path, IDENTITY)
        path.write_bytes(content)
    load_prefix(tmp_path, IDENTITY)


@given(in_states=st.booleans(), data=st.data())
@settings(max_examples=100)
def test_any_damage_is_noticed(in_states: bool, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("prefix")
    save_prefix(make_prefix(4), FACTS, folder)
    path = states_file(folder) if in_states else folder / PREFIX_FILE
    content = path.read_bytes()
    start = data.draw(st.integers(0, len(content)))
    stop = data.draw(st.integers(start, min(len(content), start + 40)) | st.just(len(content)))
    damaged = content[:start] + data.draw(st.binary(max_size=40)) + content[stop:]
    if damaged == content:
        return
    path.write_bytes(damaged)
    with pytest.raises(PrefixError):
        load_prefix(folder, IDENTITY)
    with pytest.raises(PrefixError):
        open_any_prefix(folder)


def test_a_torn_or_lengthened_states_file_is_refused_with_sizes(tmp_path: Path) -> None:
    save_prefix(make_prefix(4), FACTS, tmp_path)
    path = states_file(tmp_path)
    content = path.read_bytes()
    for length in [*range(0, len(content), 7), len(content) - 1, len(content) + 1]:
        path.write_bytes((content + b" ")[:length])
        with pytest.raises(PrefixError, match=f"has {length} bytes, prefix.json says {len(content)}. The file is damaged"):
            load_prefix(tmp_path, IDENTITY)


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(PrefixError, match=r"prefix.json: cannot be read \(No such file or directory\). Give a folder"):
        load_prefix(tmp_path / "nowhere", IDENTITY)
    save_prefix(make_prefix(), FACTS, tmp_path)
    states = states_file(tmp_path).rename(tmp_path / "away")
    with pytest.raises(PrefixError, match=r"states-\w+.safetensors: cannot be read"):
        load_prefix(tmp_path, IDENTITY)
    states.rename(tmp_path / json.loads((tmp_path / PREFIX_FILE).read_text(encoding="utf-8"))["states"]["file"])
    load_prefix(tmp_path, IDENTITY)
    (tmp_path / PREFIX_FILE).unlink()
    with pytest.raises(PrefixError, match=r"prefix\.json: cannot be read"):
        load_prefix(tmp_path, IDENTITY)


def rewrite(folder: Path, **changes: Any) -> None:
    """Change prefix.json and give it a checksum that holds, as another writer could."""
    from manyicl.prefix_files import _PrefixFile

    saved = _PrefixFile.model_validate_json((folder / PREFIX_FILE).read_bytes()).model_copy(update=changes)
    (folder / PREFIX_FILE).write_bytes(saved.render())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 2}, "format_version: Input should be 1. The file is damaged, or of another version"),
        ({"num_tokens": 5}, "does not hold what prefix.json says"),
        ({"num_shots": 1}, r"does not hold what prefix.json says \(6 tokens and 2 demonstrations"),
        ({"is_int8": True}, r"does not hold what prefix.json says \('layers.0.key_scale'\)"),
    ],
)
def test_a_file_whose_parts_do_not_agree_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    save_prefix(make_prefix(), FACTS, tmp_path)
    rewrite(tmp_path, **changes)
    with pytest.raises(PrefixError, match=message):
        load_prefix(tmp_path, IDENTITY)


def test_a_file_outside_the_folder_is_not_opened(tmp_path: Path) -> None:
    save_prefix(make_prefix(), FACTS, tmp_path)
    content = json.loads((tmp_path / PREFIX_FILE).read_text(encoding="utf-8"))
    content["states"]["file"] = "../" + content["states"]["file"]
    (tmp_path / PREFIX_FILE).write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(PrefixError, match=r"states\.file: String should match pattern"):
        load_prefix(tmp_path, IDENTITY)


def test_replacing_leaves_one_states_file_and_opened_prefixes_as_they_are(tmp_path: Path) -> None:
    first, second = make_prefix(seed=1), make_prefix(8, seed=2)
    save_prefix(first, FACTS, tmp_path)
    opened, _ = load_prefix(tmp_path, IDENTITY)
    (tmp_path / ".states-left.tmp").write_bytes(b"of a killed writer")
    save_prefix(second, FACTS, tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    replaced, _ = load_prefix(tmp_path, IDENTITY)
    shutil.rmtree(tmp_path)
    assert_same(opened, first)
    assert_same(replaced, second)


def test_saving_the_same_again_changes_nothing(tmp_path: Path) -> None:
    save_prefix(make_prefix(), FACTS, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    save_prefix(make_prefix(), FACTS, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_writing_to_opened_states_does_not_reach_the_file(tmp_path: Path) -> None:
    save_prefix(make_prefix(), FACTS, tmp_path)
    opened, _ = load_prefix(tmp_path, IDENTITY)
    opened.states[0][0].zero_()
    assert_same(load_prefix(tmp_path, IDENTITY)[0], make_prefix())


def test_a_full_disk_leaves_the_prefix_that_was_there(tmp_path: Path) -> None:
    save_prefix(make_prefix(seed=1), FACTS, tmp_path)
    before = sorted(tmp_path.iterdir())
    with file_size_limit(20_000), pytest.raises(StorageError, match="cannot be written"):
        save_prefix(make_prefix(800, seed=2), FACTS, tmp_path)
    assert sorted(tmp_path.iterdir()) == before
    assert_same(load_prefix(tmp_path, IDENTITY)[0], make_prefix(seed=1))


@pytest.mark.parametrize("failing_sync", [0, 1])
def test_a_failure_at_each_step_leaves_the_prefix_that_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing_sync: int
) -> None:
    save_prefix(make_prefix(seed=1), FACTS, tmp_path)
    synced: list[int] = []

    def sync(descriptor: int) -> None:
        synced.append(descriptor)
        if len(synced) == failing_sync + 1:
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", sync)
        with pytest.raises(StorageError, match="No space left on device"):
            save_prefix(make_prefix(seed=2), FACTS, tmp_path)
    assert len(synced) == failing_sync + 1
    assert not list(tmp_path.glob(".*"))
    assert_same(load_prefix(tmp_path, IDENTITY)[0], make_prefix(seed=1))
    save_prefix(make_prefix(seed=2), FACTS, tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
