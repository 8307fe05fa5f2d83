"""What is read of a model folder's scheduler, and what is refused before any weights are read."""

import json
import shutil

import pytest
import torch

from fastcraft.errors import UserError
from fastcraft.families.components import PARTS, load_components

SETTINGS = {"_class_name": "PNDMScheduler", "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def load(folder, scheduler):
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler), encoding="utf-8")
    return load_components(folder, dtype=torch.float32, device=torch.device("cpu"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"clip_sample": True}, "clip_sample must be false, got True"),
        ({"thresholding": True}, "thresholding must be false, got True"),
        ({"prediction_type": "sample"}, "prediction_type must be 'epsilon' or 'v_prediction', got 'sample'"),
        ({"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr (alphas_cumprod that end in 0) needs"),
        ({"beta_schedule": "cosine"}, "beta_schedule 'cosine' is not supported"),
        ({"num_train_timesteps": -1}, "number of steps must be non-negative"),
        ({"beta_start": "low"}, "scheduler: "),
    ],
    ids=str,
)
def test_refused_in_one_line(tmp_path, change, message):
    for part in PARTS:
        (tmp_path / part).mkdir()
    (tmp_path / "model_index.json").write_text('{"unet": [], "text_encoder": []}', encoding="utf-8")
    with pytest.raises(UserError) as raised:
        load(tmp_path, SETTINGS | change)
    assert str(raised.value).startswith("path: ")
    assert f"{tmp_path / 'scheduler'}" in str(raised.value)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_scheduler_that_says_nothing_of_clipping_is_read(tmp_path, tiny_pipeline):
    """PNDM's, of Stable Diffusion 2: to diffusers' DDIM the default is to clip."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_pipeline, folder)
    schedule = load(folder, SETTINGS | {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}).schedule
    assert (schedule.prediction_type, schedule.alpha_cumprod(999)) == ("v_prediction", 0.0)
