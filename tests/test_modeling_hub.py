"""Models of the hub: read by their ids, and pushed."""

import hashlib
import json
import shutil
from typing import ClassVar

import pytest
import torch

from manyicl import modeling
from manyicl.errors import ModelError
from manyicl.modeling import load_model, load_tokenizer, push_to_hub, save_model
from model_fixtures import logits, write_run


class FakeHub:
    """Stands in for huggingface_hub.HfApi and notes what it is asked."""

    calls: ClassVar[list] = []

    def create_repo(self, repo_id, **options):
        from huggingface_hub import RepoUrl

        self.calls.append(("create_repo", repo_id, options))
        return RepoUrl(f"https://huggingface.co/me/{repo_id}")

    def upload_folder(self, **options):
        self.calls.append(("upload_folder", options))
        return "https://huggingface.co/me/mine/commit/1"


class FakeRepositories:
    """Stands in for the downloads of huggingface_hub: folders by hub id, and what was asked of them."""

    def __init__(self, cache, **folders):
        self.cache = cache
        self.folders = {name.replace("__", "/"): folder for name, folder in folders.items()}
        self.downloads = []

    def file(self, repo_id, filename):
        from huggingface_hub.errors import LocalEntryNotFoundError

        if not (repo_id in self.folders and (self.folders[repo_id] / filename).is_file()):
            raise LocalEntryNotFoundError(f"{repo_id} has no {filename}")
        return self._fetch(repo_id, [filename])

    def snapshot(self, repo_id, *, allow_patterns, ignore_patterns):
        from huggingface_hub.utils import filter_repo_objects

        folder = self.folders[repo_id]
        names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
        kept = filter_repo_objects(names, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns)
        return str(self._fetch(repo_id, sorted(kept)).parent)

    def _fetch(self, repo_id, names):
        self.downloads.append((repo_id, names))
        for name in names:
            target = self.cache / repo_id.replace("/", "--") / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(self.folders[repo_id] / name, target)
        return target


@pytest.fixture
def run_folder(tiny_model_folder, byte_tokenizer, tmp_path):
    """A finished run's folder over a tiny base, and the adapted model whose logits it must give."""
    return tmp_path / "run", write_run(tmp_path / "run", tiny_model_folder("llama"), byte_tokenizer)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A factory: hub(me__run=folder) makes the id me/run name that folder."""

    def build(**folders):
        repositories = FakeRepositories(tmp_path / "hub", **folders)
        monkeypatch.setattr("huggingface_hub.hf_hub_download", repositories.file)
        monkeypatch.setattr("huggingface_hub.snapshot_download", repositories.snapshot)
        return repositories

    return build


@pytest.mark.parametrize("name", ["nobody/no-such-model", "no-such-model"])
def test_a_hub_id_that_cannot_be_reached_is_an_error_that_lists_what_may_be_given(name):
    with pytest.raises(
        ModelError, match=r"cannot be loaded .* Give `default`, a folder, a hub id that can be reached, a \.gguf file"
    ):
        load_model(name)
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_tokenizer(name)


@pytest.mark.parametrize("name", ["./nowhere", "../nowhere", "no/such/folder", "runs/nowhere", "{here}/nowhere"])
def test_a_folder_that_is_not_there_is_said_without_asking_the_hub(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *_: pytest.fail("the hub was asked"))
    with pytest.raises(ModelError, match=r"(nowhere|folder): there is no such folder in /.*\. Give `default`, a folder"):
        load_model(name.format(here=tmp_path))


def test_pushing_makes_the_repository_and_uploads_the_folder_without_checkpoints(run_folder, monkeypatch):
    folder, _ = run_folder
    monkeypatch.setattr("huggingface_hub.HfApi", FakeHub)
    monkeypatch.setattr(FakeHub, "calls", [])
    address = push_to_hub(folder, "mine", private=True, commit_message="First", ignore_patterns="*.txt")
    assert address == "https://huggingface.co/me/mine/commit/1"
    assert FakeHub.calls == [
        ("create_repo", "mine", {"exist_ok": True, "private": True}),
        (
            "upload_folder",
            {
                "repo_id": "me/mine",
                "folder_path": str(folder),
                "ignore_patterns": ["checkpoints/*", ".saving-*", "*.txt"],
                "commit_message": "First",
            },
        ),
    ]


def test_only_a_folder_that_is_a_model_is_pushed(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.HfApi", FakeHub)
    monkeypatch.setattr(FakeHub, "calls", [])
    for name, message in (("default", "no such folder"), (tmp_path, "holds no model")):
        with pytest.raises(ModelError, match=message):
            push_to_hub(name, "mine")
    assert FakeHub.calls == []


def test_a_hub_model_is_known_by_its_name_and_revision(tiny_model, byte_tokenizer, monkeypatch):
    prints = []
    for revision in ("a" * 40, "b" * 40):
        model = tiny_model("llama")
        model.config._commit_hash = revision
        monkeypatch.setattr(modeling, "_load_plain", lambda *arguments, model=model: (model, byte_tokenizer))
        prints.append(load_model("org/model").fingerprint)
    assert prints == [hashlib.sha256(f"org/model@{letter * 40}".encode()).hexdigest() for letter in "ab"]


def test_a_run_on_the_hub_is_loaded_like_its_folder(run_folder, hub, tmp_path, byte_tokenizer):
    folder, adapted = run_folder
    facts = json.loads((folder / "manyicl.json").read_text())
    (folder / "manyicl.json").write_text(json.dumps(facts | {"format": "chat"}))
    for name in ("checkpoint-2/adapter_model.safetensors", "optimizer.pt", "model.safetensors", "README.md"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"not wanted")
    repositories = hub(me__run=folder)
    loaded = load_model("me/run", dtype="float32")
    assert (loaded.name, loaded.format, loaded.note) == ("me/run", "chat", "")
    assert torch.equal(logits(loaded.model), logits(load_model(folder, dtype="float32").model))
    assert (logits(loaded.model) - logits(adapted)).abs().max() < 1e-5
    assert repositories.downloads[-1][1] == [
        *("adapter_config.json", "adapter_model.safetensors", "chat_template.jinja", "manyicl.json"),
        *("tokenizer.json", "tokenizer_config.json"),
    ]
    assert load_tokenizer("me/run").get_vocab() == byte_tokenizer.get_vocab()
    (folder / "model.safetensors").unlink()
    assert loaded.fingerprint == load_model(folder).fingerprint


def test_a_whole_model_on_the_hub_keeps_its_note_and_format(hub, tiny_model, byte_tokenizer, tmp_path, monkeypatch):
    save_model(tiny_model("llama"), byte_tokenizer, tmp_path / "whole", base="", note="a note", format="chat")
    repositories = hub(me__whole=tmp_path / "whole")
    monkeypatch.setattr(modeling, "_load_plain", lambda *arguments: (tiny_model("llama"), byte_tokenizer))
    loaded = load_model("me/whole")
    assert (loaded.name, loaded.note, loaded.format) == ("me/whole", "a note", "chat")
    assert repositories.downloads == [("me/whole", ["manyicl.json"])]


def test_a_base_of_another_machine_is_named(run_folder, hub, tmp_path):
    folder, _ = run_folder
    (folder / "manyicl.json").write_text(json.dumps({"base": "/home/them/base", "note": ""}))
    (folder / "tokenizer_config.json").unlink()
    hub(me__run=folder)
    message = r'me/run: its base model is the folder /home/them/base, which is not on .* as "base" into .*manyicl\.json'
    for load in (load_model, load_tokenizer):
        with pytest.raises(ModelError, match=message):
            load("me/run")
    with pytest.raises(ModelError, match="run: its base model is the folder /home/them/base"):
        load_model(folder)


def test_an_adapter_on_the_hub_without_weights_is_an_error(run_folder, hub):
    folder, _ = run_folder
    (folder / "adapter_model.safetensors").unlink()
    hub(me__run=folder)
    with pytest.raises(ModelError, match=r"me/run: holds an adapter_config\.json without adapter_model\.safetensors"):
        load_model("me/run")


def test_pushing_warns_of_a_base_that_is_a_folder_here(run_folder, tiny_model_folder, monkeypatch, caplog):
    folder, _ = run_folder
    monkeypatch.setattr("huggingface_hub.HfApi", FakeHub)
    monkeypatch.setattr(FakeHub, "calls", [])
    push_to_hub(folder, "mine")
    assert f"its base model {tiny_model_folder('llama')} is a folder of this machine" in caplog.text
    caplog.clear()
    (folder / "manyicl.json").write_text(json.dumps({"base": "owner/base", "note": ""}))
    push_to_hub(folder, "mine")
    assert caplog.text == ""
