"""Writes the rows of an evaluation: as JSON, and as a table that a person can read."""

import json
import math
import os
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from lit_distill.metrics.cost import Cost
from lit_distill.metrics.evaluation import Measures

Row = dict[str, Any]
"""One line of ``metrics.json``; all rows of a file have the same keys, with None for "n/a"."""

_KEYS = (
    *("method", "dataset", "solver", "steps", "num_images", "seed", "parameters"),
    *(field.name for figures in (Measures, Cost) for field in fields(figures)),
    *("floors", "reference_images"),
    *("student_updates", "teacher_evaluations", "train_seconds", "peak_memory_mb"),
)


def write_rows(rows: Sequence[Row], path: Path) -> None:
    """Write rows as a JSON list, under a temporary name that is then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(rows, indent=2, allow_nan=False) + "\n")
    os.replace(temporary, path)


def metric_names(extractor: str) -> dict[str, str]:
    """Names of the three distances by what they are measured to; only Inception's is an FID."""
    data = "fid" if extractor == "inception" else f"fd_{extractor}"
    return {"teacher": f"fd_teacher_{extractor}", "test": data, "train": f"{data}_train"}


def make_row(extractor: str, **values: Any) -> Row:
    """A row with every key that rows have, and None where no value is given.

    Args:
        extractor: Name of the extractor that the distances were measured with.
        **values: Values by key; ``fd_teacher``, ``fd_test`` and ``fd_train`` get the names that
            :func:`metric_names` gives them.
    """
    names = metric_names(extractor)
    row: Row = {**dict.fromkeys(_KEYS), **values}
    return {names[key[3:]] if key.startswith("fd_") else key: row[key] for key in row}


def format_table(rows: Sequence[Row], extractor: str) -> str:
    """Lay rows out as plain text.

    Args:
        rows: Rows with equal keys.
        extractor: Name of the extractor that the distances were measured with.

    Returns:
        The table and a line on each column that is not plain. A column without any value is left
        out. Behind a distance stands its excess over the floor.
    """
    names = metric_names(extractor)
    columns = {
        "method": ("method", str),
        "NFE": ("nfe", str),
        names["teacher"]: (names["teacher"], _number),
        names["test"]: (names["test"], _number),
        "coverage": ("coverage", _share),
        "recall": ("recall", _share),
        "cov. train": ("coverage_train", _share),
        "label": ("label_accuracy", _share),
        "entropy": ("class_entropy", _share),
        "nearest": ("nearest_train", _number),
        "paired": ("paired_distance", _number),
        "ms": ("latency_ms", _number),
        "images/s": ("images_per_second", _number),
    }
    used = {head: key for head, key in columns.items() if any(r[key[0]] is not None for r in rows)}
    cells = [[_cell(row, *column) for column in used.values()] for row in rows]
    lines = [list(used), *cells]
    widths = [max(len(line[i]) for line in lines) for i in range(len(used))]
    text = [
        "  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) for line in lines
    ]
    text.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(line.rstrip() for line in [*text, *_notes(rows, names)])


def _notes(rows: Sequence[Row], names: dict[str, str]) -> list[str]:
    """What stands below the table."""
    references, floors = rows[0]["reference_images"], rows[0]["floors"]
    notes = ["coverage, recall: of the teacher's images from other noise."]
    if "test" in references:
        notes = [
            f"{names['test']}: to {references['test']:,} held-out images; coverage, recall: of "
            f"these; nearest: pixel distance to the nearest of {references['train']:,} training "
            "images."
        ]
    if floors:
        listed = ", ".join(f"{name} {_number(value)}" for name, value in floors.items())
        notes.append(f"In brackets: above the floor ({listed}).")
    return notes


def _cell(row: Row, key: str, form: Any) -> str:
    value = row[key]
    if value is None:
        return "-"
    floor = row["floors"].get(key)
    return form(value) if floor is None else f"{form(value)} ({_number(value - floor, '+')})"


def _number(value: float, sign: str = "") -> str:
    """Three significant digits, never in scientific notation."""
    digits = 2 - math.floor(math.log10(abs(value))) if value else 0
    return f"{value:{sign},.{min(max(digits, 0), 6)}f}"


def _share(value: float) -> str:
    return f"{100 * value:.1f}%"
