"""A task is a folder: write one, load it, check it, look at it.

Shows what a task.yaml says, what an example is once its template is filled in, and how a leak is found.
Costs a second; loads no torch and needs no model.
"""

import json
import tempfile
from pathlib import Path

from manyicl import check_task, load_task

TASK = """\
family: classification
metric: accuracy
input: "{ticket}"
answer: team
labels: [billing, shipping, account]
"""
TRAIN = [
    ("The invoice shows the wrong amount", "billing"),
    ("I was charged twice this month", "billing"),
    ("My parcel has not arrived", "shipping"),
    ("The box came damaged", "shipping"),
    ("I cannot log in since the update", "account"),
    ("Please change my e-mail address", "account"),
]
TEST = [("Can I pay by card?", "billing"), ("The box came damaged", "shipping")]  # The second one also stands in train.


def write_rows(path: Path, rows: list[tuple[str, str]]) -> None:
    lines = [json.dumps({"ticket": ticket, "team": team}) for ticket, team in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "tickets"
        folder.mkdir()
        (folder / "task.yaml").write_text(TASK, encoding="utf-8")
        write_rows(folder / "train.jsonl", TRAIN)
        write_rows(folder / "test.jsonl", TEST)

        task = load_task(folder)
        print(f"{task.name}: {task.family}, {len(task.train)} train and {len(task.test)} test examples")
        print(f"labels: {', '.join(task.labels)}")
        print(f"first example: input {task.train[0].input!r}, answer {task.train[0].answer!r}")
        for finding in check_task(task):
            print(f"{finding.severity}: {finding.kind}: {finding.message}")


if __name__ == "__main__":
    main()
