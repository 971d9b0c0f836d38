"""The command line: thin commands that read arguments, call one function and print. `--help` loads no torch."""

import atexit
import logging
import os
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from manyicl.errors import ManyICLError, UserInputError
from manyicl.serving.commands import add_commands

if TYPE_CHECKING:
    from manyicl.records import Shots
    from manyicl.study.runner import StudyFolder

app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help="Many-shot in-context fine-tuning."
)

Overrides = Annotated[Optional[list[str]], typer.Argument(help="Recipe values to change: key.subkey=value.")]  # noqa: UP045


@app.callback()
def _configure(
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Only warnings and results.")] = False,
) -> None:
    """Many-shot in-context fine-tuning: tune a language model once, then teach it tasks by examples in its context."""
    logging.basicConfig(level=logging.WARNING if quiet else logging.INFO, format="%(message)s", stream=sys.stderr)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    # transformers 5.23 and PEFT 0.21 call names that transformers has renamed; users can do nothing about it.
    warnings.filterwarnings("ignore", message=".*gradient_checkpointing.* is deprecated", category=FutureWarning)


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
    from manyicl.process_group import leave_processes, place_among_processes

    result = runs.train(parsed, resume=resume)
    leave_processes()
    if place_among_processes()[0]:
        return
    typer.echo(
        f"{result.updates} updates, {result.tokens} tokens, {result.answers} answers in {result.seconds:.0f} s "
        f"({result.tokens_per_second:.0f} tokens/s, {result.answers_per_second:.2f} answers/s), "
        f"peak memory {result.peak_memory_bytes / 2**30:.1f} GiB; written to {parsed.output}"
    )


@app.command()
def evaluate(
    model: Annotated[list[str], typer.Option(help="`default`, a folder, a hub id, a .gguf file or a run; may be given again.")],
    output: Annotated[Path, typer.Option(help="Records, as JSON lines; an interrupted evaluation goes on here.")],
    tasks: Annotated[str, typer.Option(help="`builtin`, a suite's folder or a task's folder.")] = "builtin",
    role: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="meta_training, validation, held_out or all; held_out unless given, or unless tasks are named."),
    ] = None,
    only: Annotated[str, typer.Option(help="Names of tasks, comma-separated; of that role, if one is given.")] = "",
    shots: Annotated[str, typer.Option(help="Demonstrations, comma-separated; max is what fits.")] = "0,1,4,16,64,max",
    seeds: Annotated[int, typer.Option(help="Orders of demonstrations.", min=1)] = 3,
    queries: Annotated[int, typer.Option(help="Queries per task; the first of its test split.", min=1)] = 100,
    context: Annotated[Optional[int], typer.Option(help="Tokens of context; the model's own unless given.")] = None,  # noqa: UP045
    format: Annotated[Optional[str], typer.Option(help="plain or chat; what the model was tuned in unless given.")] = None,  # noqa: UP045
) -> None:
    """Measure models on tasks by number of demonstrations, and print the shot curves."""
    from manyicl.reporting.terminal import print_curves
    from manyicl.runs import EvaluationRequest, evaluate_models

    request = EvaluationRequest(
        models=tuple(model),
        tasks=tasks,
        role=role,
        only=tuple(name for name in only.split(",") if name),
        shots=_parse_shots(shots),
        num_seeds=seeds,
        num_queries=queries,
        context_tokens=context,
        format=format,
    )
    records = evaluate_models(request, output)
    if records is None:  # Other processes are at work yet; the last to finish prints.
        return
    print_curves(records)
    typer.echo(f"records: {output}")


@app.command()
def predict(
    model: Annotated[str, typer.Option(help="`default`, a folder, a hub id, a .gguf file or a run.")],
    demonstrations: Annotated[Path, typer.Option(help="Labelled examples: a task's folder, or a JSONL, CSV or Parquet file.")],
    queries: Annotated[Path, typer.Option(help="Inputs whose answers are wanted.")],
    output: Annotated[Path, typer.Option(help="Answers, as JSON lines.")],
    seed: Annotated[int, typer.Option(help="Seed of the order of demonstrations.", min=0)] = 0,
    context: Annotated[Optional[int], typer.Option(help="Tokens of context; the model's own unless given.")] = None,  # noqa: UP045
    format: Annotated[Optional[str], typer.Option(help="plain or chat; what the model was tuned in unless given.")] = None,  # noqa: UP045
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="Correct label scores by those after random words of the demonstrations.")
    ] = False,
) -> None:
    """Answer queries of a task of your own from its labelled examples, without tuning."""
    from manyicl.prediction import predict_file

    num_used, num_given, num_answers = predict_file(
        model, demonstrations, queries, output, seed=seed, context_tokens=context, format=format, calibrate=calibrate
    )
    typer.echo(f"{num_answers} answers from {num_used} of {num_given} demonstrations; written to {output}")


@app.command()
def corpus(
    model: Annotated[list[str], typer.Option(help="`default`, a folder, a hub id, a .gguf file or a run; may be given again.")],
    text: Annotated[list[Path], typer.Option(help="Plain text file; may be given again.")],
    output: Annotated[Path, typer.Option(help="Results, as JSON.")],
    max_bytes: Annotated[int, typer.Option(help="Bytes read from the start of each text.", min=1000)] = 100_000,
    window: Annotated[int, typer.Option(help="Tokens in a window.", min=2)] = 2048,
) -> None:
    """Measure bits per byte of plain text: what tuning made a model forget."""
    from manyicl.runs import measure_corpora

    for row in measure_corpora(model, text, output, max_bytes=max_bytes, window_tokens=window):
        typer.echo(f"{row['model']} {row['corpus']}: {row['bits_per_byte']:.4f} bits per byte ({row['num_bytes']} bytes)")
    typer.echo(f"written to {output}")


@app.command()
def inspect(
    recipe: Annotated[Path, typer.Argument(help="A recipe in YAML.")],
    overrides: Overrides = None,
    row: Annotated[int, typer.Option(help="Which row of the run.", min=0)] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Token ids, text, target mask and position ids as JSON.")] = False,
) -> None:
    """Show a training row: what is input, what is trained, what was left out."""
    from manyicl.config import load_recipe

    parsed = load_recipe(recipe, overrides)
    from manyicl.inspection import print_row, row_as_json
    from manyicl.runs import open_row

    built, tokenizer = open_row(parsed, row)
    if as_json:
        typer.echo(row_as_json(built, tokenizer))
    else:
        print_row(built, tokenizer)


@app.command()
def plan(
    recipe: Annotated[Path, typer.Argument(help="A recipe in YAML.")],
    overrides: Overrides = None,
    device: Annotated[str, typer.Option(help="H100, H200, A100, L4, or cpu: this machine, measured now.")] = "cpu",
    devices: Annotated[int, typer.Option(help="How many of them.", min=1)] = 1,
    fsdp: Annotated[bool, typer.Option("--fsdp", help="Weights, gradients and optimizer are divided among the devices.")] = False,
    context_parallel: Annotated[int, typer.Option(help="Devices that share a row.", min=1)] = 1,
    price: Annotated[Optional[float], typer.Option(help="US dollars a device and hour; assumed unless given.", min=0)] = None,  # noqa: UP045
    efficiency: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(help="Share of the device's matrix rate that is reached; assumed unless given.", min=0.01, max=1),
    ] = None,
    targets: Annotated[float, typer.Option(help="Share of a row's tokens that are targets.", min=0, max=1)] = 0.1,
    shape: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="llama3-8b, llama3-70b, mistral-7b or gemma-7b, in place of the recipe's model."),
    ] = None,
) -> None:
    """Forecast memory, time and cost of a run, from its recipe and the model's config alone."""
    from manyicl.config import load_recipe

    parsed = load_recipe(recipe, overrides)
    from manyicl.training_plan import Layout, PlanRequest, plan_recipe, show_plan

    layout = Layout(num_devices=devices, is_sharded=fsdp, context_parallel=context_parallel)
    typer.echo(show_plan(plan_recipe(parsed, PlanRequest(device, layout, price, efficiency, targets, shape))))


@app.command()
def study(
    recipe: Annotated[Path, typer.Argument(help="A study recipe in YAML.")],
    output: Annotated[Optional[str], typer.Option(help="Folder of the study, in place of the recipe's.")] = None,  # noqa: UP045
    only: Annotated[str, typer.Option(help="Only these cells, comma-separated: a kind, or names with *.")] = "",
    minutes: Annotated[Optional[float], typer.Option(help="No cell is begun after so many minutes.", min=0)] = None,  # noqa: UP045
    restore: Annotated[Optional[Path], typer.Option(help="Go on from published results, in a new output.")] = None,  # noqa: UP045
    dry_run: Annotated[bool, typer.Option("--plan", help="Show the plan and gather what is done; begin no cell.")] = False,
) -> None:
    """Compare every method on held-out tasks, cell by cell; what is done is read, not done again."""
    from manyicl.study.command import gather_results, open_study, run_opened

    chosen = [pattern for pattern in only.split(",") if pattern]
    folder, plan = open_study(recipe, output, chosen, restore=restore)
    typer.echo(plan)
    if dry_run:
        if folder.progress().done:
            typer.echo(f"results so far: {gather_results(folder)}")
        return
    progress = run_opened(folder, chosen, minutes)
    typer.echo(
        f"{progress.done} of {progress.total} cells done, {progress.failed} failed; results: {folder.output / 'results'} "
        f"(manyicl report {folder.output / 'results'} -o report.html)"
    )
    _write_study_cards(folder)
    if progress.failed:
        raise typer.Exit(1)


def _write_study_cards(folder: "StudyFolder") -> None:
    """Write a model card into the folder of each finished training; one that cannot be written is told and fails nothing."""
    from manyicl.results.files import read_results
    from manyicl.study.command import finished_runs

    if not (runs := finished_runs(folder)):
        return
    try:
        from manyicl.reporting.model_card import write_study_cards
    except UserInputError as error:  # Jinja2 is not installed.
        typer.echo(f"no model cards: {error}")
        return
    for problem in write_study_cards(runs, read_results(folder.output / "results").records):
        typer.echo(f"a model card was not written: {problem}")


@app.command()
def export(
    model: Annotated[str, typer.Argument(help="A finished run's folder.")],
    output: Annotated[Path, typer.Argument(help="Folder of the merged checkpoint, or a file whose name ends in .gguf.")],
) -> None:
    """Merge a run's adapter into its base and write a plain Hugging Face checkpoint, or a GGUF file of a Llama model."""
    if output.suffix == ".gguf":
        from manyicl.gguf_export import export_gguf

        export_gguf(model, output)
    else:
        from manyicl.modeling import export_model

        export_model(model, output)
    typer.echo(f"written to {output}")


@app.command()
def report(
    results: Annotated[Path, typer.Argument(help="The folder `results` of a study.")],
    output: Annotated[str, typer.Option("--output", "-o", help="The report, one HTML file.")] = "report.html",
) -> None:
    """Write a study's report: one HTML file that needs no network."""
    from manyicl.reporting.html import write_report

    found = write_report(results, Path(output))
    typer.echo(f"{len(found.records)} records, {len(found.cells)} cells; written to {output}")


@app.command()
def card(
    run: Annotated[Path, typer.Argument(help="A finished run's folder.")],
    records: Annotated[Optional[list[Path]], typer.Option(help="Records of its evaluation; may be given again.")] = None,  # noqa: UP045
    model: Annotated[Optional[str], typer.Option(help="The run's name in the records; its folder unless given.")] = None,  # noqa: UP045
) -> None:
    """Write a run's model card, README.md, as the Hugging Face Hub reads it."""
    from manyicl.records import merge_records
    from manyicl.reporting.model_card import write_model_card

    typer.echo(f"written to {write_model_card(run, merge_records(records or []), model=model)}")


tasks_app = typer.Typer(no_args_is_help=True, help="List, show and check tasks.")
app.add_typer(tasks_app, name="tasks")
add_commands(app)


@tasks_app.command("list")
def list_tasks(
    suite: Annotated[str, typer.Argument(help="`builtin`, a suite's folder or a task's folder.")] = "builtin",
) -> None:
    """List the tasks of a suite with their roles."""
    from manyicl.tasks.readers import load_suite

    loaded = load_suite(suite)
    typer.echo(f"{'task':28} {'role':14} {'family':15} {'metric':14} {'train':>5} + {'test':>4}  answers")
    for name, task in loaded.tasks.items():
        kind = f"{len(task.labels)} labels" if task.labels else "options" if task.is_choice else "free text"
        typer.echo(
            f"{name:28} {loaded.role(name):14} {task.family:15} {task.metric:14} {len(task.train):5} + {len(task.test):4}  {kind}"
        )


@tasks_app.command("show")
def show_task(
    name: Annotated[str, typer.Argument(help="Name of a task, or its folder.")],
    suite: Annotated[str, typer.Option(help="`builtin` or a folder.")] = "builtin",
    num_examples: Annotated[int, typer.Option("--examples", help="How many examples to show.", min=1)] = 3,
) -> None:
    """Show a task and its first examples."""
    from manyicl.tasks.readers import load_suite, load_task

    if Path(name).exists():
        task = load_task(name)
    else:
        tasks = load_suite(suite).tasks
        if name not in tasks:
            raise UserInputError(
                f"suite {suite!r} has no task {name!r} ({', '.join(tasks)}). Give one of these, or a task's folder."
            )
        task = tasks[name]
    typer.echo(f"{task.name}: {task.family}, {task.metric}, {len(task.train)} train and {len(task.test)} test examples")
    if task.labels:
        typer.echo(f"labels: {', '.join(task.labels)}")
    for example in task.train[:num_examples]:
        typer.echo(f"\n[{example.source or 'generated'}]\n{example.input}\nAnswer: {example.answer}")


@tasks_app.command("check")
def check_tasks(
    suite: Annotated[str, typer.Argument(help="`builtin`, a suite's folder or a task's folder.")] = "builtin",
    against: Annotated[Optional[str], typer.Option(help="A second suite, for texts that stand in both.")] = None,  # noqa: UP045
) -> None:
    """Look for leaks, duplicates, wrong labels and broken rows; exit code 1 if there are errors."""
    from manyicl.tasks.checks import check_folder

    findings = check_folder(suite, against=against)
    for finding in findings:
        typer.echo(f"{finding.severity}: {finding.source or finding.task}: {finding.kind}: {finding.message}")
    num_errors = sum(finding.severity == "error" for finding in findings)
    typer.echo(f"{num_errors} error(s), {len(findings) - num_errors} warning(s)")
    if num_errors:
        raise typer.Exit(1)


def _parse_shots(text: str) -> tuple["Shots", ...]:
    """Shot counts from "0,4,max"."""
    parsed: list[Shots] = []
    for part in text.split(","):
        if part.strip() != "max" and not part.strip().isdecimal():
            raise UserInputError(f"--shots {text!r}: {part!r} is neither a number nor max. Write for instance 0,4,16,max.")
        parsed.append("max" if part.strip() == "max" else int(part))
    return tuple(dict.fromkeys(parsed))


def main() -> None:
    """Run the command line; errors of users end with exit code 2 and a message, not a traceback."""
    code: str | int | None = 0
    try:
        app()
    except SystemExit as end:
        code = end.code
    except ManyICLError as error:
        typer.echo(f"error: {error}", err=True)
        code = 2 if isinstance(error, UserInputError) else 1
    if isinstance(code, int) and os.environ.get("WORLD_SIZE", "1") != "1":
        # Threads of torch's process groups that outlive them sometimes abort the interpreter's end, whatever the code.
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
