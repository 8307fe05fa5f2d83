"""The main job in this process: what a run leaves behind, resume, bad numbers, bad input."""

import json
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fastcraft.config import load_recipe
from fastcraft.train import main
from fastcraft.trainer import Trainer

ROOT = Path(__file__).parents[1]
DS_CONFIG = str(ROOT / "ds_configs" / "zero2.json")
PROMPTS = ["a red cat", "a blue dog", "a red dog", "a blue cat", "dog " * 90, "ein größerer roter Hund 🐕", "a red cat"]


@pytest.fixture(scope="module", autouse=True)
def process_group():
    """One group for every run in this process: DeepSpeed keeps what it made of the first one."""
    from fastcraft.engine.agreement import close_distributed
    from fastcraft.engine.zero2 import init_distributed

    opened = init_distributed("cpu")
    yield
    if opened:
        close_distributed()


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # bit-equality across runs
    yield
    torch.set_num_threads(before)


@pytest.fixture
def recipe(tiny_pipeline, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS), encoding="utf-8")
    path = tmp_path / "tiny.toml"
    path.write_text(
        f"""
[model]
path = "{tiny_pipeline}"
[prompts]
path = "{prompts}"
[sampler]
num_inference_steps = 4
guidance_scale = 3.0
eta = 0.5
[objective]
backprop_steps = 2
normalize_rewards = "running_std"
[[rewards]]
name = "brightness"
[train]
num_steps = 4
batch_size = 2
dtype = "float32"
learning_rate = 1e-3
lr_schedule = "cosine"
warmup_steps = 2
checkpoint_every = 2
[evaluate]
every = 2
num_samples = 2
"""
    )
    return path


def run(recipe, run_dir, *extra):
    return main(["--ds_config", DS_CONFIG, "--recipe", str(recipe), "--run-dir", str(run_dir), *extra])


def lines(run_dir, name="metrics.jsonl"):
    return [json.loads(line) for line in (run_dir / name).read_text().splitlines()]


def test_a_run_leaves_everything_it_promises(recipe, tmp_path, capsys):
    out = tmp_path / "run"
    assert run(recipe, out) == 0
    rows = lines(out)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    keys = {"loss", "rewards", "grad_norm", "lr", "samples_per_sec_per_gpu", "step_time_s", "peak_memory_mib"}
    assert all(keys <= row.keys() and set(row["rewards"]) == {"brightness", "total"} for row in rows)
    assert [round(row["lr"], 7) for row in rows[:2]] == [5e-4, 1e-3]
    for name in ("environment.json", "report.html", "samples/step-000000.png", "samples/step-000004.png"):
        assert (out / name).stat().st_size > 0
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == ["step-000002", "step-000004"]
    assert any((out / "tensorboard").iterdir())
    assert load_recipe(str(out / "recipe.toml")).train.num_steps == 4
    printed = capsys.readouterr().out
    assert "exported export/text_encoder: reloaded, largest difference 0.0e+00" in printed
    assert str(out / "report.html") in printed

    assert run(recipe, out) == 2
    assert "is not empty; go on with --resume" in capsys.readouterr().err
    assert run(recipe, out, "--resume", "--set", "train.learning_rate=1e-5") == 2
    assert "belongs to another recipe: train.learning_rate is 0.001 there, 1e-05 here" in capsys.readouterr().err


def test_export_works_in_the_stock_pipeline(recipe, tmp_path, tiny_pipeline):
    from diffusers import StableDiffusionPipeline
    from transformers import CLIPTextModel

    out = tmp_path / "run"
    assert run(recipe, out, "--set", "train.num_steps=2") == 0
    encoder = CLIPTextModel.from_pretrained(out / "export" / "text_encoder")
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_pipeline, text_encoder=encoder)
    embeds = pipeline.encode_prompt("a red cat", "cpu", 1, False)[0]
    base = StableDiffusionPipeline.from_pretrained(tiny_pipeline).encode_prompt("a red cat", "cpu", 1, False)[0]
    assert not torch.allclose(embeds, base)
    trained = load_file(out / "checkpoints" / "step-000002" / "model.safetensors")
    exported = load_file(out / "export" / "text_encoder" / "model.safetensors")
    assert len(exported) == len(trained)
    assert all(name.startswith("text_model.") for name in exported)
    picture = pipeline("a red cat", num_inference_steps=2, output_type="np").images
    assert picture.shape == (1, 16, 16, 3)


@pytest.mark.parametrize("train", ["full", "lora"])
def test_resume_continues_to_the_last_bit(recipe, tmp_path, train):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    settings = ["--set", f"trained.text.mode={train}", "--set", "trained.text.rank=2"]
    assert run(recipe, whole, *settings) == 0
    assert run(recipe, parts, *settings, "--set", "train.num_steps=4", "--set", "evaluate.every=0") == 0
    newest = parts / "checkpoints" / "step-000004"
    (newest / "model.safetensors").write_bytes(b"torn")  # as after a crash: the older one is used, and says so
    assert run(recipe, parts, *settings, "--resume") == 0
    for name in ("loss", "rewards", "grad_norm", "lr"):
        assert [row[name] for row in lines(parts)] == [row[name] for row in lines(whole)]
    for name in ("model.safetensors", "optimizer.safetensors", "rank-0000.safetensors"):
        a, b = (load_file(folder / "checkpoints" / "step-000004" / name) for folder in (whole, parts))
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a)
    if train == "lora":
        assert (parts / "export" / "lora" / "kohya.safetensors").is_file()


def test_a_finished_run_goes_on_with_prompts_that_it_has_not_seen(recipe, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    constant = ["--set", "train.lr_schedule=constant"]
    assert run(recipe, whole, *constant) == 0
    assert run(recipe, parts, *constant, "--set", "train.num_steps=2") == 0
    assert run(recipe, parts, *constant, "--resume") == 0
    assert [row["loss"] for row in lines(parts)] == [row["loss"] for row in lines(whole)]
    a, b = (load_file(folder / "checkpoints" / "step-000004" / "optimizer.safetensors") for folder in (whole, parts))
    assert int(a["objective.samples_seen"]) == int(b["objective.samples_seen"]) == 8


def test_resume_without_a_good_checkpoint_is_an_error(recipe, tmp_path, capsys):
    out = tmp_path / "run"
    assert run(recipe, out, "--set", "train.num_steps=2") == 0
    for file in out.glob("checkpoints/*/manifest.json"):
        file.unlink()
    before = (out / "metrics.jsonl").read_bytes()
    assert run(recipe, out, "--resume", "--set", "train.num_steps=2") == 2
    assert "no usable checkpoint" in capsys.readouterr().err
    assert (out / "metrics.jsonl").read_bytes() == before


def test_frozen_parts_do_not_change_by_a_bit(recipe, tmp_path, monkeypatch):
    seen = {}
    original = Trainer.run

    def watched(self):
        model, text = self.evaluator.model, self.engine.module.parts["text"]
        modules = {"unet": model.network.module, "vae": model.vae, "original": text.original}
        before = {k: {n: p.clone() for n, p in m.state_dict().items()} for k, m in modules.items()}
        original(self)
        for key, module in modules.items():
            seen[key] = all(torch.equal(p, before[key][n]) for n, p in module.state_dict().items())
            assert all(p.grad is None for p in module.parameters())

    monkeypatch.setattr(Trainer, "run", watched)
    assert run(recipe, tmp_path / "run") == 0
    assert seen == {"unet": True, "vae": True, "original": True}


def test_an_encoder_that_does_not_learn_is_noticed(recipe, tmp_path, monkeypatch, capsys):
    from fastcraft.families.image_model import ImageModel
    from fastcraft.records import PromptEmbeds, TextEmbeds

    condition = ImageModel.condition

    def cut_off(self, embeds):
        """The classic: the graph to the encoder is lost, the loss still has a gradient function."""
        cond, uncond = embeds.cond.sequence, embeds.uncond.sequence.detach()
        lost = TextEmbeds(sequence=cond.detach() + 0 * cond)
        return condition(self, PromptEmbeds(cond=lost, uncond=TextEmbeds(sequence=uncond)))

    monkeypatch.setattr(ImageModel, "condition", cut_off)
    assert run(recipe, tmp_path / "run", "--set", "train.weight_decay=0") == 1
    assert (
        "these groups have no gradient or have not moved: ['text.embeddings', 'text.encoder" in capsys.readouterr().err
    )


BAD_REWARD = '''
from fastcraft.rewards.brightness import BrightnessReward
import torch

class Bad(BrightnessReward):
    """NaN in the given calls."""
    name = "bad"
    calls = 0
    when = ()
    def forward(self, images, prompts):
        score = super().forward(images, prompts)
        if images.requires_grad:
            Bad.calls += 1
            if Bad.calls in Bad.when:
                return score * torch.tensor(float("nan"))
        return score
'''


@pytest.fixture
def bad_reward(tmp_path, monkeypatch):
    import sys

    (tmp_path / "bad_reward_module.py").write_text(BAD_REWARD)
    monkeypatch.syspath_prepend(tmp_path)
    sys.modules.pop("bad_reward_module", None)
    import bad_reward_module

    yield bad_reward_module.Bad
    sys.modules.pop("bad_reward_module", None)


def test_a_nan_step_is_skipped_and_counted(recipe, tmp_path, bad_reward, capsys):
    bad_reward.when = (2,)
    out = tmp_path / "run"
    assert run(recipe, out, "--set", 'rewards.0.name="bad_reward_module:Bad"') == 0
    assert [row["skipped"] for row in lines(out)] == [False, True, False, False]
    assert lines(out)[1]["loss"] is None
    assert "1 in a row" in capsys.readouterr().err + capsys.readouterr().out
    weights = load_file(out / "export" / "text_encoder" / "model.safetensors")
    assert all(weight.isfinite().all() for weight in weights.values())


def test_too_many_nan_steps_stop_the_run_with_a_good_checkpoint(recipe, tmp_path, bad_reward, capsys):
    bad_reward.when = (2, 3, 4)
    out = tmp_path / "run"
    assert run(recipe, out, "--set", 'rewards.0.name="bad_reward_module:Bad"', "--set", "train.max_bad_steps=2") == 1
    assert "2 steps in a row had a loss or gradient that is not finite" in capsys.readouterr().err
    newest = sorted((out / "checkpoints").iterdir())[-1]
    assert newest.name == "step-000003"
    assert all(weight.isfinite().all() for weight in load_file(newest / "model.safetensors").values())


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_signal_between_denoising_steps_saves_the_completed_step(recipe, tmp_path, monkeypatch, accumulation):
    from fastcraft.families.unet import UNetNetwork

    # the first evaluation, one step, then in the middle of the second one's last micro-step
    calls, last = [], 4 + 4 * accumulation + 4 * (accumulation - 1) + 2
    predict = UNetNetwork.predict
    settings = ["--set", f"train.gradient_accumulation_steps={accumulation}"]

    def counted(*args, **kwargs):
        calls.append(1)
        if len(calls) == last:
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGTERM)
        return predict(*args, **kwargs)

    monkeypatch.setattr(UNetNetwork, "predict", counted)
    out = tmp_path / "run"
    assert run(recipe, out, *settings, "--set", "memory.policy=none") == 143
    assert len(calls) == last  # nothing more was computed
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-000001"]
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    monkeypatch.undo()
    torch.set_num_threads(1)
    assert run(recipe, out, *settings, "--resume") == 0
    whole = tmp_path / "whole"
    assert run(recipe, whole, *settings) == 0
    assert [row["loss"] for row in lines(out)] == [row["loss"] for row in lines(whole)]


class Noted:
    """A UNet that is as it was, and says what an accelerated one may say."""

    def __init__(self, unet):
        self.unet, self.notes = unet, ["kernels.compile: runs eager on other latents"]

    def __getattr__(self, name):
        return getattr(self.unet, name)

    def __call__(self, *args, **kwargs):
        return self.unet(*args, **kwargs)

    def take_notes(self):
        taken, self.notes = self.notes, []
        return taken


def test_an_accelerated_run_says_so_and_what_ran_slower_once(recipe, tmp_path, monkeypatch, capsys):
    def accelerate(probe, *, compile, cuda_graphs):
        assert (compile, cuda_graphs) == ("prefix", "none")
        return Noted(probe.model.network.module), "kernels.compile = 'prefix': ready after 0 s"

    monkeypatch.setattr("fastcraft.build.plan.accelerate", accelerate)
    assert run(recipe, tmp_path / "run", "--set", "kernels.compile=prefix") == 0
    printed = capsys.readouterr()
    for text in ("'prefix': ready after 0 s", "runs eager on other latents"):
        assert (printed.out + printed.err).count(text) == 1


def test_dry_run_prints_the_plan_and_writes_nothing(recipe, tmp_path, capsys):
    assert run(recipe, tmp_path / "run", "--dry-run") == 0
    printed = capsys.readouterr().out
    assert "2 steps with gradient: 2 recompute; decode recompute" in printed
    assert "trainable" in printed
    assert "GFLOP" in printed
    assert "backprop_steps = 2" in printed
    assert not (tmp_path / "run").exists()


def bad_inputs(tmp: Path):
    (tmp / "empty.txt").write_text("\n\n")
    (tmp / "binary.txt").write_bytes(b"\x00\x01\xff")
    (tmp / "long.txt").write_text("x" * 5000)
    (tmp / "broken.json").write_text("{")
    (tmp / "stage3.json").write_text('{"zero_optimization": {"stage": 3}}')
    (tmp / "contradiction.json").write_text('{"train_micro_batch_size_per_gpu": 64, "zero_optimization": {"stage": 2}}')
    (tmp / "no_model").mkdir()
    (tmp / "file_as_dir").write_text("x")


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--recipe", "shapez"], "unknown recipe 'shapez'; did you mean 'shapes'"),
        (
            ["--set", "objective.backprop_steps=5"],
            "objective.backprop_steps must be at most 4 with 4 denoising steps, got 5",
        ),
        (["--set", "train.batch_size=0"], "train.batch_size must be at least 1, got 0"),
        (["--set", "train.batch_size=-3"], "train.batch_size must be at least 1, got -3"),
        (["--set", "train.nun_steps=1"], "unknown key 'train.nun_steps'; did you mean 'num_steps'"),
        (["--set", 'rewards.0.name="brightnes"'], "unknown reward 'brightnes'; did you mean 'brightness'"),
        (["--set", 'memory.policy="stop"'], "memory.policy: unknown policy 'stop'; did you mean 'step'"),
        (["--set", 'sampler.name="ddpm"'], "sampler.name: unknown sampler 'ddpm'; did you mean 'ddim'"),
        (["--set", 'objective.name="reward_backprob"'], "objective.name: unknown objective 'reward_backprob'"),
        (["--set", "model.resolution=17"], "model.resolution must be a multiple of 16, got 17"),
        (["--model", "{tmp}/gone"], "model.path: expected a model folder or a hub id 'owner/name', got"),
        (["--model", "{tmp}/no_model"], "has no readable model_index.json"),
        (["--prompts", "{tmp}/gone.txt"], "gone.txt"),
        (["--prompts", "{tmp}/empty.txt"], "empty.txt"),
        (["--prompts", "{tmp}/binary.txt"], "binary.txt"),
        (["--prompts", "{tmp}/long.txt"], "long.txt"),
        (["--prompts", "{tmp}"], "prompts"),
        (["--prompts", "shapes:nothing"], "unknown bundled prompts 'shapes:nothing'"),
        (["--ds_config", "{tmp}/gone.json"], "gone.json"),
        (["--ds_config", "{tmp}/broken.json"], "broken.json"),
        (["--ds_config", "{tmp}/stage3.json"], "stage"),
        (["--ds_config", "{tmp}/contradiction.json"], "64"),
        (["--run-dir", "{tmp}/file_as_dir"], "expected a directory, got the file"),
        (["--resume"], "holds no run"),
        (["--set", 'evaluate.exam="nothing:here"'], "evaluate.exam: cannot load 'nothing:here'"),
    ],
)
def test_bad_input_is_one_line_and_status_2(recipe, tmp_path, capsys, extra, message):
    bad_inputs(tmp_path)
    before = sorted(tmp_path.iterdir())
    assert run(recipe, tmp_path / "run", *(item.replace("{tmp}", str(tmp_path)) for item in extra)) == 2
    captured = capsys.readouterr()
    (line,) = captured.err.strip().splitlines()
    assert line.startswith("fastcraft: error: ")
    import re

    assert re.search(message, line), line
    assert "Traceback" not in captured.err + captured.out
    assert sorted(tmp_path.iterdir()) == before  # nothing half-written


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "the following arguments are required: --ds_config"),
        (["--ds_config", "ds_configs/zero2.json", "--steps", "3"], "unrecognized arguments: --steps 3"),
        (["--ds_config"], "argument --ds_config: expected one argument"),
    ],
)
def test_a_wrong_flag_is_one_line_and_status_2(argv, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2
    assert capsys.readouterr().err == f"deepspeed fastcraft/train.py: error: {message}\n"


@pytest.mark.parametrize("part", ["unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"])
def test_corrupt_weights_are_named(recipe, tmp_path, tiny_pipeline, capsys, part):
    import shutil

    model = tmp_path / "model"
    shutil.copytree(tiny_pipeline, model)
    (model / part).write_bytes((model / part).read_bytes()[:1000])
    assert run(recipe, tmp_path / "run", "--model", str(model)) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert f"model.path: cannot load {model / part.split('/')[0]}" in line


def test_half_matching_weights_are_refused(recipe, tmp_path, tiny_pipeline, capsys):
    import shutil

    from safetensors.torch import save_file

    model = tmp_path / "model"
    shutil.copytree(tiny_pipeline, model)
    file = model / "text_encoder" / "model.safetensors"
    weights = load_file(file)
    weights.pop(next(name for name in weights if "mlp.fc1.weight" in name))
    save_file(weights, file, metadata={"format": "pt"})
    assert run(recipe, tmp_path / "run", "--model", str(model)) == 2
    assert "do not match the architecture: 1 missing" in capsys.readouterr().err


def test_a_pickle_that_runs_code_is_refused(recipe, tmp_path, tiny_pipeline, capsys):
    import pickle
    import shutil

    class Payload:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "executed",))

    model = tmp_path / "model"
    shutil.copytree(tiny_pipeline, model)
    (model / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    (model / "unet" / "diffusion_pytorch_model.bin").write_bytes(pickle.dumps(Payload()))
    assert run(recipe, tmp_path / "run", "--model", str(model)) == 2
    assert "model.path: cannot load" in capsys.readouterr().err
    assert not (tmp_path / "executed").exists()


def test_a_plain_pickle_of_tensors_is_read(recipe, tmp_path, tiny_pipeline):
    import shutil

    model = tmp_path / "model"
    shutil.copytree(tiny_pipeline, model)
    file = model / "unet" / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(file), file.with_suffix(".bin"))
    file.unlink()
    assert run(recipe, tmp_path / "run", "--model", str(model), "--dry-run") == 0
