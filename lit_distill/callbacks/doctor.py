"""A look at the signs that a run of alternating networks goes wrong, with what to try."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lit_distill.diffusion import Condition, Denoiser, sample, seeded_noise, told
from lit_distill.losses import denoising_loss

# Where a sign becomes a finding. They were set on runs on points and digits, see
# docs/training_dmd.md; the healthy runs there stayed within all of them.
LAG = 1.5  # the fake score's loss on fresh samples, over its own best
UNREST = 0.15  # distance that one update moves a sample, over that between two of the data
WINS = 0.95  # share of samples that the discriminator tells right
OUTSIDE = 0.1  # share of numbers beyond the data's range
MARGIN = 0.05  # of that range, which does not count as beyond
ALIKE = 0.5  # spread of the samples, over the data's
CLIPPED = 0.9  # share of updates whose gradient was clipped
GROWN = 20.0  # gradient norm, over its median so far


class Finding(NamedTuple):
    """What a run doctor found.

    Attributes:
        step: Student updates so far.
        sign: The sign's name, as in the log: ``doctor/<sign>``.
        value: Its value.
        advice: A sentence with what to try.
    """

    step: int
    sign: str
    value: float
    advice: str


class RunDoctor(Callback):
    """Watches what the losses of distribution matching and of GANs do not show, and warns.

    Those losses say how two networks stand to each other and not how good the samples are: a run
    may collapse while all of them fall. Every so many student updates the doctor looks at fresh
    samples of the student, from the same noise each time and, where there are any, for the batch's
    prompts, and logs

    - ``doctor/fake_lag``: the fake score's denoising loss on them, over its own best so far; and
      ``doctor/fake_change``, how far its weights moved since the last look, over their norm;
    - ``doctor/outside``: share of their numbers clearly beyond the data's range (saturation);
    - ``doctor/spread``: mean distance between two samples, over that between two of the data;
    - ``doctor/unrest``: mean distance that one update moves a sample, over that between two of
      the data; of a batch of several updates a share of the distance that they move it together;
    - ``doctor/win_rate``: share of samples, real and generated, that a discriminator tells right;
    - ``doctor/clipped`` and ``doctor/gradient``: share of updates with a clipped gradient, and the
      gradient's norm over its median so far.

    A sign whose mean over some looks is beyond its limit is warned of once, until it is not, in a
    sentence with what to try. What a method does not have is left out, and so is what is held
    against the data where there are captions only. Look at the validation's distance to the teacher
    and at the pictures of real and fake denoisings beside it.

    Args:
        every_n_steps: Student updates between two looks; a look follows the first batch that
            reaches a multiple of it, or the one after where batches of several updates vary.
        num_samples: Samples of a look.
        warm_up: Student updates before the first finding; a student starts far from the data.
        patience: Looks whose mean makes a finding.

    Attributes:
        findings: What was found so far.

    Raises:
        ValueError: If a number is too small.
    """

    def __init__(
        self,
        every_n_steps: int = 25,
        num_samples: int = 64,
        warm_up: int = 100,
        patience: int = 3,
    ) -> None:
        if min(every_n_steps, patience) < 1 or num_samples < 2 or warm_up < 0:
            raise ValueError(
                f"RunDoctor cannot work with every_n_steps={every_n_steps}, num_samples="
                f"{num_samples}, warm_up={warm_up}, patience={patience}: it takes at least 1 step, "
                "2 samples, a warm-up of 0 and 1 look."
            )
        self.every_n_steps, self.num_samples = every_n_steps, num_samples
        self.warm_up, self.patience = warm_up, patience
        self.findings: list[Finding] = []
        self._recent: dict[str, list[float]] = {}
        self._named: set[str] = set()  # beyond their limits now
        self._best_fake = float("inf")
        self._norms: list[float] = []
        self._steps: list[dict[str, Tensor]] = []
        self._before: Tensor | None = None
        self._begin, self._updates = 0, 1  # of the batch; its updates are known when it ends
        self._looked = 0  # update of the last look
        self._fake_before: list[Tensor] = []

    # --- Lightning's hooks ----------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """What a run that goes on needs to know."""
        return {
            "findings": [tuple(finding) for finding in self.findings],
            "recent": {name: list(values) for name, values in self._recent.items()},
            "named": sorted(self._named),
            "best_fake": self._best_fake,
            "norms": list(self._norms),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Read what a checkpoint kept."""
        self.findings = [Finding(*finding) for finding in state_dict["findings"]]
        self._recent = {name: list(values) for name, values in state_dict["recent"].items()}
        self._named = set(state_dict["named"])
        self._best_fake = state_dict["best_fake"]
        self._norms = list(state_dict["norms"])

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count the looks from where the training starts or goes on."""
        self._steps, self._before = [], None
        self._looked, self._updates = trainer.global_step, 1

    @torch.no_grad()
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Sample before a batch that is looked at, if it is of as many updates as the last one."""
        self._begin, self._before = trainer.global_step, None
        if self._is_due(self._begin + self._updates):
            self._before = self._samples(cast(Denoiser, pl_module.student), batch)[0]

    @torch.no_grad()
    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Note what was logged; look at samples every so many updates."""
        logged = trainer.callback_metrics
        names = ("grad_norm/student", "discriminator/win_rate")
        self._steps.append({name: logged[name] for name in names if name in logged})
        self._updates = max(1, trainer.global_step - self._begin)
        if self._before is None or not self._is_due(trainer.global_step):
            return
        signs = {**self._from_log(pl_module), **self._from_samples(pl_module, batch)}
        for name, value in signs.items():
            pl_module.log(f"doctor/{name}", value)
        self._judge(trainer, signs)
        self._steps, self._looked = [], trainer.global_step

    def _is_due(self, step: int) -> bool:
        """Whether there is a multiple of the interval between the last look and an update."""
        return step // self.every_n_steps > self._looked // self.every_n_steps

    # --- Signs ----------------------------------------------------------------------------------

    def _from_log(self, module: LightningModule) -> dict[str, float]:
        """Signs in what the method logged since the last look."""
        signs = {}
        wins = [s["discriminator/win_rate"] for s in self._steps if "discriminator/win_rate" in s]
        if wins:
            signs["win_rate"] = float(torch.stack(wins).mean())
        norms = [s["grad_norm/student"] for s in self._steps if "grad_norm/student" in s]
        if norms:
            found = torch.stack(norms)
            clip = getattr(module, "clip", None)
            if clip is not None:
                signs["clipped"] = float((found > clip).float().mean())
            latest = float(found.median())
            if self._norms:
                signs["gradient"] = latest / max(_median(self._norms), 1e-12)
            self._norms.append(latest)
        return signs

    def _from_samples(self, module: LightningModule, batch: dict[str, Tensor]) -> dict[str, float]:
        """Signs in fresh samples of the student, and in what the fake score makes of them."""
        assert self._before is not None
        student = cast(Denoiser, module.student)
        data = batch["image"]
        x, condition = self._samples(student, batch)
        signs: dict[str, float] = {}
        width = max(_spread(data), 1e-12)
        if math.isfinite(width):  # captions alone come with images of NaN
            low, high = data.amin(), data.amax()
            margin = MARGIN * (high - low)  # many pixels of many images are black or white
            moved = float((x - self._before).flatten(1).float().norm(dim=1).mean())
            signs = {
                "outside": float(((x < low - margin) | (x > high + margin)).float().mean()),
                "spread": _spread(x) / width,
                "unrest": moved / self._updates / width,
            }
        fake = getattr(module, "fake_score", None)
        if fake is not None:
            last = torch.full((len(x),), _steps_of(student) - 1, device=x.device)
            loss = self._fake_loss(fake, x, told(fake, condition, step=last))
            self._best_fake = min(self._best_fake, loss)
            signs["fake_lag"] = loss / max(self._best_fake, 1e-12)
            weights = _weights(fake)
            if self._fake_before:
                signs["fake_change"] = _change(self._fake_before, weights)
            self._fake_before = weights
        return signs

    def _samples(self, student: Denoiser, batch: dict[str, Tensor]) -> tuple[Tensor, Condition]:
        """Samples of the weights in training, and what they are conditional on."""
        data = batch["image"]
        noise = seeded_noise(data.shape[1:], range(self.num_samples)).to(data)
        numbers = torch.arange(self.num_samples, device=data.device)
        condition: Condition = None
        if "prompt_embeds" in batch:
            prompts = batch["prompt_embeds"]
            condition = {"prompt_embeds": prompts[numbers % len(prompts)]}
        elif student.num_classes is not None:
            condition = numbers % student.num_classes
        x = sample(
            student,
            noise,
            steps=_steps_of(student),
            condition=condition,
            generator=torch.Generator(data.device).manual_seed(0),
        )
        return x, condition

    def _fake_loss(self, fake: Denoiser, x: Tensor, condition: Condition) -> float:
        """Its denoising loss at levels over its whole range, with the same noise each time."""
        u = torch.linspace(0.05, 0.95, len(x), device=x.device)
        noise = seeded_noise(x.shape[1:], range(10_000, 10_000 + len(x))).to(x)
        return float(denoising_loss(fake, x, fake.schedule(u), noise, condition).mean())

    # --- Findings -------------------------------------------------------------------------------

    def _judge(self, trainer: Trainer, signs: dict[str, float]) -> None:
        """Warn of what is beyond its limit, once."""
        if trainer.global_step < self.warm_up:
            return
        for name, (beyond, sentence) in _LIMITS.items():
            if name not in signs:
                continue
            recent = [*self._recent.get(name, []), signs[name]][-self.patience :]
            self._recent[name] = recent
            value = sum(recent) / len(recent)
            if len(recent) < self.patience or not beyond(value):
                self._named.discard(name)
                continue
            if name not in self._named:
                self._named.add(name)
                advice = sentence.format(value=value)
                self._warn(trainer, Finding(trainer.global_step, name, value, advice))

    def _warn(self, trainer: Trainer, finding: Finding) -> None:
        self.findings.append(finding)
        rank_zero_warn(f"Run doctor, update {finding.step}: {finding.advice}")
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger) and trainer.is_global_zero:
                logger.experiment.add_text("doctor", finding.advice, finding.step)


Limit = tuple[Callable[[float], bool], str]
_LIMITS: dict[str, Limit] = {
    "fake_change": (
        lambda value: value == 0,
        "the fake score does not change at all, so that the student is pushed away from where it "
        "was once. Look at fake_optimizer: its learning rate is 0, or has fallen to 0 before the "
        "student's.",
    ),
    "fake_lag": (
        lambda value: value > LAG,
        "the fake score lags behind the student: its loss on fresh samples is {value:.1f} times "
        "its best. Raise update_ratio or the learning rate of fake_optimizer, or lower the "
        "student's.",
    ),
    "unrest": (
        lambda value: value > UNREST,
        "one update moves the student's samples by {value:.0%} of the distance between two images: "
        "the learning rate is too high. Lower it (by 10 at first), and give it a warm-up.",
    ),
    "win_rate": (
        lambda value: value > WINS,
        "the discriminator is too strong: it tells {value:.0%} of all samples right, so that its "
        "gradient says nothing. Lower discriminator_weight or its learning rate, set r1_weight, "
        "or let it look at noisier samples.",
    ),
    "outside": (
        lambda value: value > OUTSIDE,
        "{value:.0%} of the numbers in the student's samples are beyond the data's range: it "
        "saturates. Lower the learning rate or the guidance, or raise regression_weight.",
    ),
    "spread": (
        lambda value: value < ALIKE,
        "the student's samples have {value:.0%} of the spread of the data: they become alike. "
        "Raise regression_weight or update_ratio, lower the guidance or adversarial_weight.",
    ),
    "clipped": (
        lambda value: value > CLIPPED,
        "{value:.0%} of the student's gradients are clipped, so that the clip and not the loss "
        "sets the step. Raise clip, or lower the weights of the losses.",
    ),
    "gradient": (
        lambda value: value > GROWN,
        "the student's gradient is {value:.0f} times its median so far: the run diverges. Go back "
        "to an earlier checkpoint with a lower learning rate.",
    ),
}


def _weights(module: nn.Module) -> list[Tensor]:
    """A copy of what is trained."""
    return [p.detach().clone() for p in module.parameters() if p.requires_grad]


def _change(before: list[Tensor], after: list[Tensor]) -> float:
    """Norm of the difference over that of the weights."""
    difference = torch.stack([(a - b).norm() for a, b in zip(after, before, strict=True)]).norm()
    return float(difference / torch.stack([b.norm() for b in before]).norm().clamp_min(1e-12))


def _steps_of(student: Denoiser) -> int:
    return 1 if student.few_steps is None else student.few_steps.trained[0]


def _spread(x: Tensor) -> float:
    """Mean distance between two samples."""
    return float(torch.pdist(x.flatten(1).float()).mean())


def _median(values: list[float]) -> float:
    return float(torch.tensor(values).median())
