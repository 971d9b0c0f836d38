import io
import json

import pytest
from rich.console import Console

from manyicl.config import EpisodesConfig
from manyicl.encoding import Encoder, encode_episode
from manyicl.episodes import Episode, LeftOut
from manyicl.inspection import print_row, row_as_json
from manyicl.packing import Row, build_row
from manyicl.tasks.task import Example


@pytest.fixture
def row(byte_tokenizer) -> Row:
    encoder = Encoder(byte_tokenizer)
    left_out = (
        LeftOut(
            Example("too [bold]long[/nothing]", "x", source="[data]/train.jsonl:7"), "its 99 tokens are more than the row's 50"
        ),
        LeftOut(Example("no [/source]", "x"), "its 50 tokens are more than the 3 left in the row"),
    )
    first = Episode("[/red] colours", "", (Example("is [/b] é red?", "@"),), left_out, label_map=(("yes", "@"), ("no", "[i]")))
    second = Episode("other", "", (Example("q", "a"),))
    return Row((encode_episode(first, encoder), encode_episode(second, encoder)))


def printed(row: Row, tokenizer, **options) -> str:
    stream = io.StringIO()
    print_row(row, tokenizer, Console(file=stream, width=200, **options))
    return stream.getvalue()


def test_a_row_is_printed_with_all_that_was_left_out(row, byte_tokenizer) -> None:
    assert printed(row, byte_tokenizer).split("\n") == [
        "task [/red] colours, 1 examples, 28 tokens, 3 of them targets",
        "labels remapped: yes -> @, no -> [i]",
        "is [/b] é red?",
        "Answer: @<|end|>",
        "",
        "",
        "left out: [data]/train.jsonl:7: its 99 tokens are more than the row's 50",
        "left out: 'no [/source]': its 50 tokens are more than the 3 left in the row",
        "task other, 1 examples, 14 tokens, 3 of them targets",
        "q",
        "Answer: a<|end|>",
        "",
        "",
        "",
    ]


def test_inputs_answers_and_terminators_have_their_colours(row, byte_tokenizer) -> None:
    text = printed(row, byte_tokenizer, force_terminal=True, color_system="standard")
    assert "\x1b[36mAnswer:\x1b[0m\x1b[1;32m a\x1b[0m\x1b[1;30;42m<|end|>\x1b[0m" in text
    assert "\x1b[33mleft out: [data]/train.jsonl:7: " in text


def test_a_row_as_json(row, byte_tokenizer) -> None:
    content = json.loads(row_as_json(row, byte_tokenizer))
    assert content["token_ids"] == [*row.sequences[0].token_ids, *row.sequences[1].token_ids]
    assert content["text"][28:] == [*"q\nAnswer: a", "<|end|>", "\n", "\n"]
    assert content["target_mask"] == [False] * 23 + [True] * 3 + [False] * 11 + [True] * 3 + [False] * 2
    assert content["position_ids"] == [*range(28), *range(14)]
    first, second = content["sequences"]
    assert first["task"] == "[/red] colours"
    assert first["answer_spans"] == [[23, 26]]
    assert first["segments"] == [["input", 0, 23, 0], ["answer", 23, 25, 0], ["terminator", 25, 26, 0], ["gap", 26, 28, 0]]
    assert first["label_map"] == {"yes": "@", "no": "[i]"}
    assert first["left_out"] == [
        {"source": "[data]/train.jsonl:7", "reason": "its 99 tokens are more than the row's 50"},
        {"source": "", "reason": "its 50 tokens are more than the 3 left in the row"},
    ]
    assert (second["answer_spans"], second["left_out"], second["label_map"]) == ([[9, 12]], [], {})


def test_a_sampled_row_shows_what_did_not_fit(small_task, byte_tokenizer) -> None:
    train = [Example(f"question {number}", "yes", source=f"train.jsonl:{number}") for number in range(8)]
    train[3] = Example("x" * 900, "yes", source="train.jsonl:3")
    task = small_task(("yes",), train=train)
    config = EpisodesConfig(max_tokens=400)
    row = build_row([task], config=config, encoder=Encoder(byte_tokenizer), seed=0, index=0)
    assert "left out: train.jsonl:3: its 915 tokens are more than the row's 400\n" in printed(row, byte_tokenizer)
