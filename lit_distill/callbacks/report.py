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
    *("clip_score", "clip_model", "floors", "reference_images"),
    *("student_updates", "teacher_evaluations", "train_seconds", "peak_memory_mb"),
)


def write_rows(rows: Sequence[Row], path: Path) -> None:
    """Write rows as a JSON list, under a temporary name that is then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(rows, indent=2, allow_nan=False) + "\n")
    os.replace(temporary, path)


def numbers_of(run: str | Path, student_updates: int | None = None) -> str | None:
    """The table of a run's latest test.

    Args:
        run: The run's folder.
        student_updates: How many the weights in question had; a test of others does not count.

    Returns:
        What the test printed; None where there was no test, or one of other weights.

    Raises:
        ValueError: If ``metrics.json`` is damaged.
    """
    path = Path(run) / "metrics.json"
    if not path.is_file():
        return None
    try:
        rows = json.loads(path.read_text())
        tested = {row["student_updates"] for row in rows} - {None}
        if student_updates is not None and tested and student_updates not in tested:
            return None
        prefix = "fd_teacher_"
        extractor = next(key.removeprefix(prefix) for key in rows[0] if key.startswith(prefix))
        return format_table(rows, extractor)
    except (ValueError, KeyError, TypeError, IndexError, StopIteration) as error:
        raise ValueError(f"{path} is damaged: make it again with lit-distill test.") from error


def metric_names(extractor: str) -> dict[str, str]:
    """Names of the three distances by what they are measured to; only Inception's is an FID."""
    data = "fid" if extractor == "inception" else f"fd_{extractor}"
    return {"teacher": f"fd_teacher_{extractor}", "test": data, "train": f"{data}_train"}


def make_row(extractor: str, **values: Any) -> Row:
    """A row with every key that rows have, and None where no value is given.

    Args:
        extractor: Name of the extractor that the distances were measured with.
        **values: Values by key; ``fd_teacher``, ``fd_test`` and ``fd_train``, also with
            ``_interval`` behind, get the names that :func:`metric_names` gives them.
    """
    row: Row = {**dict.fromkeys(_KEYS), **values}
    return {_named(key, metric_names(extractor)): row[key] for key in row}


def _named(key: str, names: dict[str, str]) -> str:
    """The key under the name of its extractor."""
    if not key.startswith("fd_"):
        return key
    reference, *kind = key.removeprefix("fd_").split("_")
    return "_".join([names[reference], *kind])


def format_table(rows: Sequence[Row], extractor: str) -> str:
    """Lay rows out as plain text.

    Args:
        rows: Rows with equal keys.
        extractor: Name of the extractor that the distances were measured with.

    Returns:
        The table and a line on each column that is not plain. A column without any value is left
        out. Behind a distance stands its excess over the floor, and behind ± half the width of its
        95% interval.
    """
    names = metric_names(extractor)
    columns = {
        "method": ("method", str),
        "NFE": ("nfe", str),
        names["teacher"]: (names["teacher"], _number),
        names["test"]: (names["test"], _number),
        **({names["train"]: (names["train"], _number)} if extractor == "inception" else {}),
        "coverage": ("coverage", _share),
        "recall": ("recall", _share),
        "cov. train": ("coverage_train", _share),
        "label": ("label_accuracy", _share),
        "entropy": ("class_entropy", _share),
        "clip_score": ("clip_score", _number),
        "nearest": ("nearest_train", _number),
        "paired": ("paired_distance", _number),
        "ms": ("latency_ms", _number),
        "images/s": ("images_per_second", _number),
    }
    used = {
        head: key for head, key in columns.items() if any(r.get(key[0]) is not None for r in rows)
    }
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
    if "train" in references:
        notes = [
            f"{names['test']}: to {references['test']:,} held-out images; coverage, recall: of "
            f"these; nearest: pixel distance to the nearest of {references['train']:,} training "
            "images."
        ]
    elif "test" in references:
        notes = [
            f"{names['test']}: to the {references['test']:,} images that the prompts were written "
            "for; coverage, recall: of these."
        ]
    if rows[0].get("clip_score") is not None:
        notes.append(f"clip_score: 100 cos(image, prompt) by {rows[0]['clip_model']}.")
    if any(row.get(f"{names['test']}_interval") for row in rows):
        notes.append("Behind ±: half of the 95% interval (metrics.json), of images drawn anew.")
    if names["train"] == "fid_train" and "train" in references:
        notes.append(
            f"fid_train: to {references['train']:,} training images, as published figures are "
            "(of 50,000 samples)."
        )
    if floors:
        listed = ", ".join(f"{name} {_number(value)}" for name, value in floors.items())
        notes.append(f"In brackets: above the floor ({listed}).")
    return notes


def _cell(row: Row, key: str, form: Any) -> str:
    value = row[key]
    if value is None:
        return "-"
    text, ends, floor = form(value), row.get(f"{key}_interval"), row["floors"].get(key)
    if ends and form is _number:  # of shares it stands in metrics.json alone: the table is wide
        text += f"±{_number((ends[1] - ends[0]) / 2, digits=2)}"
    return text if floor is None else f"{text} ({_number(value - floor, '+', digits=2)})"


def _number(value: float, sign: str = "", digits: int = 3) -> str:
    """Three significant digits, never in scientific notation."""
    places = digits - 1 - math.floor(math.log10(abs(value))) if value else 0
    return f"{value:{sign},.{min(max(places, 0), 6)}f}"


def _share(value: float) -> str:
    return f"{100 * value:.1f}%"
