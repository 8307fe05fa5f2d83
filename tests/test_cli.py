"""The console command: its table, its files, and one line for every bad input."""

import ast
import json
from pathlib import Path

import pytest
import torch

from fastcraft.cli import main

ROOT = Path(__file__).parents[1]


def run(capsys, *argv):
    try:
        status = main(argv)
    except SystemExit as stop:
        status = stop.code
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_info_names_every_module_with_its_op_or_the_reason(capsys, tiny_pipeline):
    status, out, err = run(capsys, "info", "--model", str(tiny_pipeline))
    rows = {line.split()[0]: line for line in out.splitlines() if line.startswith("  ")}
    assert (status, err) == (0, "")
    assert rows["unet.down_blocks.0.resnets.0"].endswith("ResnetBlock2D          group_norm_silu + frozen_conv2d")
    where = "unet.mid_block.attentions.0.transformer_blocks.0"
    assert rows[where].endswith("layer_norm")
    assert rows[f"{where}.attn1"].endswith("left: its head width is 32 / 4; the kernels know 40, 64, 80, 160")
    assert rows["vae.decoder.conv_norm_out"].endswith("group_norm_silu")
    assert any(line.startswith("AutoencoderKL: ") and "2 left as they are" in line for line in out.splitlines())


def test_info_shapes_has_the_reward_too(capsys):
    out = run(capsys, "info", "--model", "shapes")[1]
    rows = {line.split()[0] for line in out.splitlines() if line.startswith("  ")}
    assert {"unet.conv_in", "vae.decoder.conv_norm_out", "reward.encoder.layers.0"} <= rows


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without a GPU says")
def test_info_says_why_no_kernel_runs_here(capsys, tiny_pipeline):
    assert (
        "none on this machine: the kernels need a CUDA device" in run(capsys, "info", "--model", str(tiny_pipeline))[1]
    )
    status, out, err = run(capsys, "info", "--measure-attention")
    assert (status, out) == (2, "")
    assert (
        err
        == "fastcraft: error: info: --measure-attention: measure_attention: a CUDA device must be present, found none\n"
    )


def test_info_writes_the_measured_table(capsys, tmp_path, monkeypatch):
    """The command around the measurement, which itself needs a GPU."""
    import fastcraft_kernels.attention as package

    row = {
        "arch": 90, "head_dim": 40, "sequence": 64, "direction": "forward", "provider": "flash", "origin": "a test",
        "milliseconds": {"triton": 0.25, "flash": 0.125}, "refused": {"cudnn": "no head width 40"},
    }  # fmt: skip

    def measured(path):
        Path(path).write_text(json.dumps({"rows": [row]}))
        return {"rows": [row]}

    monkeypatch.setattr(package, "measure_attention", measured)
    file = tmp_path / "table.json"
    status, out, _ = run(capsys, "info", "--measure-attention", "--out", str(file))
    assert status == 0
    assert "flash 0.125, triton 0.250; cudnn refused: no head width 40" in out
    assert f"--set kernels.attention_table={file}" in out
    assert json.loads(file.read_text())["rows"] == [row]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ((), "the following arguments are required: COMMAND"),
        (("inof",), "invalid choice: 'inof'"),
        (("info", "--modle", "x"), "unrecognized arguments: --modle x"),
        (("info",), "info: one of --rewards, --model, --measure-attention is required, got none"),
        (("info", "--model", "x", "--out", "t.json"), "info: --out needs --measure-attention, got 't.json' alone"),
        (("info", "--model", "/nowhere"), "--model: /nowhere has no unet/config.json"),
        (("info", "--measure-attention", "--out", "/nowhere/t.json"), "info: --out: no folder '/nowhere'"),
    ],
)
def test_bad_input_is_one_line_and_status_2(capsys, argv, message):
    status, out, err = run(capsys, *argv)
    assert (status, out) == (2, "")
    assert message in err
    assert err.startswith("fastcraft: error: ") or err.startswith("fastcraft info: error: ")
    assert err.count("\n") == 1


def test_what_is_no_model_is_refused(capsys, tmp_path):
    _, _, err = run(capsys, "info", "--model", str(tmp_path))
    assert f"--model: {tmp_path} is neither a diffusers folder nor a CLIP folder nor a reward's weights" in err
    for text, message in (("{", "cannot read"), ('{"model_type": "bert"}', "must hold a CLIPModel, got model type 'b")):
        (tmp_path / "config.json").write_text(text)
        status, _, err = run(capsys, "info", "--model", str(tmp_path))
        assert (status, err.count("\n")) == (2, 1)
        assert message in err


def test_a_broken_config_is_named(capsys, tmp_path):
    for part in ("unet", "vae"):
        (tmp_path / part).mkdir()
        (tmp_path / part / "config.json").write_text('{"down_block_types": ["Nonsense"]}')
    status, _, err = run(capsys, "info", "--model", str(tmp_path))
    assert status == 2
    assert err.startswith(f"fastcraft: error: --model: cannot build {tmp_path / 'unet'}: ")


def test_setup_installs_the_command():
    (call,) = [
        n.value
        for n in ast.parse((ROOT / "setup.py").read_text()).body
        if isinstance(n, ast.Expr) and isinstance(n.value, ast.Call)
    ]
    (points,) = [ast.literal_eval(k.value) for k in call.keywords if k.arg == "entry_points"]
    assert points == {"console_scripts": ["fastcraft = fastcraft.cli:main"]}
