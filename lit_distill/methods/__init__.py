"""Methods: one file each."""

from lit_distill.methods.alternating import AlternatingDistillationModule
from lit_distill.methods.base import DistillationModule
from lit_distill.methods.dmd import DMD
from lit_distill.methods.teacher import DiffusionTeacher

__all__ = ["DMD", "AlternatingDistillationModule", "DiffusionTeacher", "DistillationModule"]
