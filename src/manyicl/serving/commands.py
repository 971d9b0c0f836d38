"""The service's commands: thin, and light to import, as `manyicl --help` shows them."""

import json
import logging
import os
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional, cast

import typer

from manyicl.errors import ManyICLError, UserInputError

if TYPE_CHECKING:
    from manyicl.modeling import Format
    from manyicl.serving.backends import Backend, BackendLimits
    from manyicl.serving.settings import Settings

Url = Annotated[Optional[str], typer.Option(help="The service's address; MANYICL_URL, or port 8000 here, unless given.")]  # noqa: UP045
keys_app = typer.Typer(no_args_is_help=True, help="Make API keys of the service.")
client_app = typer.Typer(no_args_is_help=True, help="Use a service from the shell. A key is read from MANYICL_API_KEY.")


def add_commands(app: typer.Typer) -> None:
    """Add `serve`, `keys` and `client` to a command line."""
    app.command()(serve)
    app.add_typer(keys_app, name="keys")
    app.add_typer(client_app, name="client")


def serve(
    model: Annotated[str, typer.Option(help="`default`, a folder, a hub id, a .gguf file or a run.")],
    data_dir: Annotated[Path, typer.Option(help="Folder of files, prefixes and the database.")],
    host: Annotated[str, typer.Option(help="Address to listen on; beyond this machine only with --api-keys.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0 takes a free one.", min=0, max=65535)] = 8000,
    api_keys: Annotated[Optional[Path], typer.Option(help="File of keys; without it there is one tenant and no key.")] = None,  # noqa: UP045
    database_url: Annotated[Optional[str], typer.Option(help="postgresql://…, in place of SQLite in the data folder.")] = None,  # noqa: UP045
    context: Annotated[Optional[int], typer.Option(help="Tokens of context; the model's own unless given.")] = None,  # noqa: UP045
    format: Annotated[Optional[str], typer.Option(help="plain or chat; what the model was tuned in unless given.")] = None,  # noqa: UP045
    engine: Annotated[
        str, typer.Option(help="Who runs the model: native (this process), openai (another server) or vllm.")
    ] = "native",
    base_url: Annotated[Optional[str], typer.Option(help="Of --engine openai: the server's address, with its /v1.")] = None,  # noqa: UP045
    remote_model: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Of --engine openai: the model's name there; --model unless given."),
    ] = None,
    vllm_python: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Of --engine vllm: a Python that has vLLM; this one unless given."),
    ] = None,
    max_queue: Annotated[int, typer.Option(help="Queries that may wait; beyond it a request gets 429.", min=1)] = 1024,
    disk_gib: Annotated[float, typer.Option(help="Disk space of prefixes; those used longest ago make room.", min=0.01)] = 20.0,
    memory_gib: Annotated[float, typer.Option(help="Memory of prefixes that are held open.", min=0.01)] = 4.0,
    check: Annotated[bool, typer.Option("--check", help="Check that the data folder is whole, and stop.")] = False,
) -> None:
    """Serve a model over HTTP: post examples, get a named model in seconds, call it from any OpenAI client."""
    logging.getLogger("alembic").setLevel(logging.WARNING)  # It tells of its plugins while it is imported.
    if format not in (None, "plain", "chat"):
        raise UserInputError(f"--format {format!r}: give plain or chat.")
    try:
        import fastapi  # noqa: F401
    except ModuleNotFoundError as error:
        raise UserInputError("manyicl serve needs further packages. Type: pip install 'manyicl[serve]'") from error
    from manyicl.serving.backends import BackendLimits
    from manyicl.serving.settings import Settings

    settings = Settings(data_dir, host, port, api_keys, database_url)
    if check:
        _check_store(settings)
        return
    from manyicl.serving.app import run_server

    limits = BackendLimits(max_queue, max_open_bytes=int(memory_gib * 2**30), max_stored_bytes=int(disk_gib * 2**30))
    chosen = _Engine(engine, model, cast("Format | None", format), context, base_url, remote_model, vllm_python)
    run_server(settings, _make_backend(chosen, data_dir, limits), log_level=logging.getLogger().level)


@dataclass(frozen=True)
class _Engine:
    """Who runs the model."""

    name: str
    model: str
    format: "Format | None"
    context: int | None
    base_url: str | None
    remote_model: str | None
    vllm_python: Path | None


def _make_backend(engine: _Engine, data_dir: Path, limits: "BackendLimits") -> "Backend":
    """What runs the model, not yet started.

    Raises:
        UserInputError: options that do not go together.
    """
    if (engine.base_url is None) == (engine.name == "openai"):
        raise UserInputError("--base-url goes with --engine openai, and only with it: the address of that server, with its /v1.")
    if engine.name == "native":
        from manyicl.serving.native_backend import NativeBackend, open_native_engine

        opener = partial(open_native_engine, engine.model, format=engine.format, context_tokens=engine.context)
        return NativeBackend(opener, data_dir / "prefixes", limits)
    if engine.name == "openai":
        from manyicl.serving.openai_backend import OpenAIBackend, open_encoder

        return OpenAIBackend(
            str(engine.base_url),
            engine.remote_model or engine.model,
            partial(open_encoder, engine.model, format=engine.format),
            context_tokens=engine.context,
            api_key=os.environ.get("MANYICL_REMOTE_KEY"),
            limits=limits,
        )
    if engine.name == "vllm":
        from manyicl.serving.vllm_backend import VllmBackend

        python = engine.vllm_python or Path(sys.executable)
        options = () if engine.context is None else ("--max-model-len", str(engine.context))
        return VllmBackend(
            Path(engine.model),
            data_dir / "vllm.log",
            format=engine.format,
            python=python,
            options=options,
            limits=limits,
        )
    raise UserInputError(f"--engine {engine.name!r}: give native, openai or vllm.")


def _check_store(settings: "Settings") -> None:
    from manyicl.serving.store import Store

    store = Store(settings, is_checked=True)
    try:
        problems = store.check()
    finally:
        store.close()
    for problem in problems:
        typer.echo(problem)
    if problems:
        raise ManyICLError(f"{settings.data_dir}: {len(problems)} problem(s). Restore the folder from a backup.")
    typer.echo(f"{settings.data_dir}: whole")


@keys_app.command("add")
def add(
    tenant: Annotated[str, typer.Argument(help="Whose key it is; every key of a tenant opens the same tasks.")],
    file: Annotated[Path, typer.Option(help="File of keys, which holds hashes alone.")],
) -> None:
    """Make a key, show it once, and add its hash to a file. Removing the line revokes it."""
    from manyicl.serving.keys import add_key

    typer.echo(add_key(file, tenant))


@client_app.command("models")
def list_models(url: Url = None) -> None:
    """List the models that can be called."""
    from manyicl.serving.client import Client

    for name in Client(url).models():
        typer.echo(name)


@client_app.command("show")
def show_model(name: Annotated[str, typer.Argument(help="Name of the model.")], url: Url = None) -> None:
    """Print what a model is made of, as JSON: shots, tokens, labels, cost, and the lines that were left out."""
    from manyicl.serving.client import Client

    typer.echo(json.dumps(Client(url).show(name), indent=2, ensure_ascii=False))


@client_app.command("make")
def make_model(
    name: Annotated[str, typer.Argument(help="Name of the model.")],
    file: Annotated[Path, typer.Argument(help="Training file: JSONL in the chat or the prompt and completion format.")],
    seed: Annotated[int, typer.Option(help="Seed of the order of examples.", min=0)] = 0,
    url: Url = None,
) -> None:
    """Make a model of a training file, and wait for it."""
    from manyicl.serving.client import Client

    facts = Client(url).make(name, file, seed=seed, tell=lambda message: typer.echo(message, err=True))
    kind = f"{len(facts['labels'])} labels" if facts["labels"] else "free text"
    typer.echo(
        f"{name}: {facts['num_shots']} of {facts['num_examples']} examples in {facts['prefix_tokens']} tokens, {kind}, "
        f"{facts['prefill_seconds']:.2f} s"
    )


@client_app.command("ask")
def ask_model(
    name: Annotated[str, typer.Argument(help="Name of the model.")],
    text: Annotated[str, typer.Argument(help="The input.")],
    probabilities: Annotated[bool, typer.Option("--probabilities", help="Every label with its probability.")] = False,
    max_tokens: Annotated[int, typer.Option(help="Tokens of the answer at most.", min=1)] = 256,
    url: Url = None,
) -> None:
    """Print a model's answer to an input."""
    from manyicl.serving.client import Client

    client = Client(url)
    if not probabilities:
        typer.echo(client.ask(name, text, max_tokens=max_tokens))
        return
    for label, probability in client.classify(name, text).items():
        typer.echo(f"{probability:.4f}  {label}")


@client_app.command("delete")
def delete_model(name: Annotated[str, typer.Argument(help="Name of the model.")], url: Url = None) -> None:
    """Delete a model with its examples."""
    from manyicl.serving.client import Client

    Client(url).delete(name)
