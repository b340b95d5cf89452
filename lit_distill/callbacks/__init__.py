"""Callbacks: evaluation, sample grids, stored pairs and export."""

from lit_distill.callbacks.evaluation import Evaluation
from lit_distill.callbacks.export import ExportPipeline
from lit_distill.callbacks.pair_writer import PairWriter
from lit_distill.callbacks.sample_grid import SampleGrid

__all__ = ["Evaluation", "ExportPipeline", "PairWriter", "SampleGrid"]
