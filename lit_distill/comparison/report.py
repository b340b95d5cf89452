"""The report of a comparison: Markdown, one self-contained HTML page, its pictures, all figures."""

import base64
import html
import math
import os
import platform
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator
from torch import Tensor

import lit_distill
from lit_distill.callbacks.pictures import draw_rows
from lit_distill.callbacks.report import metric_names, write_rows
from lit_distill.comparison.evaluation import SHOWN, Evaluator, Row
from lit_distill.comparison.plan import TEACHER, Comparison, Entry, Plan
from lit_distill.comparison.training import Spent

_FEW = 8  # evaluations: what a few-step generator may take in the plot of costs
# Okabe and Ito's colours, told apart by the colour-blind too; by family, in order.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f")
_MARKERS = "osD^vP*X<>ph"
_LATER = "not run yet"


@dataclass
class Result:
    """What became of an entry, or of a teacher.

    Attributes:
        name: Of its run.
        entry: The entry; None for a teacher.
        rows: Its lines of the table.
        images: Of each line, see :class:`~lit_distill.comparison.evaluation.Evaluator`.
        spent: What its own training cost.
        prepared: What the runs cost that it reads, without the teacher's training.
        error: Why it failed.
        left_out: It was not asked for; what is known of it is shown.
    """

    name: str
    entry: Entry | None
    rows: list[Row] = field(default_factory=list)
    images: dict[str, Tensor] = field(default_factory=dict)
    spent: Spent = field(default_factory=Spent)
    prepared: list[Spent] = field(default_factory=list)
    error: str = ""
    left_out: bool = False

    @property
    def label(self) -> str:
        """Its name in the table."""
        return self.entry.label if self.entry else self.name

    def total(self, what: str) -> float | None:
        """What it spent in all, its preparation included; None if a part is not known."""
        parts = [getattr(spent, what) for spent in [self.spent, *self.prepared]]
        return None if None in parts else sum(parts)


def write_report(
    comparison: Comparison,
    plan: Plan,
    evaluator: Evaluator,
    teachers: Sequence[Result],
    results: Sequence[Result],
) -> str:
    """Write ``report/``.

    Args:
        comparison: The settings.
        plan: Its runs.
        evaluator: What measured.
        teachers: Rows of the teachers.
        results: Of all entries.

    Returns:
        The table, as Markdown.
    """
    folder = plan.folder / "report"
    folder.mkdir(parents=True, exist_ok=True)
    extractor = comparison.evaluation.extractor.name
    page = _Page(comparison, plan, teachers, results, evaluator.real(), metric_names(extractor))
    pictures = page.draw(folder)
    table = page.markdown_table()
    parts = [f"# {comparison.title}", page.introduction(), table, *page.notes()]
    parts += [f"![{alt}]({path.name})" for alt, path in pictures.items()]
    _write(folder / "report.md", "\n\n".join(parts) + "\n")
    _write(folder / "index.html", page.html(pictures))
    write_rows(page.figures(), folder / "results.json")
    return table


@dataclass
class _Line:
    """One line of the table: cells, and whose it is."""

    family: str
    cells: list[str]
    note: str = ""


@dataclass
class _Page:
    comparison: Comparison
    plan: Plan
    teachers: Sequence[Result]
    results: Sequence[Result]
    real: list[Row]
    names: dict[str, str]

    # --- The table ------------------------------------------------------------------------------

    @property
    def head(self) -> list[str]:
        return [
            *("family", "method", "NFE", "latency, ms", self.names["teacher"], "of one-step gap"),
            *(self.names["test"], "coverage", "label", "paired"),
            *("teacher evaluations", "updates", "training, s", "memory, MB"),
        ]

    def lines(self) -> list[_Line]:
        """All lines, blocks of one family together."""
        found = [
            _Line("real", ["real", row["label"], *self._figures(row, None)]) for row in self.real
        ]
        for teacher in self.teachers:
            for row in teacher.rows:
                steps = f"{row['steps']} step{'s' * (row['steps'] > 1)}"
                name = f"{teacher.name}, {row['solver']}, {steps}"
                found.append(_Line("teacher", ["teacher", name, *self._figures(row, teacher)]))
        families = dict.fromkeys(r.entry.family for r in self.results if r.entry)
        for family in families:
            for result in self.results:
                if result.entry is None or result.entry.family != family:
                    continue
                if result.error or not result.rows:
                    note = result.error or _LATER
                    found.append(_Line(family, [family, result.label], note))
                for row in result.rows:
                    cells = [family, result.label, *self._figures(row, self._teacher(result))]
                    cells[-4:] = self._costs(result)
                    found.append(_Line(family, cells))
        return found

    def _figures(self, row: Row, teacher: Result | None) -> list[str]:
        """The cells of a row from NFE on."""
        gap = _gap(teacher)
        share = None if gap is None or row.get("fd_teacher") is None else row["fd_teacher"] / gap
        return [
            _text(row.get("nfe"), "{:,}"),
            _number(row.get("latency_ms")),
            _with_interval(row, "fd_teacher"),
            "-" if share is None else f"{100 * share:.3g}%",
            _with_interval(row, "fd_test"),
            _percent(row.get("coverage")),
            _percent(row.get("label_accuracy")),
            _number(row.get("paired_distance") or None),  # 0 is the teacher's to itself
            *("-", "-", "-", "-"),
        ]

    def _costs(self, result: Result) -> list[str]:
        return [
            _text(result.total("teacher_evaluations"), "{:,.0f}"),
            _text(result.spent.updates, "{:,}"),
            _sum([result.spent.seconds, *(spent.seconds for spent in result.prepared)]),
            _text(result.spent.peak_memory_mb, "{:,.0f}"),
        ]

    def _teacher(self, result: Result) -> Result | None:
        if result.entry is None:
            return result
        name, _ = self.plan.teacher_of(result.entry)
        return next((teacher for teacher in self.teachers if teacher.name == name), None)

    def markdown_table(self) -> str:
        """The table as Markdown."""
        rows = [f"| {' | '.join(self.head)} |", "|" + "---|" * len(self.head)]
        for line in self.lines():
            cells = [*line.cells, line.note] if line.note else line.cells
            cells = [cell.replace("|", "\\|").replace("\n", " ") for cell in cells]
            rows.append(f"| {' | '.join(cells + [''] * (len(self.head) - len(cells)))} |")
        return "\n".join(rows)

    # --- Words ----------------------------------------------------------------------------------

    def introduction(self) -> str:
        """What was done, in a few sentences."""
        c = self.comparison
        origin = "taken as it is" if self.plan.ready else "trained as configured"
        return (
            f"Teacher: `{c.teacher}`, {origin}. Budget of each method: "
            f"{self.plan.budget}. "
            f"Tuning: {c.tuning.strip().rstrip('.')}. Seed {c.seed}. Device: {_device()}."
        )

    def notes(self) -> list[str]:
        """What the columns mean."""
        judge = self.comparison.evaluation
        intervals = "; in brackets a bootstrapped 95% interval" if judge.resamples else ""
        notes = [
            f"`{self.names['teacher']}`: Frechet distance to {judge.num_images:,} samples of the "
            f"teacher ({judge.teacher_solver}, {judge.teacher_steps} steps) from other noise, of "
            f"as many samples{intervals}. The teacher's own first line is the floor. Its other "
            f"lines are the best of {', '.join(judge.solvers)}, chosen on samples of other seeds. "
            "Of one-step gap: over the distance of the teacher's own single step.",
            f"`{self.names['test']}`: to the held-out images; coverage: of these; label: asked "
            "label recognised; paired: mean pixel distance to the teacher's image from the same "
            "noise. Latency: an image at batch 1.",
            "Teacher evaluations: times batch rows, stored pairs included. Training: seconds of "
            "training steps, plus those of the runs that it reads (pairs, earlier stages); the "
            "teacher's training is left out, and ? stands for what was found there. Memory: peak "
            "of the training process.",
        ]
        if self.plan.budget.unit == "seconds":
            notes.append(
                "Seconds became updates by timing a few updates of each method before its "
                "training, so that its learning-rate schedule ends with it. Pairs and earlier "
                "stages are not part of the budget of the method that reads them; they stand "
                "behind the plus."
            )
        others = {
            r.label: self.plan.teacher_of(r.entry)[0]
            for r in self.results
            if r.entry and r.entry.teacher
        }
        if others:
            said = "; ".join(f"{label}: `{name}`" for label, name in others.items())
            notes.append(f"Measured against a teacher of their own, trained as configured: {said}.")
        found = [r.label for r in self.results if r.rows and r.spent.seconds is None]
        if found:
            notes.append(f"Found and not trained here, cost not known: {', '.join(found)}.")
        return notes

    # --- Pictures -------------------------------------------------------------------------------

    def draw(self, folder: Path) -> dict[str, Path]:
        """Write the pictures; returns them by what they show."""
        pictures: dict[str, Path] = {}
        known = [r for r in self.results if r.rows]
        if known:
            path = folder / "distances.png"
            _save(self._plot(known), path)
            pictures["Distance against network evaluations, and against training cost"] = path
        strips, paths = self._shown()
        if strips and all(_is_picture(images) for images in strips.values()):
            path = folder / "samples.png"
            draw_rows(strips, path, SHOWN)
            pictures["Samples of all models from the same noise"] = path
        if paths:
            path = folder / "trajectories.png"
            _save(_plot_paths(paths), path, dpi=80)  # many thin lines make a large file
            pictures["Trajectories from the same noise"] = path
        return pictures

    def _shown(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Images and trajectories by caption."""
        strips: dict[str, Tensor] = {}
        paths: dict[str, Tensor] = {}
        for result in [*self.teachers, *self.results]:
            for row in result.rows:
                nfe = str(row["nfe"])
                caption = f"{_wrapped(result.label)}\n{nfe} NFE"
                strips[caption] = result.images[nfe]
                if f"paths-{nfe}" in result.images:
                    paths[caption] = result.images[f"paths-{nfe}"]
        return strips, paths

    def _plot(self, known: list[Result]) -> Figure:
        figure = Figure(figsize=(12.5, 5.2), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True)
        families = list(dict.fromkeys(r.entry.family for r in self.results if r.entry))
        used: dict[str, int] = {}
        shares = any(_gap(teacher) for teacher in self.teachers)
        for number, result in enumerate(known):
            assert result.entry is not None
            family = result.entry.family
            used[family] = used.get(family, -1) + 1
            style: dict[str, Any] = {
                "color": _COLOURS[families.index(family) % len(_COLOURS)],
                "marker": _MARKERS[used[family] % len(_MARKERS)],
                "markersize": 5.5,
                "linewidth": 0.9,
                "capsize": 2,
            }
            gap = _gap(self._teacher(result)) if shares else 1.0
            if gap is None:
                continue
            rows = sorted(result.rows, key=lambda row: row["nfe"])
            apart = 1.012 ** (number - len(known) / 2)  # or the intervals would cover each other
            label = f"{family}: {result.label}"
            _points(
                left, [row["nfe"] * apart for row in rows], rows, gap, {**style, "label": label}
            )
            few = [row for row in rows if row["nfe"] <= _FEW]
            seconds = result.total("seconds")
            if few and seconds:
                _points(right, [seconds], [min(few, key=_distance)], gap, style)
        for line, teacher in zip(("-", "--", ":"), self.teachers, strict=False):
            gap = _gap(teacher) if shares else 1.0
            if gap is None:
                continue
            rows = sorted(teacher.rows, key=lambda row: row["nfe"])
            style = {"color": "black", "marker": ".", "linestyle": line, "linewidth": 1.2}
            label = f"{teacher.name}'s best solver"
            _points(left, [row["nfe"] for row in rows], rows, gap, {**style, "label": label})
            right.axhline(_distance(teacher.rows[0]) / gap, color="black", linestyle=line, lw=0.8)
        unit = ", share of the one-step gap" if shares else ""
        left.set(xscale="log", yscale="log", xlabel="network evaluations (NFE)")
        left.set_ylabel(f"{self.names['teacher']}{unit}")
        ticks = sorted({row["nfe"] for r in [*known, *self.teachers] for row in r.rows})
        left.set_xticks(ticks, [str(tick) for tick in ticks])
        right.set(xscale="log", xlabel="seconds of training and preparation")
        left.set_title("Distance against NFE", fontsize=11)
        right.set_title(
            f"Best at up to {_FEW} NFE against training cost (line: floor)", fontsize=11
        )
        totals = [total for r in known if (total := r.total("seconds"))]
        if totals:  # wide enough for a tick
            right.set_xlim(min(totals) / 1.7, max(totals) * 1.7)
        for axis in (left.yaxis, right.xaxis):  # plain numbers, also within a power of ten
            axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.set_major_formatter(lambda value, _: f"{value:g}")
        if shares:
            left.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g}%")
        for axes in (left, right):
            axes.minorticks_off()
            axes.grid(alpha=0.25, linewidth=0.5)
        figure.legend(*left.get_legend_handles_labels(), loc="outside right center", fontsize=8)
        return figure

    # --- The page -------------------------------------------------------------------------------

    def html(self, pictures: dict[str, Path]) -> str:
        """The page: nothing in it is fetched from anywhere."""
        title = html.escape(self.comparison.title)
        head = "".join(f"<th scope='col'>{html.escape(cell)}</th>" for cell in self.head)
        body = []
        last = ""
        for line in self.lines():
            cells = [html.escape(cell) for cell in line.cells]
            name = cells[0] if line.family != last else ""
            row = f"<th scope='row'>{name}</th><td class='name'>{cells[1]}</td>"
            if line.note:
                why = html.escape(line.note)
                kind = "later" if line.note == _LATER else "why"
                row += f"<td class='{kind}' colspan='{len(self.head) - 2}'>{why}</td>"
            else:
                row += "".join(f"<td>{cell}</td>" for cell in cells[2:])
            body.append(f"<tr{' class=first' if line.family != last else ''}>{row}</tr>")
            last = line.family
        figures = "".join(
            f"<figure><img alt='{html.escape(alt)}' src='data:image/png;base64,{_encoded(path)}'>"
            f"<figcaption>{html.escape(alt)}</figcaption></figure>"
            for alt, path in pictures.items()
        )
        notes = "".join(f"<p>{_code(note)}</p>" for note in self.notes())
        return _HTML.format(
            title=title,
            introduction=_code(self.introduction()),
            head=head,
            body="\n".join(body),
            notes=notes,
            figures=figures,
            version=lit_distill.__version__,
        )

    def figures(self) -> list[Row]:
        """All figures, one row a line of the table."""
        rows: list[Row] = [{"name": row["label"], "family": "real", **row} for row in self.real]
        for result in [*self.teachers, *self.results]:
            entry = result.entry
            about = {
                "name": result.name,
                "label": result.label,
                "family": entry.family if entry else TEACHER,
                "measured_against": self.plan.teacher_of(entry)[0] if entry else result.name,
                "error": result.error or None,
                "spent": asdict(result.spent),
                "prepared": [asdict(spent) for spent in result.prepared],
            }
            rows += [{**about, **row} for row in result.rows] or [about]
        return rows


def _is_picture(images: Tensor) -> bool:
    """Whether they can be looked at: neither points nor latents."""
    return images.shape[1] in (1, 3)


def _gap(teacher: Result | None) -> float | None:
    """The distance of a teacher's own single step."""
    rows = teacher.rows if teacher else []
    return next((row["fd_teacher"] for row in rows if row["nfe"] == 1), None)


def _distance(row: Row) -> float:
    return float(row["fd_teacher"])


def _points(axes: Axes, x: list[float], rows: list[Row], gap: float, style: dict[str, Any]) -> None:
    """Distances with their intervals, where there are any."""
    y = [max(_distance(row), 1e-9) / gap for row in rows]
    ends = [row["fd_teacher_interval"] for row in rows]
    if None in ends:  # resamples: 0
        axes.errorbar(x, y, **style)
        return
    below = [max(d - low / gap, 0) for d, (low, _) in zip(y, ends, strict=True)]
    above = [max(high / gap - d, 0) for d, (_, high) in zip(y, ends, strict=True)]
    axes.errorbar(x, y, yerr=[below, above], **style)


def _plot_paths(paths: dict[str, Tensor]) -> Figure:
    """Trajectories in the plane, a panel each."""
    columns = min(4, len(paths))
    rows = -(-len(paths) // columns)
    figure = Figure(figsize=(3 * columns, 3.2 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flat
    for axes, (caption, states) in zip(panels, paths.items(), strict=False):
        axes.plot(states[..., 0], states[..., 1], color="#0072b2", linewidth=0.6, alpha=0.6)
        axes.plot(*states[0].T, ".", color="grey", markersize=3)
        axes.plot(*states[-1].T, ".", color="#d55e00", markersize=4)
        axes.set_title(caption, fontsize=8)
        axes.set(xlim=(-2.6, 2.6), ylim=(-2.6, 2.6), aspect="equal", xticks=[], yticks=[])
    for axes in list(panels):
        axes.set_axis_off()
    return figure


def _save(figure: Figure, path: Path, dpi: int = 130) -> None:
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    figure.savefig(temporary, format="png", dpi=dpi, facecolor="white")
    os.replace(temporary, path)


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def _encoded(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode("ascii")


def _code(text: str) -> str:
    """Escaped text, with what stands between backticks as code."""
    parts = html.escape(text).split("`")
    return "".join(f"<code>{part}</code>" if i % 2 else part for i, part in enumerate(parts))


def _device() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    count = torch.get_num_threads()
    return f"CPU ({platform.machine()}), sampling with {count} thread{'s' * (count > 1)}"


def _wrapped(label: str, width: int = 24) -> str:
    """A caption in lines that fit beside the pictures, with names of classes in words."""
    lines = [""]
    for word in re.sub(r"(?<=[a-z])(?=[A-Z][a-z]{3})", " ", label).split():
        if lines[-1] and len(lines[-1]) + len(word) >= width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return "\n".join(lines)


def _number(value: float | None) -> str:
    """Three significant digits, never in scientific notation."""
    if value is None:
        return "-"
    digits = 2 - math.floor(math.log10(abs(value))) if value else 0
    return f"{value:,.{min(max(digits, 0), 6)}f}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}%"


def _text(value: Any, form: str) -> str:
    return "-" if value is None else form.format(value)


def _sum(parts: list[float | None]) -> str:
    """What training took, and what came before."""
    own, *before = parts
    if own is None:
        return "-"
    known = [part for part in before if part is not None]
    more = f"{sum(known):.0f}" if len(known) == len(before) else "?"
    return f"{own:.0f}" + (f" + {more}" if before else "")


def _with_interval(row: Row, name: str) -> str:
    value, ends = row.get(name), row.get(f"{name}_interval")
    if value is None or ends is None:
        return _number(value)
    return f"{_number(value)} [{_number(ends[0])}, {_number(ends[1])}]"


_HTML = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<link rel="icon" href="data:,">
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; color: #222; background: #fff;
       margin: 2rem auto; max-width: 100rem; padding: 0 1.5rem; }}
h1 {{ font-size: 1.6rem; margin-bottom: .3rem; }}
p {{ max-width: 60rem; }}
.notes p {{ font-size: .85rem; color: #444; margin: .4rem 0; }}
.scroll {{ overflow-x: auto; margin: 1.2rem 0; }}
table {{ border-collapse: collapse; font-size: .82rem; font-variant-numeric: tabular-nums; }}
th, td {{ padding: .25rem .6rem; text-align: right; white-space: nowrap; }}
thead th {{ border-bottom: 2px solid #222; vertical-align: bottom; white-space: normal; }}
tbody th, td.name, thead th:nth-child(-n+2) {{ text-align: left; }}
tbody th {{ font-weight: 600; }}
tr.first th, tr.first td {{ border-top: 1px solid #aaa; }}
tbody tr:hover {{ background: #f3f6fa; }}
td.why, td.later {{ text-align: left; white-space: normal; color: #a33; }}
td.later {{ color: #777; }}
figure {{ margin: 1.5rem 0; }}
figure img {{ max-width: 100%; height: auto; }}
figcaption {{ font-size: .85rem; color: #444; }}
footer {{ font-size: .8rem; color: #666; margin-top: 2rem; }}
</style>
</head>
<body>
<h1>{title}</h1>
<p>{introduction}</p>
<div class="scroll"><table>
<thead><tr>{head}</tr></thead>
<tbody>
{body}
</tbody>
</table></div>
{figures}
<div class="notes">{notes}</div>
<footer>lit-distill {version}; all figures: results.json beside this page.</footer>
</body>
</html>
"""
