import json
import math
from pathlib import Path

import pytest
import torch
from alone import run_script
from lightning.pytorch.callbacks import ModelCheckpoint
from matplotlib.image import imread
from toy import (
    Toy,
    ToyData,
    ToyDenoiser,
    ToyExtractor,
    compare_with_teacher,
    evaluation,
    trainer,
)

from lit_distill.callbacks.sampling import Draw, draw_images, teacher_sampler
from lit_distill.diffusion import (
    EvaluationCounter,
    GuidedDenoiser,
    sample,
    seeded_noise,
)
from lit_distill.metrics import (
    Extractor,
    describe,
    frechet_distance,
    measure,
    to_uint8,
)


def run_test(folder, module, **options):
    callback = evaluation(**options)
    trainer(folder, callback).test(module, ToyData(batch_size=10))
    return callback.rows


def teacher_images(count, seed, solver="heun", steps=4):
    noise, labels = seeded_noise((1, 4, 4), range(seed, seed + count)), torch.arange(count) % 3
    with torch.no_grad():
        made = sample(ToyDenoiser(), noise, steps=steps, solver=solver, condition=labels)
    return to_uint8(made), labels


@pytest.fixture(scope="module")
def tested(tmp_path_factory):
    """A student with a bias beside its teacher, tested at 1 and 2 steps."""
    folder = tmp_path_factory.mktemp("runs") / "toy"
    return folder, run_test(folder, Toy(ToyDenoiser()), steps=(1, 2), seed=1000)


def test_there_is_a_row_for_each_model_and_for_the_real_images(tested):
    _, rows = tested
    methods = ["teacher", "teacher", "Toy", "Toy", "real training", "real held-out"]
    assert [row["method"] for row in rows] == methods
    assert [row["steps"] for row in rows] == [4, 1, 1, 2, None, None]
    assert [row["solver"] for row in rows[:3]] == ["heun", "euler", None]
    assert [row["num_images"] for row in rows] == [200] * 4 + [120, 90]
    assert {row["dataset"] for row in rows} == {"toy"}
    assert all(row.keys() == rows[0].keys() for row in rows)


def test_rows_have_the_promised_fields(tested):
    _, rows = tested
    student = rows[2]
    promised = (
        "method dataset nfe fd_teacher_toy fd_toy fd_toy_train floors coverage label_accuracy "
        "class_entropy nearest_train latency_ms images_per_second parameters student_updates "
        "teacher_evaluations train_seconds num_images seed"
    )
    assert all(student[name] is not None for name in promised.split())
    assert student["teacher_evaluations"] == 7 and student["train_seconds"] == 1.5
    assert student["parameters"] == 1 and student["seed"] == 1000
    assert student["reference_images"] == {"teacher": 200, "test": 90, "train": 120}
    assert rows[0]["train_seconds"] is None  # what the teacher's training took is not known


def test_evaluations_are_counted(tested):
    _, rows = tested
    assert [row["nfe"] for row in rows[:4]] == [7, 1, 1, 2]


def test_the_teacher_has_rows_at_few_steps_too(tmp_path):
    rows = run_test(
        tmp_path, Toy(ToyDenoiser()), teacher_few_steps=(2, 3), teacher_few_solver="dpmpp_2m"
    )
    taught = [(row["solver"], row["steps"]) for row in rows if row["method"] == "teacher"]
    assert taught == [("heun", 4), ("dpmpp_2m", 2), ("dpmpp_2m", 3), ("euler", 1)]
    images, labels = teacher_images(200, 10_000_000, "dpmpp_2m", 3)
    made = describe(ToyExtractor(), images, labels)
    reference = describe(ToyExtractor(), *teacher_images(200, 10_000_200))
    distance = frechet_distance(reference.features, made.features)
    assert rows[2]["fd_teacher_toy"] == pytest.approx(distance, rel=1e-6)
    assert rows[2]["nfe"] == 3


def test_guidance_counts_two_evaluations(tmp_path):
    teacher = ToyDenoiser()
    teacher.null_label = 0
    rows = run_test(tmp_path / "run", Toy(GuidedDenoiser(teacher, scale=2.0)))
    assert [row["nfe"] for row in rows[:3]] == [14, 2, 1]


def test_figures_are_those_of_the_stated_images(tested):
    """Teacher at seed + i against teacher at seed + num_samples + i, made here by hand."""
    _, rows = tested
    extractor, data = ToyExtractor(), ToyData()
    own, labels = teacher_images(200, 1000)
    other, _ = teacher_images(200, 1200)
    one_step, _ = teacher_images(200, 1000, "euler", 1)
    train, test = (describe(extractor, *data.images(split)) for split in ("train", "test"))
    references = {"train": train, "test": test, "teacher": describe(extractor, other, labels)}
    expected = measure(describe(extractor, own, labels), **references)
    assert rows[0]["fd_teacher_toy"] == pytest.approx(expected.fd_teacher, rel=1e-6)
    assert rows[0]["fd_toy"] == pytest.approx(expected.fd_test, rel=1e-6)
    assert rows[0]["coverage"] == expected.coverage
    assert rows[0]["paired_distance"] is None
    expected = measure(describe(extractor, one_step, labels), paired=own, **references)
    for name in ("coverage", "coverage_train", "label_accuracy", "nearest_train"):
        assert rows[1][name] == pytest.approx(getattr(expected, name), rel=1e-6)
    assert rows[1]["fd_teacher_toy"] == pytest.approx(expected.fd_teacher, rel=1e-6)
    assert rows[1]["paired_distance"] == pytest.approx(expected.paired_distance, rel=1e-6)


def test_figures_come_with_their_intervals(tested):
    folder, rows = tested
    for row in rows[:4]:
        for name in ("fd_teacher_toy", "fd_toy", "coverage"):
            low, high = row[f"{name}_interval"]
            assert low <= row[name] <= high and (low < high or row[name] == 1)
    assert rows[-1]["fd_toy_interval"] is None and rows[-2]["fd_toy_interval"] is not None
    assert "fd_toy_train_interval" not in rows[0]
    written = json.loads((folder / "metrics.json").read_text())[0]["fd_toy_interval"]
    assert written == list(rows[0]["fd_toy_interval"])


def test_intervals_can_be_left_out(tmp_path, capsys):
    rows = run_test(tmp_path / "run", Toy(ToyDenoiser()), resamples=0)
    assert all(row["fd_toy_interval"] is None for row in rows)
    assert "±" not in capsys.readouterr().out


def test_floors_are_those_of_teacher_and_data(tested):
    _, rows = tested
    extractor, data = ToyExtractor(), ToyData()
    train, test = (describe(extractor, *data.images(split)) for split in ("train", "test"))
    between = frechet_distance(train.features, test.features)
    assert rows[0]["floors"] == {
        "fd_teacher_toy": rows[0]["fd_teacher_toy"],
        "fd_toy": pytest.approx(between),
        "fd_toy_train": pytest.approx(between),
    }
    assert all(row["floors"] == rows[0]["floors"] for row in rows)
    training, held_out = rows[-2:]
    assert training["fd_toy"] == pytest.approx(between)
    assert held_out["fd_toy_train"] == pytest.approx(between)
    assert training["coverage"] > 0.8 and held_out["coverage_train"] > 0.8
    assert held_out["label_accuracy"] > 0.95 and held_out["nearest_train"] > 0.1
    assert held_out["fd_toy"] is None and training["nearest_train"] is None


def test_a_student_that_is_its_teacher_lies_at_the_floor(tmp_path):
    module = Toy(ToyDenoiser(), bias=0.0, solver="heun")
    rows = run_test(tmp_path / "run", module, steps=(4,))
    teacher, student = rows[0], rows[2]
    assert student["fd_teacher_toy"] == teacher["fd_teacher_toy"] > 0
    assert student["paired_distance"] == 0
    worse = run_test(tmp_path / "run", Toy(ToyDenoiser(), bias=0.2, solver="heun"), steps=(4,))[2]
    assert worse["fd_teacher_toy"] > 10 * student["fd_teacher_toy"]
    assert worse["paired_distance"] > 0.5


def test_the_report_is_written(tested, capsys):
    folder, rows = tested
    assert json.loads((folder / "metrics.json").read_text()) == json.loads(json.dumps(rows))
    picture = imread(folder / "comparison.png")
    assert picture.shape[0] > 300 and picture.shape[1] > 500
    assert picture[..., :3].std() > 0.1
    assert not list(folder.rglob("*.tmp"))


def test_the_table_can_be_read(tmp_path, capsys, monkeypatch):
    # On a fast machine images/s has more digits.
    monkeypatch.setattr("lit_distill.metrics.cost._median_seconds", lambda run, device: 1e-3)
    run_test(tmp_path / "run", Toy(ToyDenoiser()))
    printed = capsys.readouterr().out
    assert printed.count("Toy") == 1 and "real held-out" in printed
    assert "fd_teacher_toy" in printed and "above the floor" in printed
    assert max(len(line) for line in printed.splitlines() if "/" not in line) <= 140


def test_without_a_floor_there_is_one_set_of_teacher_images(tmp_path):
    teacher = ToyDenoiser()
    callback = evaluation(floor=False, seed=0)
    with EvaluationCounter(teacher) as counter:
        trainer(tmp_path / "run", callback).test(Toy(teacher), ToyData(batch_size=10))
    files = [path.name for path in (tmp_path / "cache").glob("teacher-heun4-*")]
    assert len(files) == 1 and counter.samples > 0
    rows = callback.rows
    assert rows[0]["fd_teacher_toy"] is None and rows[0]["seed"] == 200
    assert rows[2]["fd_teacher_toy"] > 0 and rows[2]["paired_distance"] is None
    assert "fd_teacher_toy" not in rows[0]["floors"]


def test_the_teacher_is_sampled_once(tmp_path, monkeypatch):
    drawn = []

    def watched(trainer, sampler, draw, title):
        drawn.append(title)
        return draw_images(trainer, sampler, draw, title)

    monkeypatch.setattr("lit_distill.callbacks.sampling.draw_images", watched)
    monkeypatch.setattr("lit_distill.callbacks.references.draw_images", watched)
    first = run_test(tmp_path / "one", Toy(ToyDenoiser()))
    assert sorted(drawn) == ["Toy, 1 steps"] + ["teacher, euler 1"] + ["teacher, heun 4"] * 2
    drawn.clear()
    again = run_test(tmp_path / "two", Toy(ToyDenoiser()))  # another run of the same data
    assert drawn == ["Toy, 1 steps"]
    timed = ("latency_ms", "images_per_second", "throughput")
    for one, two in zip(first, again, strict=True):
        assert {k: v for k, v in one.items() if k not in timed} == {
            k: v for k, v in two.items() if k not in timed
        }
    drawn.clear()
    run_test(tmp_path / "two", Toy(ToyDenoiser(0.01)))
    assert len(drawn) == 4  # another teacher
    drawn.clear()
    run_test(tmp_path / "two", Toy(ToyDenoiser()), seed=5)
    assert len(drawn) == 4  # other images


def test_a_damaged_cache_is_made_again(tmp_path):
    first = run_test(tmp_path / "run", Toy(ToyDenoiser()))
    files = sorted((tmp_path / "cache").iterdir())
    assert len(files) == 5  # three sets of the teacher's, two of real features
    for path in files:
        path.write_bytes(path.read_bytes()[:-50])
    again = run_test(tmp_path / "run", Toy(ToyDenoiser()))
    assert again[2]["fd_teacher_toy"] == first[2]["fd_teacher_toy"]
    assert sorted((tmp_path / "cache").iterdir()) == files
    assert min(path.stat().st_size for path in files) > 1000


def test_a_teacher_in_training_is_evaluated_alone(tmp_path):
    rows = run_test(tmp_path / "run", Toy(None, solver="heun"), steps=(4, 1))
    assert [row["method"] for row in rows] == ["Toy", "Toy", "real training", "real held-out"]
    assert [row["nfe"] for row in rows[:2]] == [7, 1]
    assert all(row["fd_teacher_toy"] is None for row in rows)
    assert rows[0]["fd_toy"] > 0 and set(rows[0]["floors"]) == {"fd_toy", "fd_toy_train"}


def test_an_unconditional_model_has_no_label_accuracy(tmp_path):
    module = Toy(None)
    module.student.num_classes = None  # the data still have labels
    rows = run_test(tmp_path / "run", module)
    assert rows[0]["label_accuracy"] is None and rows[0]["class_entropy"] is not None
    assert rows[-1]["label_accuracy"] > 0.9


def test_only_inception_gives_an_fid(tmp_path, capsys):
    class Inception(ToyExtractor):
        name, classifies = "inception", False

    callback = evaluation()
    callback = type(callback)(Inception(), num_samples=50, batch_size=25, teacher_steps=2)
    trainer(tmp_path / "run", callback).test(Toy(ToyDenoiser()), ToyData(batch_size=10))
    student = callback.rows[2]
    assert student["fid"] > 0 and student["fid_train"] > 0 and student["fd_teacher_inception"] > 0
    assert student["label_accuracy"] is None and student["class_entropy"] is None
    assert not [key for key in student if key.startswith("fd_") and "teacher" not in key]
    assert "fid_train: to 120 training images" in capsys.readouterr().out


@pytest.mark.parametrize("teacher", [ToyDenoiser(), None])
def test_checkpoints_can_be_chosen_by_validation(tmp_path, teacher):
    name = "val/fd_toy" if teacher is None else "val/fd_teacher_toy"
    keep = ModelCheckpoint(tmp_path / "kept", monitor=name, save_top_k=-1)
    run = trainer(tmp_path / "run", evaluation(), keep, max_epochs=3, enable_checkpointing=True)
    run.fit(Toy(teacher, bias=0.5), ToyData(batch_size=40))
    logged = {"val/coverage", "val/label_accuracy", name}
    assert logged <= set(run.callback_metrics)
    scores = {int(p.split("step=")[1].split(".")[0]): s for p, s in keep.best_k_models.items()}
    assert scores[3] > scores[6] > scores[9] > 0  # the bias is learned away


def test_validation_measures_against_validation_images(tmp_path):
    callback = evaluation(validation_seed=50)
    run = trainer(tmp_path / "run", callback)
    run.validate(Toy(ToyDenoiser(), bias=0.0, solver="heun"), ToyData(), verbose=False)
    extractor = ToyExtractor()
    samples = describe(extractor, *teacher_images(80, 50, "heun", 1))
    expected = measure(
        samples,
        test=describe(extractor, *ToyData().images("val")),
        teacher=describe(extractor, *teacher_images(80, 130)),
    )
    logged = run.callback_metrics
    assert logged["val/fd_teacher_toy"] == pytest.approx(expected.fd_teacher, rel=1e-5)
    assert logged["val/coverage"] == pytest.approx(expected.coverage, rel=1e-5)
    assert logged["val/label_accuracy"] == pytest.approx(expected.label_accuracy, rel=1e-5)


def test_validation_can_be_switched_off_and_skips_the_sanity_check(tmp_path):
    run = trainer(tmp_path / "run", evaluation(validation_samples=0), max_steps=1)
    run.fit(Toy(ToyDenoiser()), ToyData(batch_size=40))
    assert not run.callback_metrics
    run = trainer(tmp_path / "run", evaluation(), max_epochs=0, num_sanity_val_steps=1)
    run.fit(Toy(ToyDenoiser()), ToyData(batch_size=40))
    assert not run.callback_metrics and not (tmp_path / "cache").exists()


class Stochastic(Toy):
    """Adds noise of the global generator, as stochastic samplers do."""

    def generate(self, noise, condition, steps):
        images = super().generate(noise, condition, steps)
        return images + 0.1 * torch.randn_like(images)


def test_evaluation_leaves_the_training_as_it_was(tmp_path):
    biases = []
    for callbacks in ([], [evaluation()]):
        torch.manual_seed(0)
        module = Stochastic(ToyDenoiser())
        run = trainer(tmp_path / "run", *callbacks, max_epochs=2)
        run.fit(module, ToyData(batch_size=40))
        biases.append(module.student.bias.item())
        assert module.training
    assert biases[0] == biases[1] != 0.1


def test_stochastic_samples_are_reproducible(tmp_path):
    draw = Draw((1, 4, 4), 3, count=50, seed=0, batch_size=20)
    module = Stochastic(None)

    def images():
        return draw_images(trainer(tmp_path), lambda n, c: module.generate(n, c, 1), draw, "x")

    first = images()
    torch.rand(3)
    assert torch.equal(first, images())


def test_image_i_has_the_noise_of_its_own_seed(tmp_path):
    draw = Draw((1, 4, 4), 3, count=50, seed=7, batch_size=20)
    images = draw_images(trainer(tmp_path), teacher_sampler(ToyDenoiser(), "euler", 1), draw, "x")
    noise = seeded_noise((1, 4, 4), [7 + 44])
    alone = sample(ToyDenoiser(), noise, steps=1, solver="euler", condition=torch.tensor([44 % 3]))
    assert images.shape == (50, 1, 4, 4) and images.dtype == torch.uint8
    assert torch.equal(images[44], to_uint8(alone)[0])


class Noting(Toy):
    """Notes what it is asked with, and whether autocast is on."""

    def generate(self, noise, condition, steps):
        self.noted = {**getattr(self, "noted", {}), torch.is_autocast_enabled("cpu"): noise[0]}
        return super().generate(noise, condition, steps).bfloat16()


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_samples_are_made_in_the_trainers_precision(tmp_path, precision):
    module = Noting(ToyDenoiser())
    run = trainer(tmp_path / "run", evaluation(seed=9), precision=precision)
    run.test(module, ToyData(batch_size=10))
    (mixed, noise), *others = module.noted.items()  # the same in timing, sampling and the picture
    assert mixed == (precision == "bf16-mixed") and not others
    assert noise.dtype == torch.float32 and torch.equal(noise, seeded_noise((1, 4, 4), [9])[0])


def test_a_checkpoint_knows_its_updates_and_holds_no_extractor(tmp_path):
    callback = evaluation()
    run = trainer(tmp_path / "run", callback, max_steps=5)
    run.fit(Toy(None), ToyData(batch_size=40))
    run.save_checkpoint(tmp_path / "five.ckpt")
    content = torch.load(tmp_path / "five.ckpt", weights_only=True)
    assert list(content["state_dict"]) == ["student.bias"]
    fresh = evaluation()
    trainer(tmp_path / "run", fresh).test(
        Toy(None), ToyData(batch_size=10), ckpt_path=tmp_path / "five.ckpt"
    )
    assert fresh.rows[0]["student_updates"] == 5


def test_two_processes_measure_what_one_does(tmp_path):
    folders = {devices: tmp_path / str(devices) / "run" for devices in (1, 2)}
    for folder in folders.values():
        folder.mkdir(parents=True)
    compare_with_teacher(folders[1], devices=1)  # tests run with one thread, see conftest.py
    script = Path(__file__).parent / "toy.py"
    done = run_script(script, folders[2], 2, processes=2)
    assert done.returncode == 0, done.stderr[-3000:]
    one, two, other = (
        torch.load(folders[devices] / f"rank-{rank}.pt", weights_only=True)
        for devices, rank in [(1, 0), (2, 0), (2, 1)]
    )
    assert two == other  # both processes have all rows, timings included
    timed = {"latency_ms", "images_per_second", "throughput"}
    for row, expected in zip(two[0], one[0], strict=True):
        for name in expected.keys() - timed:
            if isinstance(expected[name], float):
                assert row[name] == pytest.approx(expected[name], rel=1e-6), name
            elif name == "floors":
                assert row[name] == pytest.approx(expected[name], rel=1e-6)
            else:
                assert row[name] == expected[name], name
    assert two[1] == pytest.approx(one[1], rel=1e-6)  # what validation logged


def test_a_diverged_model_is_named(tmp_path):
    with pytest.raises(ValueError, match="diverged"):
        run_test(tmp_path / "run", Toy(None, bias=math.nan))


def test_a_data_module_is_asked_for(tmp_path):
    loader = torch.utils.data.DataLoader([{"image": torch.zeros(1, 4, 4)}])
    with pytest.raises(ValueError, match="Evaluation needs a data module"):
        trainer(tmp_path, evaluation()).test(Toy(None), loader)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"steps": ()}, "at least one number of steps"),
        ({"steps": (1, 0)}, r"steps=\(1, 0\)"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"throughput_batch_sizes": (0,)}, r"throughput_batch_sizes=\(0,\)"),
        ({"num_samples": 1}, "num_samples=1"),
        ({"validation_samples": -1}, "validation_samples=-1"),
        ({"teacher_few_steps": (8, 0)}, r"teacher_few_steps=\(8, 0\)"),
        ({"teacher_few_solver": "dpm"}, "solver=.dpm. is unknown"),
    ],
)
def test_bad_settings_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        evaluation(**options)


def test_the_extractor_is_a_config_entry():
    from jsonargparse import ArgumentParser

    from lit_distill.callbacks.evaluation import Evaluation

    parser = ArgumentParser()
    parser.add_subclass_arguments(Evaluation, "evaluation")
    extractor = {"class_path": f"{ToyExtractor.__module__}.ToyExtractor"}
    arguments = {"extractor": extractor, "steps": [1, 4], "cache_dir": "somewhere"}
    path = "lit_distill.callbacks.evaluation.Evaluation"
    config = parser.parse_object({"evaluation": {"class_path": path, "init_args": arguments}})
    made = parser.instantiate(config).evaluation
    assert isinstance(made.extractor, Extractor) and made.steps == (1, 4)
