"""The trainer with an objective whose rounds have several updates: no diffusion, but a real engine and checkpoints."""

import json
import signal
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from fastcraft.engine.checkpoint import find_checkpoint, load_checkpoint
from fastcraft.engine.ds_config import fill_ds_config
from fastcraft.engine.interrupt import Interrupt, StopRequested
from fastcraft.engine.schedule import lr_at
from fastcraft.engine.zero2 import ParameterGroup, Zero2Engine, init_distributed
from fastcraft.evaluation.record import RunRecord
from fastcraft.recipe import TrainConfig
from fastcraft.records import Loss
from fastcraft.trained.trained_set import TrainedPart, TrainedSet
from fastcraft.trainer import Trainer, TrainingFailed

UPDATES, LOSSES = 3, 2
"""Of a round; of an update."""


class Rollout:
    """A round: draws a target, then makes three updates towards it, of two losses each."""

    updates_per_round = UPDATES

    def __init__(self, engine, rewards):
        self.engine, self.rewards = engine, rewards
        self.seen, self.baseline = 0, torch.zeros(3)
        self.before = {}  # what each round began with
        self.asked, self.events = [], {}

    def round(self, number, *, done=0):
        self.asked.append((number, done))
        self.before[number] = {name: tensor.clone() for name, tensor in self.engine.state().items()}
        target = torch.randn(3) + self.baseline  # by the default generator, whose state is in the checkpoint
        for index in range(done, UPDATES * LOSSES):
            factor = self.events.get((number, index), lambda: 1.0)()
            x = torch.randn(4, 6)
            error = (self.engine("text", x) - target).pow(2).mean() * factor
            self.rewards.count.add_(float(x.sum()))
            metrics = {"reward/total": -error.detach(), "index": torch.tensor(float(index))}
            yield Loss(loss=error, metrics=metrics, share=1 / LOSSES, closes_update=index % LOSSES == LOSSES - 1)
        self.baseline.add_(0.1 * target)
        self.seen += UPDATES * LOSSES

    def state_dict(self):
        return {"seen": torch.tensor(self.seen), "baseline": self.baseline}

    def load_state_dict(self, state):
        self.seen = int(state["seen"])
        self.baseline = state["baseline"].clone()


class Statistics:
    """What rewards keep, in place of rewards."""

    def __init__(self):
        self.count = torch.zeros(())

    def synchronize(self):
        pass

    def state_dict(self):
        return {"count": self.count}

    def load_state_dict(self, state):
        self.count = state["count"].clone()


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # bit-equality across runs
    yield
    torch.set_num_threads(before)


@pytest.fixture
def start(tmp_path):
    """A run of toys in a folder; with ``resume``, from its newest checkpoint."""
    init_distributed("cpu")
    opened = []

    def make(name, *, resume=False, **changes):
        torch.manual_seed(11)
        settings = {"num_steps": 12, "lr_schedule": "cosine", "warmup_steps": 2, "checkpoint_every": 4} | changes
        train = TrainConfig(batch_size=4, dtype="float32", learning_rate=1e-2, keep_checkpoints=9, **settings)
        part = TrainedPart(name="text", module=nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)), mode="full")
        module = TrainedSet([part])
        sizes = [param.numel() for param in module.parameters()]
        filled = fill_ds_config(
            {"zero_optimization": {"stage": 2}}, batch_size=4, gradient_accumulation_steps=1, dtype="float32",
            max_grad_norm=1.0, learning_rate=1e-2, betas=train.betas, eps=train.eps, weight_decay=0.01,
            num_parameters=sum(sizes), largest_parameter=max(sizes),
        )  # fmt: skip
        parameters = {f"text.{key}": param for key, param in part.parameters()}
        group = ParameterGroup(name="text", parameters=parameters, learning_rate=1e-2, ema_decay=0.9)
        engine = Zero2Engine(
            module, ds_config=filled, device=torch.device("cpu"), total_steps=train.num_steps,
            warmup_steps=train.warmup_steps, lr_schedule=train.lr_schedule, groups=[group],
        )  # fmt: skip
        rewards, folder, interrupt = Statistics(), tmp_path / name, Interrupt(launched=False)
        objective = Rollout(engine, rewards)
        checkpoint = None
        if resume:
            checkpoint = load_checkpoint(find_checkpoint(folder / "checkpoints")[0], rank=0, world_size=1)
        evaluations = []
        evaluator = SimpleNamespace(
            every=0, ended=False, watch=lambda step: None, what_ran_slower=list, notes=list,
            evaluate=lambda step, *, closing=False: evaluations.append(step),
        )  # fmt: skip
        record = RunRecord(
            folder, num_steps=train.num_steps, total_samples_per_step=8,
            resume_step=checkpoint.step if checkpoint else None,
        )  # fmt: skip
        trainer = Trainer(
            train, objective=objective, rewards=rewards, engine=engine, evaluator=evaluator,
            device=torch.device("cpu"), run_dir=folder, interrupt=interrupt, record=record,
        )  # fmt: skip
        opened.append((engine, record, interrupt))
        if checkpoint is not None:
            trainer.restore(checkpoint)
        trainer.evaluations = evaluations
        return trainer

    yield make
    for engine, record, interrupt in opened:
        engine.close()
        record.close()
        interrupt.restore()


def metrics(trainer):
    return [json.loads(line) for line in (trainer.run_dir / "metrics.jsonl").read_text().splitlines()]


def checkpoints(trainer):
    return sorted(path.name for path in (trainer.run_dir / "checkpoints").iterdir())


def read(trainer, step):
    """Everything that a checkpoint holds but its manifest."""
    folder = trainer.run_dir / "checkpoints" / f"step-{step:06d}"
    tensors = {f"{path.name}/{key}": value for path in folder.glob("*.safetensors") for key, value in
               load_file(path).items()}  # fmt: skip
    return tensors, json.loads((folder / "state.json").read_text())


def assert_equal(tensors, other):
    assert tensors.keys() == other.keys()
    for name, tensor in tensors.items():
        assert torch.equal(tensor, other[name]), name


def figures(rows):
    return [{key: value for key, value in row.items() if key not in TIMES} for row in rows]


TIMES = ("samples_per_sec_per_gpu", "step_time_s", "peak_memory_mib")


def test_updates_are_counted_and_rounds_saved_whole(start):
    trainer = start("run")
    trainer.run()
    rows = metrics(trainer)
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert (trainer.done, trainer.rounds, trainer.engine.num_updates) == (12, 4, 12)
    assert trainer.objective.asked == [(0, 0), (1, 0), (2, 0), (3, 0)]
    rates = [lr_at(n, peak=1e-2, warmup_steps=2, total_steps=12, schedule="cosine") for n in range(12)]
    assert [row["lr"] for row in rows] == pytest.approx(rates, rel=1e-12)
    assert len({row["loss"] for row in rows}) == 12
    assert [row["index"] for row in rows] == [0.5, 2.5, 4.5] * 4, "the mean of an update's two losses"
    assert all(row["loss"] == -row["rewards"]["total"] for row in rows)
    # steps 4, 8 and 12 lie inside or at the end of rounds that end at 6, 9 and 12
    assert checkpoints(trainer) == ["step-000006", "step-000009", "step-000012"]
    for number, step in ((2, 6), (3, 9)):
        begun = trainer.objective.before[number]
        tensors, state = read(trainer, step)
        assert (state["rounds"], int(begun["step"])) == (number, step)
        assert torch.equal(tensors["model.safetensors/param.text.0.weight"], begun["param.text.0.weight"])
        assert torch.equal(tensors["optimizer.safetensors/ema.text.0.weight"], begun["ema.text.0.weight"])
    assert trainer.evaluations == [0, 12]


def test_what_the_objective_keeps_is_in_the_checkpoint_and_back(start):
    trainer = start("run")
    trainer.run()
    tensors, state = read(trainer, 12)
    assert int(tensors["optimizer.safetensors/objective.seen"]) == 24 == trainer.objective.seen
    assert torch.equal(tensors["optimizer.safetensors/objective.baseline"], trainer.objective.baseline)
    assert trainer.objective.baseline.abs().min() > 0
    assert int(read(trainer, 6)[0]["optimizer.safetensors/objective.seen"]) == 12
    assert state == {"bad_steps": 0, "skipped_steps": 0, "failed_saves": 0, "rounds": 4}
    other = start("run", resume=True)
    assert (other.done, other.rounds, other.objective.seen) == (12, 4, 24)
    assert torch.equal(other.objective.baseline, trainer.objective.baseline)
    assert torch.equal(other.rewards.count, trainer.rewards.count)
    assert_equal(other.engine.state(), trainer.engine.state())


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("index", range(UPDATES * LOSSES))
def test_a_stop_inside_a_round_leaves_the_run_where_the_round_began(start, number, index):
    whole = start("whole")
    whole.run()
    parts = start("parts")

    def stop():
        signal.raise_signal(signal.SIGTERM)
        return 1.0

    parts.objective.events = {(number, index): stop}
    with pytest.raises(StopRequested, match="SIGTERM"):
        parts.run()
    begun = 3 * number
    assert (parts.done, parts.rounds, parts.objective.seen) == (begun, number, 6 * number)
    assert_equal(parts.engine.state(), whole.objective.before[number])
    assert checkpoints(parts)[-1] == f"step-{begun:06d}"
    tensors, state = read(parts, begun)
    for name, tensor in whole.objective.before[number].items():
        file = "model" if name.startswith("param.") else "optimizer"
        assert torch.equal(tensors[f"{file}.safetensors/{name}"], tensor), name
    assert state["rounds"] == number
    assert [row["step"] for row in metrics(parts)] == list(range(1, begun + index // LOSSES + 1))

    rest = start("parts", resume=True)
    assert (rest.done, rest.rounds) == (begun, number)
    rest.run()
    assert figures(metrics(rest)) == figures(metrics(whole))
    for step in (9, 12):
        (tensors, state), (wanted, wanted_state) = read(rest, step), read(whole, step)
        assert_equal(tensors, wanted)
        assert state == wanted_state


@pytest.mark.parametrize(("first", "begun"), [(0, 3), (1, 6)])
def test_too_many_bad_updates_end_the_run_between_two_rounds(start, first, begun):
    """Bad updates 1 and 2 of the second round: back to its beginning; 2 and 3: the round is over."""
    trainer = start("run", max_bad_steps=2)
    for update in (first, first + 1):
        trainer.objective.events[1, update * LOSSES] = lambda: float("nan")
    with pytest.raises(TrainingFailed, match="2 steps in a row"):
        trainer.run()
    assert checkpoints(trainer) == [f"step-{begun:06d}"]
    tensors, state = read(trainer, begun)
    assert (state["rounds"], state["bad_steps"], trainer.objective.seen) == (begun // 3, 2, 2 * begun)
    assert int(tensors["optimizer.safetensors/objective.seen"]) == 2 * begun
    assert all(tensor.isfinite().all() for name, tensor in tensors.items() if name.startswith("model"))
    if first == 0:
        assert_equal(trainer.engine.state(), trainer.objective.before[1])


def test_a_skipped_update_of_a_round_is_an_update(start):
    trainer = start("run")
    trainer.objective.events[1, LOSSES] = lambda: float("inf")
    trainer.run()
    assert [row["skipped"] for row in metrics(trainer)] == [number == 5 for number in range(1, 13)]
    assert (trainer.done, trainer.engine.num_updates, trainer.skipped_steps) == (12, 11, 1)


def test_the_last_update_may_lie_inside_a_round(start):
    trainer = start("run", num_steps=10)
    trainer.run()
    assert [row["step"] for row in metrics(trainer)] == list(range(1, 11))
    assert checkpoints(trainer) == ["step-000006", "step-000009", "step-000010"]
    assert trainer.engine.num_updates == 10
