"""Callbacks: evaluation, sample grids, stored pairs, export, and a look at a run's health."""

from lit_distill.callbacks.doctor import Finding, RunDoctor
from lit_distill.callbacks.evaluation import Evaluation
from lit_distill.callbacks.export import ExportPipeline
from lit_distill.callbacks.pair_writer import PairWriter
from lit_distill.callbacks.prompt_evaluation import PromptEvaluation
from lit_distill.callbacks.run_cost import RunCost
from lit_distill.callbacks.sample_grid import SampleGrid

__all__ = [
    "Evaluation",
    "ExportPipeline",
    "Finding",
    "PairWriter",
    "PromptEvaluation",
    "RunCost",
    "RunDoctor",
    "SampleGrid",
]
