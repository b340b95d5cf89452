"""The digits table: every exported student beside its teacher's solvers at the same cost.

    python benchmarks/few_step_table.py --runs runs/digits --out docs/digits_methods

Reads the exported folders of ``make methods`` (``runs/digits/<method>/pipeline``, and the stages of
progressive distillation), samples each at 1, 2 and 4 evaluations where it can, and writes ``.md``
(a table), ``.json`` (all figures) and ``.png`` (images of all from the same noise). The teacher is
sampled at 1, 2, 4, 7 and 8 evaluations by all solvers with one evaluation a step, on its own grid
and on one that spends none below 0.006; the best of them is shown. (At so few evaluations Heun's
method and DPM-Solver-2, of two, are far behind.)
Samples are judged as the evaluation callback judges them.
"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from lit_distill.callbacks.pictures import draw_rows
from lit_distill.datamodules import DigitsDataModule
from lit_distill.diffusion import (
    Denoiser,
    EvaluationCounter,
    drawn_noise,
    rho_grid,
    sample,
    seeded_generators,
    solve,
)
from lit_distill.metrics import DigitsExtractor, ImageSet, describe, measure, to_uint8
from lit_distill.models import load_denoiser

SEED = 10_000_000  # of the evaluation callback's test
BATCH = 500
SOLVERS = ("euler", "dpmpp_2m", "dpmpp_3m", "ipndm")  # one evaluation a step
BUDGETS = (1, 2, 4, 7, 8)  # evaluations that the teacher is given
TITLES = {
    "kd": "KnowledgeDistillation",
    "kd_online": "KnowledgeDistillation, online",
    "pd": "ProgressiveDistillation",
    "td": "TrajectoryDistillation",
    "sfd": "SFD",
    "sfd_stored": "SFD, stored trajectories",
    "sfd_cheap": "SFD, a quarter of the teacher's cost",
    "sfd_v": "SFD-v",
    "sfd_stage2": "SFD, second stage",
    "cd": "ConsistencyDistillation",
    "multi_boundary": "MultiBoundaryConsistencyDistillation",
    "ct": "ConsistencyTraining, pretrained",
    "ct_scratch": "ConsistencyTraining, from nothing",
    "ctm": "ConsistencyTrajectory",
    "dmd": "DMD",
}


@torch.inference_mode()
def draw(denoiser: Denoiser, count: int, seed: int, **how: Any) -> tuple[Tensor, int]:
    """uint8 images of a denoiser and their number of evaluations."""
    images = []
    autocast = torch.autocast("cpu", torch.bfloat16)
    grid = how.pop("grid", None)
    with EvaluationCounter(denoiser) as counter:
        for first in tqdm(range(0, count, BATCH), leave=False):
            rows = torch.arange(first, min(first + BATCH, count))
            generators = seeded_generators((seed + rows).tolist())
            noise, label = drawn_noise((1, 8, 8), generators), rows % 10
            with autocast:
                if grid is not None:
                    x = solve(denoiser, denoiser.start(noise), grid, condition=label, **how)
                else:
                    x = sample(denoiser, noise, condition=label, generator=generators, **how)
            images.append(to_uint8(x.float()))
    return torch.cat(images), counter.calls // len(images)


def students(runs: Path) -> list[tuple[str, Path, int]]:
    """Name, folder and number of steps of each row."""
    found = []
    for name, title in TITLES.items():
        folder = runs / name / "pipeline"
        if not (folder / "model_index.json").is_file():
            print(f"{folder} is not there: {title} is left out")
            continue
        few = load_denoiser(folder).few_steps
        if few is None:
            raise SystemExit(f"{folder} holds a teacher and no student: export it again.")
        asked = [n for n in (1, 2, 3, 4, 5) if n in few.trained or (few.gamma > 0 and n in (2, 4))]
        found += [(title, folder, n) for n in asked]
        if name == "pd":
            stages = [(n, runs / name / f"stage-{n}-steps") for n in (2, 4)]
            found += [(title, stage, n) for n, stage in stages if stage.is_dir()]
    return found


def main() -> None:
    """Sample, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--runs", type=Path, default=Path("runs/digits"))
    parser.add_argument("--out", type=Path, default=Path("digits_methods"))
    parser.add_argument("--num-images", type=int, default=10_000)
    parser.add_argument("--solvers", nargs="+", choices=SOLVERS, default=list(SOLVERS))
    parser.add_argument("--only", nargs="*", help="folders of runs to measure; all by default")
    options = parser.parse_args()
    count = options.num_images
    data = DigitsDataModule()
    data.prepare_data()
    data.setup("test")
    data.setup("fit")
    extractor = DigitsExtractor()

    def seen(images: Tensor) -> ImageSet:
        return describe(extractor, images, torch.arange(len(images)) % 10)

    real = {split: describe(extractor, *data.images(split)) for split in ("train", "test")}
    found = students(options.runs)
    teacher = load_denoiser(options.runs / "teacher" / "pipeline")
    best, nfe = draw(teacher, count, SEED, steps=18, solver="heun")
    other = seen(draw(teacher, count, SEED + count, steps=18, solver="heun")[0])
    rows: list[dict[str, Any]] = []
    pictures = {f"teacher\n{nfe} NFE": best[:20]}

    def add(name: str, how: str, images: Tensor, nfe: int) -> dict[str, Any]:
        figures = asdict(
            measure(
                seen(images), train=real["train"], test=real["test"], teacher=other, paired=best
            )
        )
        row = {"method": name, "how": how, "nfe": nfe, **figures}
        rows.append(row)
        print(f"{name:<40}{how:<24}{nfe:>3}{row['fd_teacher']:>10.4f}{row['coverage']:>8.3f}")
        return row

    add("teacher", "heun", best, nfe)
    for budget in BUDGETS:
        grids = {"own grid": teacher.sigmas(budget)}
        if budget > 1:  # one step is the same for all
            grids["even to 0.006"] = rho_grid(budget, 0.006, teacher.sigma_max)
        for solver in options.solvers if budget > 1 else ["euler"]:
            for which, grid in grids.items():
                images, used = draw(teacher, count, SEED, solver=solver, grid=grid)
                add("teacher", f"{solver}, {which}", images, used)
    for name, folder, steps in found:
        if options.only and folder.parent.name not in options.only:
            continue
        images, nfe = draw(load_denoiser(folder), count, SEED, steps=steps)
        add(name, f"{steps} step{'s' * (steps > 1)}", images, nfe)
        run = folder.parent.name if folder.name == "pipeline" else f"{folder.parent.name}, stage"
        pictures[f"{run}\n{nfe} NFE"] = images[:20]
    write(options.out, rows, pictures)


def write(out: Path, rows: list[dict[str, Any]], pictures: dict[str, Tensor]) -> None:
    """The three files."""
    whole = rows[0]
    one_step = next(row for row in rows if row["method"] == "teacher" and row["nfe"] == 1)
    gap = one_step["fd_teacher"]
    lines = [
        "| method | NFE | fd_teacher_digits | of the one-step gap | coverage | label | paired |",
        "|---|---|---|---|---|---|---|",
    ]
    shown = [whole]
    for budget in BUDGETS:
        tried = [r for r in rows if r["method"] == "teacher" and 0 < r["nfe"] <= budget]
        shown.append({**min(tried, key=lambda r: r["fd_teacher"]), "budget": budget})
    shown += [row for row in rows if row["method"] != "teacher"]
    for row in shown:
        how = f" ({row['how']})" if row["method"] == "teacher" else ""
        name = f"{row['method']}{how}" + (f", best of {row['budget']}" if row.get("budget") else "")
        lines.append(
            f"| {name} | {row['nfe']} | {row['fd_teacher']:.4f} | {row['fd_teacher'] / gap:.2%} | "
            f"{row['coverage']:.1%} | {row['label_accuracy']:.1%} | {row['paired_distance']:.3f} |"
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".md").write_text("\n".join(lines) + "\n")
    out.with_suffix(".json").write_text(json.dumps(rows, indent=1) + "\n")
    draw_rows(pictures, out.with_suffix(".png"), 20, "digits from the same noise")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
