"""What holds for every method: one row in ``tiny.METHODS`` each."""

import copy
import csv

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from tiny import METHODS, Digits, Disturb, every_method, trainer

from lit_distill.methods import AlternatingDistillationModule


def weights(module):
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def differing(before, after):
    return {name for name in before if not torch.equal(before[name], after[name])}


@every_method
def test_the_teacher_stays_bit_identical_and_all_else_moves(row, tmp_path):
    module = row.make(lr_scheduler=lambda o: torch.optim.lr_scheduler.ConstantLR(o, 1.0))
    before = weights(module)
    trainer(tmp_path, max_steps=4).fit(module, Digits())
    moved = differing(before, weights(module))
    trained = {trained.name for trained in module.trained_modules()}
    assert {name.split(".")[0] for name in moved} == trained | {"ema", *row.follows}
    for name in trained:
        parameters = {f"{name}.{p}" for p, _ in getattr(module, name).named_parameters()}
        assert parameters and parameters <= moved


@every_method
def test_a_loss_has_a_gradient_in_its_own_network_only(row, tmp_path, monkeypatch):
    module = row.make(accumulate=2) if _alternates(row) else row.make()
    seen, backward = [], module.backward

    def watched(loss, *args, **kwargs):
        module.zero_grad(set_to_none=True)
        backward(loss, *args, **kwargs)
        named = module.named_parameters()
        seen.append({_owner(row, name) for name, p in named if p.grad is not None})

    monkeypatch.setattr(module, "backward", watched)
    trainer(tmp_path, max_steps=2).fit(module, Digits())
    names = [trained.name for trained in module.trained_modules()]
    assert all(len(networks) == 1 for networks in seen)
    first = [next(iter(networks)) for networks in seen]
    assert set(first) == set(names) and first[0] == "student"
    for name in names:
        for parameter in getattr(module, name).parameters():
            assert parameter.requires_grad


class Steps(Callback):
    """Notes each optimizer step of each network, and the average's weights after it."""

    def __init__(self):
        self.names, self.students, self.averages = [], [], []
        self.rates = []

    def setup(self, trainer, module, stage):
        """Watch all optimizers, also those that a later stage makes."""
        make = module.configure_optimizers

        def watched():
            optimizers, schedulers = make()
            for trained, optimizer in zip(module.trained_modules(), optimizers, strict=True):
                optimizer.register_step_pre_hook(
                    lambda o, *_, n=trained.name: self.rates.append((n, o.param_groups[0]["lr"]))
                )
                optimizer.register_step_post_hook(lambda *_, n=trained.name: self._note(module, n))
            return optimizers, schedulers

        module.configure_optimizers = watched

    def on_train_batch_end(self, trainer, module, *args):
        self._note(module, "batch")

    def _note(self, module, name):
        self.names.append(name)
        self.students.append(next(module.student.parameters()).detach().clone())
        self.averages.append(next(module.ema.module.parameters()).detach().clone())

    def count(self, name):
        return self.names.count(name)


@every_method
def test_the_average_follows_the_student_and_nothing_else(row, tmp_path):
    module = row.make(ema_decay=0.2)
    steps, data = Steps(), Digits()
    # Automatic optimization: two batches a step. Alternating: other networks step in between.
    options = {} if _alternates(row) else {"accumulate_grad_batches": 2}
    average = next(module.ema.module.parameters()).detach().clone()
    trainer(tmp_path, steps, max_steps=5, **options).fit(module, data)
    expected, updates = row.after(5)[-1], 0
    for i, name in enumerate(steps.names):
        # The average moves after the optimizer's step, so that its own hook still sees the last.
        torch.testing.assert_close(steps.averages[i], average, rtol=1e-6, atol=1e-7)
        if name == "student":
            student, n = steps.students[i], row.age(updates)
            decay = min(0.2, (1 + n) / (10 + n)) if n > 0 else 0.0  # warm-up: 2/11 first
            average = decay * average + (1 - decay) * student
            updates += 1
    assert updates == expected
    assert not torch.equal(steps.averages[-1], steps.students[-1])
    assert int(module.ema.n_averaged) == expected - max([0, *row.renewed])


@pytest.mark.parametrize("name", ["kd", "pd", "dmd"])
def test_without_warm_up_the_average_starts_as_the_given_student(name, tmp_path):
    row = METHODS[name]
    module = row.make(ema_decay=0.7, ema_warmup=False, further_ema_decays=[0.5])
    steps = Steps()
    trainer(tmp_path, steps, max_steps=5).fit(module, Digits())
    start = next(row.make().student.parameters()).detach()
    ema, further = start.clone(), start.clone()
    students = [s for s, n in zip(steps.students, steps.names, strict=True) if n == "student"]
    for update, student in enumerate(students):
        if update in row.renewed:  # a new stage, from the average of the one before
            further = ema.clone()
        ema = 0.7 * ema + 0.3 * student
        further = 0.5 * further + 0.5 * student
    for average, expected in zip(module.averages, (ema, further), strict=True):
        found = next(average.module.parameters()).detach()
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)
    assert not torch.equal(ema, start)


@every_method
def test_global_steps_checkpoints_and_logs_count_student_updates(row, tmp_path):
    steps, module = Steps(), row.make()
    saver = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=4, save_top_k=-1)
    logger = CSVLogger(tmp_path, name="", version="")
    options = {"enable_checkpointing": True, "logger": logger, "log_every_n_steps": 2}
    run = trainer(tmp_path, steps, saver, max_steps=10, **options)
    run.fit(module, Digits())
    after = row.after(10)  # each batch
    assert run.global_step == steps.count("student") == after[-1]
    assert steps.count("batch") == len(after)
    ratio = getattr(module, "update_ratio", 1)
    others = {trained.name for trained in module.trained_modules()} - {"student"}
    assert all(steps.count(name) == after[-1] * ratio for name in others)
    saved = {f"step={step}.ckpt" for step in after if step % 4 == 0}
    assert saved and {path.name for path in tmp_path.glob("*.ckpt")} == saved
    with (tmp_path / "metrics.csv").open() as file:
        logged = [int(line["step"]) for line in csv.DictReader(file)]
    # Lightning counts from 0 where a batch is a step.
    assert logged == [step - (row.updates == (1,)) for step in after[1::2]]


@every_method
def test_schedules_count_student_updates(row, tmp_path, recwarn):
    def schedule(optimizer):
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)

    steps, module = Steps(), row.make(lr_scheduler=schedule)
    trainer(tmp_path, steps, max_steps=4).fit(module, Digits())
    ratio, updates = getattr(module, "update_ratio", 1), row.after(4)[-1]
    for trained in module.trained_modules():
        repeats = 1 if trained.name == "student" else ratio
        expected = [1e-2 * 0.5 ** row.age(i) for i in range(updates) for _ in range(repeats)]
        assert [rate for name, rate in steps.rates if name == trained.name] == expected
    assert not [w for w in recwarn if "lr_scheduler.step()" in str(w.message)]


@every_method
def test_a_step_is_the_same_whatever_was_drawn_before_it(row, tmp_path):
    first, second = row.make(), row.make()
    trainer(tmp_path, max_steps=3).fit(first, Digits())
    torch.manual_seed(1)
    torch.randn(7)
    trainer(tmp_path, Disturb(), max_steps=3).fit(second, Digits())
    assert not differing(weights(first), weights(second))
    assert first.teacher_evaluations == second.teacher_evaluations


@every_method
def test_every_step_draws_anew_in_every_epoch(row, tmp_path):
    drawn = []

    class Draw(Callback):
        def on_train_batch_end(self, *args):
            drawn.append(torch.rand(1).item())

    options = {"max_epochs": 2, "limit_train_batches": 2}
    trainer(tmp_path, Draw(), **options).fit(row.make(), Digits())
    assert len(drawn) == len(set(drawn)) == 4


@every_method
def test_teacher_and_average_never_leave_eval_mode(row):
    module = row.make()
    for mode in (True, False, True):
        module.train(mode)
        assert module.training is mode
        assert not any(part.training for part in module.ema.modules())
        if module.teacher is not None:
            assert not any(part.training for part in module.teacher.modules())


@every_method
def test_only_trained_networks_have_an_optimizer(row, tmp_path):
    module = row.make()
    run = trainer(tmp_path, max_steps=1)
    run.fit(module, Digits())
    for trained, optimizer in zip(module.trained_modules(), run.optimizers, strict=True):
        held = {p for group in optimizer.param_groups for p in group["params"]}
        assert held == set(trained.module.parameters())


@every_method
def test_previews_and_samples_leave_no_trace(row):
    module = row.make()
    before = copy.deepcopy(module.state_dict())
    noise, label = torch.randn(4, 1, 8, 8), torch.arange(4)
    rows = module.preview(noise, label)
    source = torch.Generator().manual_seed(0)  # some students add noise between their steps
    assert torch.equal(rows["student"], module.generate(noise, label, generator=source))
    assert torch.equal(rows["student"], module.preview(noise, label)["student"])
    assert not differing(before, module.state_dict())
    assert all(image.shape == noise.shape and not image.requires_grad for image in rows.values())


def _owner(row, name):
    """The network with whose loss a parameter is trained."""
    network = name.split(".")[0]
    # Where a discriminator has no optimizer of its own, the fake score's is its.
    beside = network == "discriminator" and network in row.follows
    return "fake_score" if beside else network


def _alternates(row):
    return isinstance(row.make(), AlternatingDistillationModule)
