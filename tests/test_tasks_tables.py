import json
from pathlib import Path

import pytest

from manyicl.errors import TaskError
from manyicl.tasks.tables import RowError, TableRow, field_text, field_texts, find_mixed_types, find_table, read_table, read_utf8


def write(path: Path, content: bytes | str) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_jsonl_rows_carry_their_line_and_blank_lines_count(tmp_path: Path) -> None:
    path = write(tmp_path / "train.jsonl", '{"a": 1}\n\n  \n{"a": "two"}')
    assert read_table(path) == [TableRow({"a": 1}, f"{path}:1"), TableRow({"a": "two"}, f"{path}:4")]


def test_jsonl_with_bom_and_windows_line_ends(tmp_path: Path) -> None:
    path = write(tmp_path / "train.jsonl", b'\xef\xbb\xbf{"a": "x"}\r\n\r\n{"a": "y"}\r\n')
    assert [(row.fields, row.source) for row in read_table(path)] == [({"a": "x"}, f"{path}:1"), ({"a": "y"}, f"{path}:3")]


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\u000b", "\u000c", "\u001c"])
def test_unicode_line_separators_inside_a_string_end_no_line(tmp_path: Path, separator: str) -> None:
    rows = [{"text": f"one{separator}two"}, {"text": "three"}]
    path = write(tmp_path / "train.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    assert [row.fields for row in read_table(path)] == rows


def test_file_names_may_be_unicode(tmp_path: Path) -> None:
    folder = tmp_path / "données 数据"
    folder.mkdir()
    path = write(folder / "träin.jsonl", '{"a": 1}\n')
    assert read_table(path)[0].source == f"{path}:1"


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('{"a": 1', "broken JSON at column 8: Expecting ',' delimiter. Mend or remove the line."),
        ("[1, 2]", "holds a list, not an object with fields."),
        ("null", "holds a NoneType, not an object with fields."),
        ('{"a": "\\ud83d alone"}', "holds '\\ud83d', half of a pair that is no character by itself. Mend or remove the line."),
        ("[" * 100_000, "cannot be read as JSON: "),
        ('{"a": ' + "9" * 5000 + "}", "cannot be read as JSON: Exceeds the limit (4300 digits)"),
    ],
    ids=["cut", "list", "null", "surrogate", "nested", "digits"],
)
def test_a_broken_line_is_named_with_file_and_line(tmp_path: Path, line: str, problem: str) -> None:
    path = write(tmp_path / "train.jsonl", f'{{"a": 0}}\n{line}\n{{"a": 2}}\n')
    with pytest.raises(RowError) as raised:
        read_table(path)
    assert str(raised.value).startswith(f"{path}:2: {problem}")
    assert (raised.value.source, raised.value.kind) == (f"{path}:2", "broken JSON")


def test_a_whole_surrogate_pair_is_a_character(tmp_path: Path) -> None:
    path = write(tmp_path / "train.jsonl", '{"a": "\\ud83d\\ude00"}\n')
    assert read_table(path)[0].fields == {"a": "😀"}


@pytest.mark.parametrize("name", ["train.jsonl", "train.csv"])
def test_bytes_that_are_not_utf8_are_named_with_file_and_line(tmp_path: Path, name: str) -> None:
    first = b'{"a": "x"}' if name.endswith("jsonl") else b"a"
    path = write(tmp_path / name, first + b'\n{"a": "caf\xe9"}\n')
    with pytest.raises(TaskError) as raised:
        read_table(path)
    assert str(raised.value) == f"{path}:2: byte 11 of the line, 0xe9, is not UTF-8. Save the file as UTF-8."


def test_all_problems_are_collected_and_the_other_rows_kept(tmp_path: Path) -> None:
    path = write(tmp_path / "train.jsonl", b'{"a": 1}\n{"a": \n\xff\n{"a": 4}\n3\n')
    problems: list[RowError] = []
    rows = read_table(path, problems=problems)
    assert [row.source for row in rows] == [f"{path}:1", f"{path}:4"]
    assert [(error.source, error.kind) for error in problems] == [
        (f"{path}:2", "broken JSON"),
        (f"{path}:3", "bad UTF-8"),
        (f"{path}:5", "broken JSON"),
    ]


def test_csv_rows_carry_their_first_line(tmp_path: Path) -> None:
    path = write(tmp_path / "train.csv", 'input,label\r\n"two\r\nlines, one row",a\r\n\r\n"say ""hi""",b\r\n')
    assert read_table(path) == [
        TableRow({"input": "two\r\nlines, one row", "label": "a"}, f"{path}:2"),
        TableRow({"input": 'say "hi"', "label": "b"}, f"{path}:5"),
    ]


def test_csv_with_bom_and_unicode_separator(tmp_path: Path) -> None:
    path = write(tmp_path / "train.csv", "\ufeffinput,label\none\u2028two,a\n")
    assert read_table(path)[0].fields == {"input": "one\u2028two", "label": "a"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("input,label\nx,a\ny\n", ":3: the row has 1 fields, the header 2. Quote fields that hold commas."),
        ("input,label\nx, y,a\n", ":2: the row has 3 fields, the header 2. Quote fields that hold commas."),
        (
            'input,label\nx,a\n"never closed,b\nz,c\n',
            ":3: broken CSV: unexpected end of data. Close each quote and double those ",
        ),
        ("input,label,input\nx,a,y\n", ":1: the header names 'input' twice. Give each column its own name."),
        ("input,label\n" + "x" * 200_000 + ",a\n", ":2: broken CSV: field larger than field limit (131072). Close each quote"),
    ],
    ids=["short", "long", "quote", "header", "limit"],
)
def test_broken_csv_is_named_with_file_and_line(tmp_path: Path, content: str, message: str) -> None:
    path = write(tmp_path / "train.csv", content)
    with pytest.raises(TaskError) as raised:
        read_table(path)
    assert str(raised.value).startswith(f"{path}{message}")


def test_csv_problems_are_collected_with_true_lines(tmp_path: Path) -> None:
    path = write(tmp_path / "train.csv", b"input,label\nbad \xff,a\nragged\nx,b\n")
    problems: list[RowError] = []
    assert read_table(path, problems=problems) == [TableRow({"input": "x", "label": "b"}, f"{path}:4")]
    assert [(error.source, error.kind) for error in problems] == [(f"{path}:2", "bad UTF-8"), (f"{path}:3", "ragged row")]


def test_parquet_rows_keep_their_types(tmp_path: Path) -> None:
    import pyarrow.parquet

    path = tmp_path / "label=3" / "train.parquet"  # A folder that looks like a partition adds no column.
    path.parent.mkdir()
    rows = [{"question": "x", "choices": ["a", "b"], "label": 1}, {"question": "y", "choices": ["c"], "label": None}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    assert read_table(path) == [TableRow(rows[0], f"{path}:1"), TableRow(rows[1], f"{path}:2")]
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(TaskError, match=r"train\.parquet: cannot be read as Parquet"):
        read_table(path)


def test_missing_empty_and_unknown_files(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=r"train\.jsonl: no such file"):
        read_table(tmp_path / "train.jsonl")
    with pytest.raises(TaskError, match=r"train\.xlsx: unknown kind of file. Give one of .jsonl, .csv, .parquet"):
        read_table(tmp_path / "train.xlsx")
    for name, content in (("a.jsonl", "\n\n"), ("b.csv", "input,label\n"), ("c.csv", "")):
        with pytest.raises(TaskError, match=rf"{name}: holds no rows. Give at least two examples"):
            read_table(write(tmp_path / name, content))


def test_find_table_wants_one_file(tmp_path: Path) -> None:
    assert find_table(tmp_path, "train") is None
    first = write(tmp_path / "train.csv", "")
    assert find_table(tmp_path, "train") == first
    write(tmp_path / "train.jsonl", "")
    with pytest.raises(TaskError, match=r"train\.jsonl, train\.csv all stand here. Keep one of them"):
        find_table(tmp_path, "train")


def test_read_utf8_gives_the_text_without_its_mark(tmp_path: Path) -> None:
    assert read_utf8(write(tmp_path / "a", b"\xef\xbb\xbfone\r\ntwo\n")) == "one\r\ntwo\n"


@pytest.mark.parametrize(
    ("value", "text"),
    [(" x \n", "x"), (3, "3"), (2.5, "2.5"), (True, "true"), (False, "false"), (["a ", 1], "a; 1"), (0, "0")],
)
def test_fields_as_text(value: object, text: str) -> None:
    assert field_text(TableRow({"f": value}, "file:1"), "f") == text


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"g": 1}, "file:1: field 'f' is missing (there: g). Correct the row or the task.yaml."),
        ({"f": None, "g": 1}, "file:1: field 'f' has no value (there: f, g). Correct the row or the task.yaml."),
        ({"f": float("nan")}, "file:1: field 'f' has no value (there: f). Correct the row or the task.yaml."),
        ({"f": {"text": "x"}}, "file:1: field 'f' holds dict where a text is wanted. Write a text."),
        ({"f": b"x"}, "file:1: field 'f' holds bytes where a text is wanted. Write a text."),
        ({"f": ["x", None]}, "file:1: field 'f' holds nothing where a text is wanted. Write a text."),
    ],
)
def test_fields_that_hold_no_text(fields: dict, message: str) -> None:
    with pytest.raises(RowError) as raised:
        field_text(TableRow(fields, "file:1"), "f")
    assert str(raised.value) == message


def test_a_field_of_several_texts_may_hold_one() -> None:
    assert field_texts(TableRow({"f": "Paris"}, "file:1"), "f") == ("Paris",)
    assert field_texts(TableRow({"f": ["Paris", 7]}, "file:1"), "f") == ("Paris", "7")


def test_mixed_types_name_the_first_row_of_the_rarest_type() -> None:
    values = ["a", "b", 3, "c", None, 4.5, "d", float("nan")]
    rows = [
        TableRow({"label": value, "input": "x", "other": 1 if value == 3 else 2.5}, f"f:{n}") for n, value in enumerate(values)
    ]
    found = list(find_mixed_types(rows))
    assert [(error.source, error.kind) for error in found] == [("f:2", "mixed types")]
    assert found[0].problem == "field 'label' holds a number in 2 of 8 rows, and a text in 4. Write one kind."
    assert list(find_mixed_types([TableRow({"a": True}, "f:1"), TableRow({"a": False}, "f:2")])) == []
