"""The main job under DeepSpeed's launcher: the README's command, two ranks, signals."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parents[1]
TIMEOUT = 240
RECIPE = """
[model]
path = "{model}"
[prompts]
path = "{prompts}"
[sampler]
num_inference_steps = 4
guidance_scale = 3.0
[objective]
backprop_steps = 2
[[rewards]]
name = "brightness"
[train]
num_steps = {num_steps}
batch_size = {batch_size}
dtype = "float32"
learning_rate = 1e-3
checkpoint_every = 0
[evaluate]
every = 0
num_samples = 2
"""


@pytest.fixture
def write_recipe(tiny_pipeline, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(f"a red cat {'and a dog ' * i}" for i in range(7)))

    def write(name, **values):
        path = tmp_path / f"{name}.toml"
        path.write_text(RECIPE.format(model=tiny_pipeline, prompts=prompts, **values))
        return str(path)

    return write


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


def launch(*arguments, ranks=1):
    """The process of the ``deepspeed`` command, in a group of its own."""
    command = [str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", str(ranks), "--master_port", free_port()]
    environment = os.environ | {
        "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }  # fmt: skip
    return subprocess.Popen(
        [*command, "fastcraft/train.py", "--ds_config", "ds_configs/zero2.json", *arguments],
        cwd=ROOT, env=environment, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def finish(process):
    output, _ = process.communicate(timeout=TIMEOUT)
    return process.returncode, output


def lines(run_dir):
    path = run_dir / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def wait_for(condition, what):
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < deadline, f"timed out waiting for {what}"
        time.sleep(0.05)


def test_two_ranks_see_the_same_prompts_and_losses_as_one(write_recipe, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    both = [
        launch("--recipe", write_recipe("one", num_steps=3, batch_size=4), "--run-dir", str(one)),
        launch("--recipe", write_recipe("two", num_steps=3, batch_size=2), "--run-dir", str(two), ranks=2),
    ]
    for process in both:
        code, output = finish(process)
        assert code == 0, output
    assert [row["step"] for row in lines(two)] == [1, 2, 3]
    for a, b in zip(lines(one), lines(two), strict=True):
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-3)
    weights = [folder / "export" / "text_encoder" / "model.safetensors" for folder in (one, two)]
    from safetensors.torch import load_file

    first, second = map(load_file, weights)
    assert all((first[name] - second[name]).abs().max() < 2e-4 for name in first)


@pytest.mark.parametrize("to_group", [False, True], ids=["launcher", "group"])
def test_sigterm_leaves_one_clean_checkpoint_and_no_process(write_recipe, tmp_path, to_group):
    out = tmp_path / "run"
    recipe = write_recipe("long", num_steps=10000, batch_size=2)
    process = launch("--recipe", recipe, "--run-dir", str(out), ranks=2)
    wait_for(lambda: len(lines(out)) >= 2 or process.poll() is not None, "two steps")
    assert process.poll() is None, process.communicate()[0]
    family = psutil.Process(process.pid).children(recursive=True)
    assert len(family) >= 3  # launch.py and two workers
    for _ in range(2):
        if to_group:
            os.killpg(process.pid, signal.SIGTERM)
        else:
            process.send_signal(signal.SIGTERM)
        time.sleep(0.2)
    began = time.monotonic()
    _, alive = psutil.wait_procs(family, timeout=30)
    for orphan in alive:
        orphan.kill()
    process.communicate()
    assert alive == []
    assert time.monotonic() - began < 30
    (checkpoint,) = (out / "checkpoints").iterdir()
    assert checkpoint.name == f"step-{len(lines(out)):06d}"

    code, output = finish(  # one rank goes on where two stopped
        launch(
            "--recipe",
            write_recipe("rest", num_steps=len(lines(out)) + 1, batch_size=4),
            "--run-dir",
            str(out),
            "--resume",
        )
    )
    assert code == 0, output
    assert f"going on from {checkpoint.name}" in output


def test_bad_input_is_status_2_without_a_traceback(tmp_path):
    code, output = finish(launch("--recipe", "shapez", "--run-dir", str(tmp_path / "run"), ranks=2))
    assert code == 2
    assert output.count("fastcraft: error: --recipe: unknown recipe 'shapez'; did you mean 'shapes'?") == 1
    assert "Traceback" not in output
    assert not (tmp_path / "run").exists()


def test_the_readmes_command_trains_the_bundled_model(tmp_path):
    """The default recipe, shortened; its export drives a stock pipeline."""
    out = tmp_path / "run"
    short = ["--set", "train.num_steps=2", "--set", "train.batch_size=2", "--set", "evaluate.exam_num_samples=4"]
    code, output = finish(launch(*short, "--set", "evaluate.num_samples=4", "--run-dir", str(out)))
    assert code == 0, output
    assert set(lines(out)[-1]["rewards"]) == {"clip", "aesthetic", "total"}
    assert "fully_right" in (out / "evaluations.jsonl").read_text()
    from diffusers import StableDiffusionPipeline
    from transformers import CLIPTextModel

    encoder = CLIPTextModel.from_pretrained(out / "export" / "text_encoder")
    weights = ROOT / "fastcraft" / "shapes" / "weights" / "pipeline"
    pipeline = StableDiffusionPipeline.from_pretrained(weights, text_encoder=encoder)
    image = pipeline("a red circle", num_inference_steps=3, output_type="np").images[0]
    assert image.shape == (64, 64, 3)
    assert 0.01 < image.std() < 1


def test_help_is_quick_and_says_everything():
    result = subprocess.run(
        [sys.executable, "fastcraft/train.py", "--help"], cwd=ROOT, capture_output=True, text=True, timeout=60,
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"},
    )  # fmt: skip
    assert result.returncode == 0
    for word in ("--ds_config", "--recipe", "--model", "--prompts", "--set", "--run-dir", "--resume", "--dry-run"):
        assert word in result.stdout
    assert "textcraftor_sd15" in result.stdout
    assert "--local_rank" not in result.stdout
