"""Records that a run leaves on disk: one JSON line per event, and whole JSON files.

A crash at any moment leaves a file that can be read. Knows the ``step`` of a record and nothing else about its
content. Not for several writers at once: only the main process of a run writes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from apt_trainer.errors import UserError

RECIPE_FILE, EVENTS_FILE, METRICS_FILE, RESULTS_FILE = "recipe.json", "events.jsonl", "metrics.json", "results.jsonl"
"""What a run was started with, what happened in it, what it came to; and that of all runs of a study."""
PREDICTIONS_FILE, DIFFERENCES_FILE = "predictions.json", "differences.json"
"""What a model says of the test rows, and where that is something else than what the dense model says."""


def append_event(path: str | Path, record: dict[str, Any]) -> None:
    """Add one JSON line and force it to disk; a line left incomplete by a crash is removed first."""
    line = json.dumps(record) + "\n"
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("ab+") as file:
        file.seek(0)
        kept, torn = _split_torn_line(file.read())
        if torn:
            file.truncate(len(kept))
        elif kept and not kept.endswith(b"\n"):
            line = "\n" + line
        file.write(line.encode())
        file.flush()
        os.fsync(file.fileno())


def read_events(path: str | Path) -> list[dict[str, Any]]:
    """Read all records in the order they were written; an incomplete last line is ignored, no file means no records.

    Raises:
        UserError: a line other than the last is not a JSON object.
    """
    source = Path(path)
    if not source.exists():
        return []
    kept, _ = _split_torn_line(source.read_bytes())
    return [_parse(line, source, number) for number, line in enumerate(kept.splitlines(), start=1) if line.strip()]


def truncate_after(path: str | Path, step: int) -> int:
    """Drop the records of later steps, as a run does that resumes from an earlier checkpoint.

    Args:
        path: File written by :func:`append_event`; it need not exist.
        step: Last optimizer step that stays.

    Returns:
        Number of records dropped.
    """
    records = read_events(path)
    for number, record in enumerate(records, start=1):
        if type(record.get("step")) is not int:
            raise UserError(f"{path}: record {number} has no step that is a number. Repair or delete it.")
    kept = [record for record in records if record["step"] <= step]
    if len(kept) < len(records):
        write_text(path, "".join(json.dumps(record) + "\n" for record in kept))
    return len(records) - len(kept)


def read_json(path: str | Path) -> Any:
    """What a JSON file says; raises :class:`UserError` for anything else, such as a name that is given twice."""
    try:
        return parse_json(Path(path).read_bytes())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is no JSON file, or is damaged ({_first_line(error)}).") from error


def read_json_object(path: str | Path) -> dict[str, Any]:
    """As :func:`read_json`, for a file whose content has to be an object."""
    found = read_json(path)
    if not isinstance(found, dict):
        raise UserError(f"{path} is damaged: it holds {type(found).__name__} instead of a JSON object.")
    return found


def parse_json(data: bytes) -> Any:
    """What JSON says; ValueError or RecursionError for anything else, such as a name that is given twice."""
    return json.loads(data.decode(), object_pairs_hook=_named_once)


def write_json(path: str | Path, value: Any) -> None:
    """Write a JSON file in one piece: readers see the old content or the new one, never a part."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_text(path: str | Path, text: str) -> None:
    """As :func:`write_json`, for any text."""
    _write(Path(path), [text])


def write_lines(path: str | Path, lines: Iterable[str]) -> None:
    """As :func:`write_json`, for lines that come one after the other."""
    _write(Path(path), (f"{line}\n" for line in lines))


def _write(path: Path, parts: Iterable[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")  # same folder: os.replace is atomic there
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.writelines(parts)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _named_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    named: dict[str, Any] = {}
    for name, value in pairs:
        if name in named:
            raise ValueError(f"{name!r} is given twice")
        named[name] = value
    return named


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def _split_torn_line(data: bytes) -> tuple[bytes, bytes]:
    """Split into what is complete and an incomplete last line (empty where there is none).

    A last line without a line break is complete if it parses: no beginning of a JSON object is a JSON object itself.
    """
    end = data.rfind(b"\n") + 1
    kept, last = data[:end], data[end:]
    if not last:
        return kept, b""
    try:
        parse_json(last)
    except (ValueError, RecursionError):  # malformed JSON, or bytes that are no text
        return kept, last
    return data, b""


def _parse(line: bytes, source: Path, number: int) -> dict[str, Any]:
    try:
        record = parse_json(line)
    except (ValueError, RecursionError):
        record = None
    if not isinstance(record, dict):
        raise UserError(
            f"{source}, line {number}: {line[:60].decode(errors='replace')!r} is not a JSON object. "
            "Each line must be one; delete or repair this line."
        )
    return record
