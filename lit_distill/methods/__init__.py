"""Methods: one file each."""

from lit_distill.methods.adversarial import AdversarialDistillation
from lit_distill.methods.alternating import AlternatingDistillationModule
from lit_distill.methods.autoencoder import Autoencoder
from lit_distill.methods.base import DistillationModule
from lit_distill.methods.consistency import ConsistencyDistillation
from lit_distill.methods.consistency_training import ConsistencyTraining
from lit_distill.methods.ctm import ConsistencyTrajectory
from lit_distill.methods.dmd import DMD
from lit_distill.methods.dmd2 import DMD2
from lit_distill.methods.flow_distillation import FlowDistillation
from lit_distill.methods.knowledge import KnowledgeDistillation
from lit_distill.methods.latent_consistency import LatentConsistencyDistillation
from lit_distill.methods.mean_flow import MeanFlow
from lit_distill.methods.multi_boundary import MultiBoundaryConsistencyDistillation
from lit_distill.methods.progressive import ProgressiveDistillation
from lit_distill.methods.rectified_flow import RectifiedFlow, Reflow
from lit_distill.methods.sfd import SFD
from lit_distill.methods.sid import SiD
from lit_distill.methods.teacher import DiffusionTeacher
from lit_distill.methods.trajectory import TrajectoryDistillation

__all__ = [
    "DMD",
    "DMD2",
    "SFD",
    "AdversarialDistillation",
    "AlternatingDistillationModule",
    "Autoencoder",
    "ConsistencyDistillation",
    "ConsistencyTraining",
    "ConsistencyTrajectory",
    "DiffusionTeacher",
    "DistillationModule",
    "FlowDistillation",
    "KnowledgeDistillation",
    "LatentConsistencyDistillation",
    "MeanFlow",
    "MultiBoundaryConsistencyDistillation",
    "ProgressiveDistillation",
    "RectifiedFlow",
    "Reflow",
    "SiD",
    "TrajectoryDistillation",
]
