import io

from rich.console import Console

from manyicl.reporting.terminal import caption, curve_rows, markdown_curves, print_curves
from test_records import record


def shot_curves() -> list:
    records = []
    for model, bonus in (("default", 0.0), ("runs/[red]mine[/]", 0.1)):
        for task, metric, reach in (("colour", "accuracy", (0, 4, 64)), ("[/size] of", "macro_f1", (0, 4))):
            for shots in (*reach, "max"):
                for seed in range(2):
                    value = 0.25 + bonus + 0.5 * seed
                    own = {"model": model, "task": task, "metric": metric, "shots": shots, "seed": seed}
                    records.append(record(**own, value=value, model_note="" if bonus else "dequantised from Q4_1"))
    return records


def printed(records: list, width: int) -> str:
    stream = io.StringIO()
    print_curves(records, Console(file=stream, width=width))
    return stream.getvalue()


def test_the_table_has_a_row_per_task_and_model_and_then_the_means() -> None:
    header, rows = curve_rows(shot_curves())
    half = f"{100 * 12.706204736 * 0.25:.1f}"
    assert header == ["task", "metric", "model", "0", "4", "64", "max"]
    base, tuned = f"50.0 ±{half}", f"60.0 ±{half}"
    assert rows == [
        ["[/size] of", "macro_f1", "default", base, base, "-", base],
        ["[/size] of", "macro_f1", "runs/[red]mine[/]", tuned, tuned, "-", tuned],
        ["colour", "accuracy", "default", base, base, base, base],
        ["colour", "accuracy", "runs/[red]mine[/]", tuned, tuned, tuned, tuned],
        ["mean over tasks", "", "default", base, base, f"{base} (1 tasks)", base],
        ["mean over tasks", "", "runs/[red]mine[/]", tuned, tuned, f"{tuned} (1 tasks)", tuned],
    ]


def test_one_seed_has_no_interval() -> None:
    _, rows = curve_rows([record(value=0.5)])
    assert [row[3] for row in rows] == ["50.0", "50.0"]


def test_methods_of_one_model_keep_rows_of_their_own() -> None:
    _, rows = curve_rows([record(value=0.5), record(method="nearest", value=0.75)])
    assert [row[2:] for row in rows] == [
        ["in-context, default", "50.0"],
        ["nearest, default", "75.0"],
        ["in-context, default", "50.0"],
        ["nearest, default", "75.0"],
    ]


def test_names_with_brackets_are_printed_as_they_are() -> None:
    text = printed(shot_curves(), 200)
    assert "runs/[red]mine[/]" in text
    assert "[/size] of" in text
    assert text.splitlines()[-1] == caption(shot_curves())


def test_nothing_is_cut_off_where_there_is_little_room() -> None:
    wide, narrow = printed(shot_curves(), 200), printed(shot_curves(), 60)
    assert "…" not in narrow
    assert max(map(len, narrow.splitlines())) <= 60
    kept = {letter: narrow.count(letter) for letter in "%±[]-"}
    assert kept["±"] == wide.count("±") == 23
    assert kept["["] == wide.count("[")


def test_markdown_escapes_what_would_end_a_cell() -> None:
    lines = markdown_curves([record(model="a|b")]).splitlines()
    assert lines[:3] == [
        "| task | metric | model | 4 |",
        "|---|---|---|---:|",
        "| colour | accuracy | a\\|b | 50.0 |",
    ]
    assert lines[-1] == caption([record(model="a|b")])


def test_the_caption_says_what_must_stand_beside_the_table() -> None:
    records = [record(), record(task="size", num_queries=7, seed=1), record(model="tuned", model_note="")]
    assert caption(records) == (
        "Columns are shots; 0-100; mean over 2 orders of demonstrations ± half of the 95% t interval; 2 to 7 queries a task. "
        "default: dequantised from Q4_1."
    )


def test_no_records_are_said_to_be_none() -> None:
    assert printed([], 100) == "No records: none of the numbers of shots asked for fits.\n"
    assert curve_rows([]) == (["task", "metric", "model"], [])
