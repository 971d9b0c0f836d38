"""The command line: thin commands that read arguments, call one function and print. `--help` loads no torch."""

import logging
import sys
from pathlib import Path
from typing import Annotated, Optional

import typer

from manyicl.errors import ManyICLError, UserInputError

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help="Many-shot in-context fine-tuning.")

Overrides = Annotated[Optional[list[str]], typer.Argument(help="Recipe values to change: key.subkey=value.")]  # noqa: UP045


@app.callback()
def _configure(quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Only warnings and results.")] = False) -> None:
    """Many-shot in-context fine-tuning: tune a language model once, then teach it tasks by examples in its context."""
    logging.basicConfig(level=logging.WARNING if quiet else logging.INFO, format="%(message)s", stream=sys.stderr)
    logging.getLogger("httpx").setLevel(logging.WARNING)


@app.command()
def train(
    recipe: Annotated[Path, typer.Argument(help="A recipe in YAML.")],
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option(help="Go on with the run in the output folder.")] = False,
) -> None:
    """Tune a model with the loss on every answer, as a recipe says."""
    from manyicl.config import load_recipe

    parsed = load_recipe(recipe, overrides)
    from manyicl import runs

    result = runs.train(parsed, resume=resume)
    typer.echo(
        f"{result.updates} updates, {result.tokens} tokens, {result.answers} answers in {result.seconds:.0f} s "
        f"({result.tokens_per_second:.0f} tokens/s, {result.answers_per_second:.2f} answers/s), "
        f"peak memory {result.peak_memory_bytes / 2**30:.1f} GiB; written to {parsed.output}"
    )


def main() -> None:
    """Run the command line; errors of users end with exit code 2 and a message, not a traceback."""
    try:
        app()
    except UserInputError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(2)
    except ManyICLError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(1)
