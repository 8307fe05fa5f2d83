"""Recipes: what is read, what is refused and in which words."""

import tomllib

import pytest

from fastcraft.config import dump_recipe, load_recipe, recipe_from_tree, recipe_names
from fastcraft.errors import UserError


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_loads_and_survives_a_round_trip(name):
    recipe = load_recipe(name)
    assert recipe.rewards
    assert recipe_from_tree(tomllib.loads(dump_recipe(recipe))) == recipe


def test_round_trip_keeps_awkward_strings():
    recipe = load_recipe("shapes", replaced={"model.path": 'a "b" \\ c\n\t\x7f é'})
    assert recipe_from_tree(tomllib.loads(dump_recipe(recipe))).model.path == 'a "b" \\ c\n\t\x7f é'


def test_overrides_reach_sections_and_reward_tables():
    recipe = load_recipe(
        "shapes", ["train.seed=7", "rewards.0.weight=3", "train.dtype=bfloat16", "train.betas=[0, 0.5]"]
    )
    assert recipe.train.seed == 7
    assert recipe.rewards[0].weight == 3.0
    assert recipe.train.dtype == "bfloat16"
    assert recipe.train.betas == (0.0, 0.5)


def test_textcraftor_has_the_papers_settings():
    recipe = load_recipe("textcraftor_sd15")
    assert (recipe.sampler.num_inference_steps, recipe.objective.settings.backprop_steps) == (25, 5)
    assert (recipe.sampler.guidance_scale, recipe.sampler.eta, recipe.train.learning_rate) == (7.5, 0.0, 1e-6)
    assert (recipe.text.prefix_encoder, recipe.text.uncond_encoder) == ("original", "trained")
    assert {name: part.mode for name, part in recipe.trained.items()} == {"text": "full"}
    assert {reward.name: reward.weight for reward in recipe.rewards} == {
        "clip": 50.0, "aesthetic": 3.0, "pickscore": 1.0, "hpsv2": 100.0
    }  # fmt: skip
    assert all(reward.options == {"resize": "area"} for reward in recipe.rewards)
    assert recipe.rewards[0].path.endswith("CLIP-ViT-g-14-laion2B-s34B-b88K")


def test_refl_has_the_papers_reward():
    recipe = load_recipe("refl_sd15")
    assert [(reward.name, reward.weight) for reward in recipe.rewards] == [("imagereward", 1.0)]
    assert (recipe.objective.settings.hinge_margin, recipe.objective.settings.loss_scale) == (2.0, 1e-3)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.seeed=1", r"unknown key 'train.seeed'; did you mean 'seed'\?"),
        ("trian.seed=1", r"unknown key 'trian'; did you mean 'train'\?"),
        ("train.seed=x", "train.seed: expected int, got 'x'"),
        ("train.seed=true", "train.seed: expected int, got True"),
        ("train.seed=-1", "train.seed must be at least 0, got -1"),
        ("train.batch_size=0", "train.batch_size must be at least 1, got 0"),
        ("train.learning_rate=0", "train.learning_rate must be greater than 0, got 0.0"),
        ("train.learning_rate=nan", "train.learning_rate must be finite, got nan"),
        ("sampler.guidance_scale=inf", "sampler.guidance_scale must be finite, got inf"),
        ("sampler.eta=1.5", "sampler.eta must be at most 1, got 1.5"),
        ("train.betas=[0.9]", r"train.betas: expected a list of 2 values, got \[0.9\]"),
        ("train.betas=[0.9, 1]", r"train.betas must lie in \[0, 1\), got \[0.9, 1.0\]"),
        (
            "train.dtype=bfloat",
            r"train.dtype must be one of 'float32', 'bfloat16', got 'bfloat'; did you mean 'bfloat16'",
        ),
        ("objective.backprop_steps=26", "objective.backprop_steps must be at most 25 with 25 denoising steps, got 26"),
        ("objective.low_variance_draws=2", "objective.low_variance_draws above 1 needs backprop_steps = 1"),
        ("objective.early_stop_steps=2", "objective.early_stop_steps needs truncation = 'spaced', got 'last'"),
        ("evaluate.trained_steps=26", r"trained_steps must be at most sampler.num_inference_steps \(25\), got 26"),
        ("rewards.5.weight=1", "expected an index below 2, got '5'"),
        ("rewards.1.name=clip", "rewards: 'clip' is named twice; give one of them a label"),
        ("rewards.1.label=clip", "rewards: 'clip' is named twice"),
        ("evaluate.held_out_patience=0", "held_out_patience must be at least 1, got 0"),
        ("evaluate.held_out_action=warn", "held_out_action must be one of 'alarm', 'stop', got 'warn'"),
        ("text.train=lora", "text.train is called trained.text.mode now"),
        ("text.lora_rank=4", "text.lora_rank is called trained.text.rank now"),
        ("text.lora_alpha=4", "text.lora_alpha is called trained.text.alpha now"),
        ("text.gradient_checkpointing=true", "is called trained.text.gradient_checkpointing now"),
        ("trained.text.mode=half", "trained.text.mode must be one of 'full', 'lora', 'none', got 'half'"),
        ("trained.text.rank=0", "trained.text.rank must be at least 1, got 0"),
        ("trained.text.alpha=0", "trained.text.alpha must be greater than 0, got 0.0"),
        ("trained.text.ema_decay=1", r"trained.text.ema_decay must lie in \[0, 1\), got 1.0"),
        ("trained.text.mode=none", "trained: at least one part must have a mode other than 'none'"),
        ("trained.vae.mode=full", "trained: a part is one of text, unet, got 'vae'"),
        ("trained.unet.gradient_checkpointing=true", "trained.unet.gradient_checkpointing is for text encoders"),
        ("objective.name=reward_backprob", "objective.name: unknown objective 'reward_backprob'; did you mean"),
        ("objective.backprop_step=1", r"unknown key 'objective.backprop_step'; did you mean 'backprop_steps'\?"),
        ("objective.backprop_steps=0", "objective.backprop_steps must be at least 1, got 0"),
        ("train", "expected SECTION.KEY=VALUE, got 'train'"),
        ("seed=1", "expected SECTION.KEY=VALUE, got key 'seed'"),
        ("train.num_steps.x=1", "'num_steps' is a value, not a section"),
    ],
)
def test_bad_values_are_named(override, message):
    with pytest.raises(UserError, match=message) as caught:
        load_recipe("shapes", [override])
    assert "\n" not in str(caught.value)


def test_unknown_recipe_suggests_the_nearest():
    with pytest.raises(UserError, match="unknown recipe 'shape'; did you mean 'shapes'"):
        load_recipe("shape")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[train\n", "is not TOML"),
        (b"\xff\xfe\x00", "is not TOML"),
        (b"train = 3\n", "train: expected a table, got 3"),
        (b"[[rewards]]\nweight = 1\n", "rewards.0.name is required"),
        (b"[[rewards]]\nname = 'clip'\nweight = 0\n", "at least one weight must not be 0"),
        (b"[[held_out]]\nname = 'a'\n[[held_out]]\nname = 'b'\nlabel = 'a'\n", "held_out: 'a' is named twice"),
    ],
)
def test_bad_files_are_named(tmp_path, content, message):
    path = tmp_path / "recipe.toml"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_recipe(str(path))


def test_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"cannot read .*gone\.toml.*No such file"):
        load_recipe(str(tmp_path / "gone.toml"))
