"""What tests share that needs neither torch nor transformers: rows of a file, and the names of architectures."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3")


def write_rows(path: Path, rows: Sequence[Mapping[str, Any] | str]) -> Path:
    """Write JSON lines; a string is written as it stands, so that a line can be broken."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path
