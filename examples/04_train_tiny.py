"""Tune the default model for eight steps of 256 tokens and use the run as a model.

Shows the three things a run needs (model, tasks, budget), what its folder holds, and that the folder is a model.
Costs under a minute on two cores, after the default model's first conversion. Eight steps teach nothing worth measuring.
"""

import tempfile
from pathlib import Path

from manyicl import Recipe, load_suite, predict, train


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        output = Path(temporary) / "run"
        recipe = Recipe.model_validate(
            {
                "model": "default",
                "tasks": "builtin",
                "output": str(output),
                "episodes": {"max_tokens": 256},
                "training": {"num_steps": 8, "learning_rate": 6e-4, "log_every": 2},
            }
        )
        result = train(recipe)
        print(f"{result.updates} updates on {result.tokens} tokens with {result.answers} answers in {result.seconds:.0f} s")
        for update, loss in result.losses:
            print(f"update {update}: loss {loss:.3f}")
        print("the run holds", ", ".join(sorted(path.name for path in output.iterdir())))

        task = load_suite("builtin").select("held_out")[0]
        answers, num_used = predict(str(output), task.train[:16], [task.test[0].input])
        print(f"{task.name} after {num_used} demonstrations: {answers[0].text!r}, gold {task.test[0].answer!r}")


if __name__ == "__main__":
    main()
