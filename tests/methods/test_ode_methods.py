"""What the ODE-based methods have to hold exactly, on a tiny network."""

import copy
from itertools import pairwise

import pytest
import safetensors.torch
import torch
from tiny import CD, CTM, SFD_2, Digits, adam, denoiser, module, trainer
from torch import nn

from lit_distill.callbacks import PairWriter
from lit_distill.datamodules import DigitsDataModule, PairsDataModule
from lit_distill.diffusion import (
    EDMDenoiser,
    EpsilonDenoiser,
    EvaluationCounter,
    FlowDenoiser,
    VelocityDenoiser,
    jump,
    sample,
    seeded_noise,
)
from lit_distill.losses import L2
from lit_distill.methods import (
    SFD,
    ConsistencyDistillation,
    ConsistencyTraining,
    ConsistencyTrajectory,
    KnowledgeDistillation,
    MultiBoundaryConsistencyDistillation,
    ProgressiveDistillation,
    TrajectoryDistillation,
)
from lit_distill.methods.consistency import random_state, same_randomness

LABEL = torch.arange(16) % 10


def frozen(parameters):
    """An optimizer that changes nothing."""
    return torch.optim.SGD(parameters, lr=0.0)


def batch():
    noise = seeded_noise((1, 8, 8), range(16))
    image = torch.rand(16, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return {"image": image, "noise": noise, "label": LABEL}


def loss_of(student, seed=0):
    """The loss of one step on that batch, without a trainer."""
    student.log = lambda *args, **kwargs: None
    torch.manual_seed(seed)
    return student.training_step(batch(), 0)


def run(tmp_path, student, data=None, steps=1, **options):
    made = trainer(tmp_path, max_steps=steps, **options)
    made.fit(student, data or Digits())
    return made


def metrics(tmp_path, student, **options):
    return {k: float(v) for k, v in run(tmp_path, student, **options).callback_metrics.items()}


EACH = [
    (KnowledgeDistillation, {"online": True, "teacher_steps": 2}),
    (ProgressiveDistillation, {"teacher_steps": 8, "steps": 2, "updates": [1, 2]}),
    (TrajectoryDistillation, {"steps": 2, "teacher_substeps": 2}),
    (SFD, SFD_2),
    (SFD, {"steps": [3, 2], "analytical_first_step": True}),
    (ConsistencyTrajectory, CTM),
]


@pytest.mark.parametrize("denoiser_kind", [EpsilonDenoiser, VelocityDenoiser, FlowDenoiser])
@pytest.mark.parametrize(("kind", "options"), EACH)
def test_any_kind_of_denoiser_is_distilled(denoiser_kind, kind, options, tmp_path):
    plain = {} if kind is ProgressiveDistillation else {"distance": "l2"}
    student = kind(denoiser_kind(denoiser().network), **plain, **options, optimizer=adam)
    before = student.generate(batch()["noise"], LABEL)
    made = run(tmp_path, student, steps=3)
    assert all(value.isfinite() for value in made.callback_metrics.values())
    after = student.generate(batch()["noise"], LABEL)
    assert before.isfinite().all() and after.isfinite().all() and not torch.equal(before, after)


# --- Knowledge distillation ----------------------------------------------------------------------


def test_online_equals_stored_pairs_of_the_same_noise(monkeypatch):
    teacher, data = denoiser(), batch()
    stored = sample(teacher, data["noise"], steps=3, condition=LABEL)
    options = {"distance": "l2", "student": denoiser(1)}
    offline = KnowledgeDistillation(teacher, **options)
    online = KnowledgeDistillation(teacher, **options, online=True, teacher_steps=3)
    for student in (offline, online):
        student.log = lambda *args, **kwargs: None
    monkeypatch.setattr(torch, "randn_like", lambda image: data["noise"])
    expected = offline.training_step({**data, "image": stored}, 0)
    assert expected > 0 and torch.equal(online.training_step(data, 0), expected)


def test_the_second_stage_samples_its_teacher_as_that_was_trained():
    first = module(SFD, steps=3, analytical_first_step=True)
    second = KnowledgeDistillation(first.network, "l2", online=True, teacher_steps=3)
    torch.manual_seed(0)
    with EvaluationCounter(second.teacher) as counter:
        noise, target = second.online_pair(batch())
    assert counter.calls == 3
    assert torch.equal(target, first.generate(noise, LABEL, 3))


# --- Progressive distillation --------------------------------------------------------------------


def test_the_targets_one_jump_lands_where_the_two_do():
    student = module(ProgressiveDistillation, teacher_steps=8, steps=1, updates=5)
    x = 5 * torch.randn(6, 1, 8, 8, dtype=torch.float64)
    levels = student.levels[[0, 2, 4, 6, 6, 6]], student.levels[[1, 3, 5, 7, 7, 7]]
    start, middle = levels
    end = torch.cat([student.levels[[2, 4, 6]], torch.zeros(3, dtype=torch.float64)])
    x0 = student.two_jumps(x, start, middle, end, LABEL[:6])
    halfway = jump(x, student.teacher(x, start, LABEL[:6]), start, middle)
    there = jump(halfway, student.teacher(halfway, middle, LABEL[:6]), middle, end)
    torch.testing.assert_close(jump(x, x0, start, end), there, rtol=1e-12, atol=1e-12)
    assert torch.equal(x0[3:], there[3:])  # at 0 it is the end itself


def test_stages_sample_on_the_teachers_own_levels():
    student = module(ProgressiveDistillation, teacher_steps=8, steps=1, updates=[2, 2, 2])
    own = denoiser().sigmas(8)
    for stage, steps in enumerate([4, 2, 1]):
        student.enter(stage)
        assert student.steps == steps
        for model in (student.student, student.network):
            assert torch.equal(model.grid(steps), own[:: 8 // steps])


def test_each_stage_begins_as_the_last_one_ended(tmp_path):
    """Student, average and teacher are then the same, and all three move on from there."""
    stages = []

    class Staged(ProgressiveDistillation):
        def promote(self):
            before = self.network.fingerprint()
            super().promote()
            parts = (self.student, self.network, self.previous)
            weights = [{k: v.clone() for k, v in part.state_dict().items()} for part in parts]
            stages.append(self.trainer.global_step)
            for name, value in weights[0].items():
                assert torch.equal(value, weights[1][name]), name
                assert torch.equal(value, weights[2][name]), name
            self.few = self.network.few_steps
            assert before != self.student.fingerprint()  # only as its levels are others
            assert self.stage_teacher is self.previous
            assert not self.trainer.optimizers[0].state
            assert self.trainer.optimizers[0].param_groups[0]["lr"] == 1e-2

    student = Staged(denoiser(), 8, 1, [2, 3, 4], optimizer=adam)
    made = run(tmp_path, student, steps=100)
    assert stages == [2, 5] and made.global_step == 9  # the end of the last stage stops it
    assert made.optimizers[0].param_groups[0]["lr"] == 0  # fell linearly
    assert student.teacher_evaluations == 9 * 16 * 2


# --- Trajectory distillation ---------------------------------------------------------------------


def test_one_euler_step_of_the_teacher_is_the_students_own():
    options = {"teacher_substeps": 1, "teacher_solver": "euler"}
    for to_zero in (False, True):
        student = module(TrajectoryDistillation, steps=3, to_zero=to_zero, **options)
        assert loss_of(student) == 0
        end = 0.0 if to_zero else 0.006
        assert float(student.network.grid(3)[-1]) == pytest.approx(end, rel=1e-12)
    assert loss_of(module(TrajectoryDistillation, steps=3, teacher_substeps=2)) > 0


# --- SFD -----------------------------------------------------------------------------------------


def test_a_student_that_is_the_teacher_has_no_loss(tmp_path):
    options = {"steps": 3, "teacher_substeps": 1, "teacher_solver": "euler", "optimizer": frozen}
    losses = metrics(tmp_path, module(SFD, **options))
    assert [losses[f"loss/node_{i}"] for i in (1, 2, 3)] == [0, 0, 0]
    several = module(SFD, **{**options, "steps": [3, 2]})
    assert metrics(tmp_path, several)["loss/node_2"] == 0
    finer = metrics(tmp_path, module(SFD, **{**options, "teacher_substeps": 2}))
    assert min(finer[f"loss/node_{i}"] for i in (1, 2, 3)) > 0


def test_the_analytical_first_step_is_the_same_on_both_sides_and_free(tmp_path):
    options = {"steps": 2, "teacher_substeps": 1, "teacher_solver": "euler", "optimizer": frozen}
    student = module(SFD, **options, analytical_first_step=True)
    with EvaluationCounter(student.student) as counter:
        losses = metrics(tmp_path, student, steps=2)
    assert counter.calls == 2 and student.teacher_evaluations == 2 * 16  # three jumps each
    # No node_1: that jump has no update.
    names = {name: value for name, value in losses.items() if name.startswith("loss")}
    assert names == {"loss/node_2": 0, "loss/node_3": 0}
    noise = batch()["noise"]
    with EvaluationCounter(student.network) as counter:
        image = student.generate(noise, LABEL)
    assert counter.calls == 2
    grid = student.student.grid(2)
    assert len(grid) == 4
    assert torch.equal(student.teacher_nodes(noise, grid, LABEL)[:, -1], image)
    finer = module(SFD, **{**options, "teacher_substeps": 3}, analytical_first_step=True)
    with EvaluationCounter(finer.teacher) as counter:
        finer.teacher_nodes(noise, grid, LABEL)
    assert counter.calls == 3 * 3 - 1


def test_each_node_starts_from_the_point_before_the_update(tmp_path):
    """And the teacher's nodes are those of its own fine grid."""
    student, seen = module(SFD, steps=3, teacher_substeps=2), []
    student.student.register_forward_hook(
        lambda _, args, x0: seen.append((args[0].detach(), args[1], x0.detach()))
    )
    run(tmp_path, student)
    grid = student.student.grid(3)
    (x, _, _), *_ = seen
    assert torch.equal(x, 80.0 * seeded_noise((1, 8, 8), range(16)))
    for (x, sigma, x0), (after, to_sigma, _) in pairwise(seen):
        assert torch.equal(after, jump(x, x0, sigma, to_sigma))
    assert torch.equal(torch.stack([sigma[0] for _, sigma, _ in seen]), grid[:3])


def test_all_updates_of_a_batch_have_their_rate(tmp_path):
    rates = []

    class Watched(SFD):
        def on_before_optimizer_step(self, optimizer):
            rates.append(optimizer.param_groups[0]["lr"])

    def falling(optimizer):
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))

    student = Watched(denoiser(), 2, "l1", 2, optimizer=adam, lr_scheduler=falling)
    assert run(tmp_path, student, steps=5).global_step == 6
    assert rates == pytest.approx([1e-2 / (1 + step) for step in range(6)])


def test_a_schedule_of_max_steps_survives_the_last_batch(tmp_path):
    """OneCycleLR refuses more steps than it was told."""

    def cycle(optimizer):
        return torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=5)

    assert run(tmp_path, module(SFD, **SFD_2, lr_scheduler=cycle), steps=5).global_step == 6


def test_stored_trajectories_train_as_those_made_in_the_step(tmp_path):
    folder = tmp_path / "trajectories"
    digits = DigitsDataModule(predict_samples=32, predict_batch_size=8)
    trainer(tmp_path, PairWriter(str(folder))).predict(module(SFD, **SFD_2), digits)
    pairs = safetensors.torch.load_file(folder / "shard-00000.safetensors")
    assert pairs["trajectory"].shape == (8, 3, 1, 8, 8)
    assert torch.equal(pairs["trajectory"][:, 0], 80.0 * pairs["noise"])
    assert torch.equal(pairs["trajectory"][:, -1], pairs["image"])

    class WithoutTrajectories(PairsDataModule):
        trajectory = None

        def on_after_batch_transfer(self, batch, _):
            return {name: value for name, value in batch.items() if name != "trajectory"}

    trained = []
    for kind in (PairsDataModule, WithoutTrajectories):
        # As large as a shard, since bits depend on what is computed together.
        data = kind(DigitsDataModule(), str(folder), batch_size=8)
        trained.append(module(SFD, **SFD_2))
        run(tmp_path, trained[-1], data, steps=8)
    stored, solved = trained
    assert stored.teacher_evaluations == 0
    assert solved.teacher_evaluations == 4 * 8 * 4  # 4 batches of 8, 4 jumps
    for name, value in stored.student.state_dict().items():
        # The shards and the shuffled batches hold other samples together.
        torch.testing.assert_close(value, solved.student.state_dict()[name], rtol=1e-4, atol=1e-4)


def test_a_network_that_takes_the_number_of_steps_starts_as_the_teacher():
    student, data = module(SFD, steps=[4, 2]), batch()
    told = {"label": LABEL, "steps": torch.full((16,), 4)}
    sigma = torch.full((16,), 3.0)
    ours, theirs = student.student(data["image"], sigma, told), student.teacher
    assert torch.equal(ours, theirs(data["image"], sigma, LABEL))


# --- Consistency models --------------------------------------------------------------------------


def test_one_boundary_is_consistency_distillation(tmp_path):
    options = {**CD, "num_nodes": 18}
    one = module(MultiBoundaryConsistencyDistillation, **options, boundaries=1)
    plain = module(ConsistencyDistillation, **options)
    assert torch.equal(loss_of(one), loss_of(plain))
    for student in (one, plain):
        run(tmp_path, student, steps=3)
    ours, theirs = one.state_dict(), plain.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


@pytest.mark.parametrize("boundaries", [2, 3, 5])
def test_every_node_jumps_to_the_boundary_below_it(boundaries):
    student = module(MultiBoundaryConsistencyDistillation, **CD, boundaries=boundaries)
    grid = student.network.grid(boundaries)
    assert len(grid) == boundaries + 1 and grid[0] == 80 and grid[-1] == 0
    assert set(grid[:-1].tolist()) <= set(student.nodes.tolist())
    for node, end in zip(student.nodes[:-1], student.ends, strict=True):
        assert end == max(level for level in grid if level < node)


def test_named_boundaries_are_snapped_to_nodes():
    nodes = module(ConsistencyDistillation, **CD).nodes.tolist()
    boundaries = [round(nodes[2], 2), 0.0]
    student = module(MultiBoundaryConsistencyDistillation, **CD, boundaries=boundaries)
    assert student.network.grid(2).tolist() == [80.0, nodes[2], 0.0]


def test_a_point_on_its_boundary_is_the_target_itself(monkeypatch):
    """With a boundary at each node no judge is asked for anything but the lowest level."""
    student = module(MultiBoundaryConsistencyDistillation, **CD, boundaries=5)
    seen = []
    monkeypatch.setattr(student, "distance", Recording(seen))
    loss_of(student)
    ((_, target),) = seen
    torch.manual_seed(0)
    node = torch.randint(5, (16,))
    sigma, below = student.nodes[node], student.nodes[node + 1]
    x = batch()["image"] + sigma.view(-1, 1, 1, 1).float() * torch.randn(16, 1, 8, 8)
    x0 = student.teacher(x, sigma, LABEL)
    ahead = jump(x, x0, sigma, below)
    slope = (x - x0) / sigma.view(-1, 1, 1, 1) / 2
    slope = slope + (ahead - student.teacher(ahead, below, LABEL)) / below.view(-1, 1, 1, 1) / 2
    expected = x + (below - sigma).view(-1, 1, 1, 1) * slope
    torch.testing.assert_close(target, expected.float(), rtol=1e-4, atol=1e-4)


class Recording(L2):
    def __init__(self, seen):
        super().__init__()
        self.seen = seen

    def forward(self, x, target):
        self.seen.append((x.detach(), target))
        return super().forward(x, target)


class Dropping(nn.Module):
    """Keeps what it drops in training."""

    image_shape, num_classes, null_label = (1, 8, 8), 10, None

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.dropout = nn.Dropout(0.5)
        self.masks = []

    def forward(self, x, time, condition):
        kept = self.dropout(torch.ones_like(x))
        if self.training:
            self.masks.append(kept)
        return self.scale * x * kept


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (ConsistencyDistillation, {}),
        (ConsistencyDistillation, {"target": "ema"}),
        (MultiBoundaryConsistencyDistillation, {"boundaries": 2}),
        (ConsistencyTraining, {}),
    ],
)
def test_both_sides_drop_the_same_units(kind, options, tmp_path):
    student = kind(EDMDenoiser(Dropping()), distance="l2", **options)
    run(tmp_path, student, steps=2)
    masks = list(student.student.network.masks)
    if getattr(student, "average", None) is not None:
        judged = student.average.module.network.masks
        masks = [mask for both in zip(masks, judged, strict=True) for mask in both]
    assert len(masks) == 4
    assert torch.equal(masks[0], masks[1]) and torch.equal(masks[2], masks[3])
    assert not torch.equal(masks[0], masks[2])
    assert not torch.equal(masks[0], torch.full_like(masks[0], 1))


def test_the_same_randomness_leaves_the_state_as_it_was():
    device = torch.device("cpu")
    torch.manual_seed(3)
    state = random_state(device)
    first = torch.rand(4)
    after = torch.get_rng_state()
    with same_randomness(state, device):
        assert torch.equal(torch.rand(4), first)
        torch.rand(100)
    assert torch.equal(torch.get_rng_state(), after)


def test_the_smallest_node_is_the_boundary_condition():
    student = module(ConsistencyDistillation, **CD)
    x, sigma = torch.randn(4, 1, 8, 8), torch.full((4,), 0.002, dtype=torch.float64)
    assert torch.equal(student.student(x, sigma, LABEL[:4]), x)
    assert float(student.nodes[-1]) == pytest.approx(0.002, rel=1e-12)


def test_levels_of_consistency_training_come_closer(monkeypatch):
    student = module(ConsistencyTraining, q=4.0, stage_updates=10)
    sigma = torch.tensor([0.0021, 0.05, 1.0, 3.0, 80.0], dtype=torch.float64)
    lower = {}
    for stage in (0, 1, 5):
        monkeypatch.setattr(ConsistencyTraining, "stage", stage)
        lower[stage] = student.lower_level(sigma)
    # By hand: r = t (1 - 4^-(stage + 1) (1 + 8 / (1 + e^t))), with 8 / (1 + e) = 2.1515
    assert lower[0][2] == pytest.approx(1 - (1 + 2.1515) / 4, abs=1e-4)
    assert lower[1][2] == pytest.approx(1 - (1 + 2.1515) / 16, abs=1e-4)
    assert lower[0][4] == pytest.approx(80 * 0.75)
    assert lower[1][4] == pytest.approx(80 * 15 / 16)
    assert lower[0][:2].tolist() == [0.002, 0.002]  # below 0 by the formula
    assert lower[1][0] == 0.002 and 0.002 < lower[1][1] < 0.05
    assert (lower[0] <= lower[1]).all() and (lower[1] <= lower[5]).all()
    assert (lower[5] < sigma).all()


def test_stages_of_consistency_training_follow_the_updates(tmp_path):
    numbers = []

    class Watched(ConsistencyTraining):
        def on_train_batch_end(self, *args):
            super().on_train_batch_end(*args)
            numbers.append(float(self.trainer.callback_metrics["stage/number"]))

    run(tmp_path, Watched(denoiser(), stage_updates=2), steps=5)
    assert numbers == [0, 0, 1, 1, 2]


# --- Consistency trajectory models ---------------------------------------------------------------


def test_a_jump_of_no_length_goes_nowhere():
    student = module(ConsistencyTrajectory, **CTM)
    for level in (0.002, 1.0, 80.0):
        x = level * torch.randn(16, 1, 8, 8)
        sigma = torch.full((16,), level, dtype=torch.float64)
        y = student.go(student.student, x, sigma, sigma, LABEL)
        torch.testing.assert_close(y, x, rtol=1e-5, atol=1e-5 * level)


def test_a_trajectory_student_starts_as_the_teacher_for_any_target():
    student, x = module(ConsistencyTrajectory, **CTM), torch.randn(16, 1, 8, 8)
    sigma, to_sigma = torch.full((16,), 3.0), torch.full((16,), 0.5)
    y = student.go(student.student, x, sigma, to_sigma, LABEL)
    assert torch.equal(y, jump(x, student.teacher(x, sigma, LABEL), sigma, to_sigma))


def test_nodes_of_a_trajectory_descend(monkeypatch):
    """``t > u >= s``, ``u`` at most the drawn number of steps below, and every start is drawn."""
    student, jumps = module(ConsistencyTrajectory, num_nodes=5, max_teacher_steps=2), []
    go = student.go
    monkeypatch.setattr(
        student, "go", lambda m, x, t, s, c: jumps.append((t, s)) or go(m, x, t, s, c)
    )
    monkeypatch.setattr(student, "drawn_for_all", lambda count: count - 1)
    torch.manual_seed(0)
    nodes, starts = student.nodes.tolist(), set()
    for _ in range(8):
        student.consistency(batch()["image"], LABEL)
        (t, s), (u, target), *ends = jumps
        jumps.clear()
        assert torch.equal(s, target) and (t > u).all() and (u >= s).all()
        at = [[nodes.index(level) for level in levels.tolist()] for levels in (t, u, s)]
        starts |= {(start, end) for start, _, end in zip(*at, strict=True)}
        for start, middle, end in zip(*at, strict=True):
            assert middle == min(start + 2, end)
        for sigma, end in ends:
            assert torch.equal(sigma, s) and (end == nodes[-1]).all()
    assert starts == {(i, j) for i in range(4) for j in range(i + 1, 5)}


def test_the_gradient_flows_through_the_frozen_average(tmp_path):
    student = module(ConsistencyTrajectory, **CTM, denoising_weight=0.0)
    before = copy.deepcopy(student.average.state_dict())
    torch.manual_seed(0)
    monkey = student.drawn_for_all
    student.drawn_for_all = lambda count: 0
    student.consistency(batch()["image"], LABEL).mean().backward()
    student.drawn_for_all = monkey
    assert all(p.grad is None for p in student.average.parameters())
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in student.student.parameters())
    assert all(torch.equal(v, before[k]) for k, v in student.average.state_dict().items())


@pytest.mark.parametrize("inner_target", ["stop_gradient", "ema"])
def test_who_jumps_from_the_lower_point(inner_target, monkeypatch):
    student, asked = module(ConsistencyTrajectory, **CTM, inner_target=inner_target), []
    go = student.go
    monkeypatch.setattr(student, "go", lambda m, *args: asked.append(m) or go(m, *args))
    monkeypatch.setattr(student, "drawn_for_all", lambda count: 0)
    student.consistency(batch()["image"], LABEL)
    average = student.average.module
    judge = average if inner_target == "ema" else student.student
    assert [
        m is other
        for m, other in zip(asked, [student.student, judge, average, average], strict=True)
    ] == [True] * 4
