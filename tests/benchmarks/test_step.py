"""The step benchmark: its baselines compute what fastcraft computes, and its sums are right."""

import json

import pytest
import torch

from benchmarks import step, step_worker
from benchmarks.published import PublishedLoop
from fastcraft.build.run import build_objective, build_order, build_run
from fastcraft.config import load_recipe
from fastcraft.data.order import sample_seed

CPU = torch.device("cpu")


@pytest.fixture
def recipe_file(tiny_pipeline, tmp_path):
    (tmp_path / "prompts.txt").write_text("a red cat\na blue dog\na cat\n")
    text = f"""
        [model]
        path = "{tiny_pipeline}"
        [prompts]
        path = "{tmp_path / "prompts.txt"}"
        [sampler]
        num_inference_steps = 4
        guidance_scale = 3.0
        [objective]
        backprop_steps = 2
        [[rewards]]
        name = "brightness"
        [train]
        dtype = "float32"
        batch_size = 2
    """
    file = tmp_path / "tiny.toml"
    file.write_text(text)
    return str(file)


def gradient(model):
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).double()


@pytest.mark.parametrize("style", ["published", "repaired"])
def test_the_baseline_computes_the_loss_and_the_gradient_of_fastcraft(recipe_file, style):
    recipe = load_recipe(recipe_file)
    parts = build_run(recipe, device=CPU)
    images = parts.model.images
    loop = PublishedLoop(
        parts, style=style, dtype=torch.float32, guidance_scale=3.0, num_inference_steps=4, backprop_steps=2,
        spacing="trailing",
    )  # fmt: skip
    batch = build_order(recipe, parts.prompts.training, images, world_size=1).batch(0, 0, batch_size=2)
    noise = images.noise([sample_seed(recipe.train.seed, index) for index in batch.indices])[0]
    loop.optimizer.step = lambda: None  # the same weights for the comparison
    theirs_loss = loop.step(batch.prompts, noise)
    theirs = gradient(loop.text_encoder)
    assert any(p.grad is not None for p in loop.unet.parameters()) == (style == "published")

    loop.optimizer.zero_grad()
    (output,) = build_objective(recipe, parts, images).round(0)
    output.loss.backward()
    ours = gradient(parts.model.trained)
    assert output.loss.item() == pytest.approx(theirs_loss, rel=1e-5)
    assert ours.norm() > 0
    assert torch.cosine_similarity(ours, theirs, dim=0) > 0.9999


def test_the_alignprop_loop_trains_and_cuts_off_what_comes_before_its_draw(recipe_file):
    parts = build_run(load_recipe(recipe_file), device=CPU)
    loop = PublishedLoop(
        parts, style="alignprop", dtype=torch.float32, guidance_scale=3.0, num_inference_steps=4, backprop_steps=2,
        spacing="trailing",
    )  # fmt: skip
    noise, norms = parts.model.images.noise([1, 2])[0], []
    for first in (3, 0):
        loop.random.gauss = lambda mean, std, first=first: first
        calls = []
        handle = loop.unet.register_forward_pre_hook(lambda *args, calls=calls: calls.append(1))
        loop.step(["a", "b"], noise)
        handle.remove()
        norms.append(gradient(loop.text_encoder).norm())
        assert len(calls) == 4 + (4 - first)  # the steps that are cut off are not run again
    assert norms[0] > 0
    assert norms[0] != norms[1]


def test_a_cycle_counts_as_the_mean_of_its_steps():
    numbers = []
    result = step_worker.measure(lambda number: numbers.append(number) or float(number), rounds=3, cycle=2, device=CPU)
    assert numbers == list(range(8))  # one cycle to warm up
    assert len(result["seconds"]) == 3
    assert result["first_loss"] == 0
    assert result["peak_memory_mib"] > 50


def test_peak_memory_is_seen_after_a_reset():
    step_worker.reset_peak(CPU)
    before = step_worker.peak_mib(CPU)
    held = torch.ones(64 * 2**20, dtype=torch.uint8)
    assert step_worker.peak_mib(CPU) - before > 50
    del held
    step_worker.reset_peak(CPU)
    assert step_worker.peak_mib(CPU) - before < 50


def test_the_arithmetic_of_a_sample_is_counted(recipe_file):
    counted = step_worker.count(load_recipe(recipe_file, ["memory.policy=none", "train.batch_size=1"]), CPU)
    again = step_worker.count(load_recipe(recipe_file, ["memory.policy=step", "train.batch_size=1"]), CPU)
    assert again["flops_per_sample"] > counted["flops_per_sample"] > 1e6


def test_best_batches_turns_and_ratios(monkeypatch, tmp_path):
    """Two turns: a loop that runs out of memory at a batch keeps the smaller one; later turns measure the best only."""
    jobs = []

    def run(job):
        jobs.append(job)
        batch = int(next(item for item in job["overrides"] if item.startswith("train.batch_size")).split("=")[1])
        if job["kind"] == "repaired" and batch > 4:
            return {"error": "out of memory"}
        if job["kind"] == "alignprop":
            return {"error": "out of memory"}
        seconds = {"published": 4.0, "repaired": 2.0, "fastcraft": 1.0}[job["kind"]] * batch**0.5
        return {"seconds": [seconds, seconds * 1.1], "peak_memory_mib": 10.0 * batch, "step_memory_mib": 1.0 * batch}

    monkeypatch.setattr(step, "run_worker", run)
    bench = step.Bench("shapes", ["a.b=1"], batches=[2, 4, 8], rounds=2)
    chosen = [loop for loop in step.loops() if loop.key in ("published", "repaired", "alignprop", "none", "reuse4")]
    for _ in range(2):
        for loop in chosen:
            bench.turn(loop)
    rows = bench.finish({"flops_per_sample": 100.0, "matmul_flops_per_sec": 1000.0})
    assert [row.get("batch_size") for row in rows] == [8, 4, None, 8, 8]
    assert [len(row.get("seconds", [])) for row in rows] == [4, 4, 0, 4, 4]
    assert len(jobs) == 3 + 3 + 1 + 3 + 3 + 4
    assert rows[3]["ratio_to_published"] == pytest.approx(4)
    assert rows[3]["ratio_to_repaired"] == pytest.approx(2 * 2**0.5)
    assert rows[3]["mfu"] == pytest.approx(rows[3]["samples_per_sec"] * 0.1)
    assert "mfu" not in rows[4]
    assert jobs[-1]["overrides"][-1] == "memory.prefix_pool=8"
    assert jobs[-1]["cycle"] == 4
    lines = step.table(rows).splitlines()
    assert len({line.count("|") for line in lines}) == 1
    assert "out of memory" in lines[4]
    step.plot(rows, tmp_path / "chart.png", title="a title")
    assert (tmp_path / "chart.png").stat().st_size > 10_000


def test_every_row_is_a_recipe_that_loads():
    for loop in step.loops():
        job = step.Bench("shapes", [], batches=[4], rounds=2).job(loop.kind, loop.overrides, 4, loop.cycle)
        recipe = load_recipe(job["recipe"], job["overrides"])
        assert recipe.memory.prefix_reuse == (loop.cycle if "{batch_size}" in json.dumps(loop.overrides) else 1)


@pytest.mark.parametrize(
    ("argv", "message"),
    [(["--loops", "published,ours"], "unknown loop 'ours'"), (["--rounds", "1", "--turns", "1"], "must be at least 2")],
)
def test_a_bad_command_line_is_refused(argv, message, capsys):
    with pytest.raises(SystemExit):
        step.parse(argv)
    assert message in capsys.readouterr().err
