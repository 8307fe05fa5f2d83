"""``fastcraft info`` and the dispatcher."""

import importlib

import pytest

from fastcraft.cli import COMMANDS, main
from fastcraft.commands.info import TOPICS
from fastcraft.rewards import REWARDS


def test_rewards_are_listed_with_their_files(capsys):
    assert main(["info", "--rewards"]) == 0
    out = capsys.readouterr().out
    rows = {line.split()[0]: line.split() for line in out.split("\n\n")[0].splitlines()}
    assert set(REWARDS.names()) <= set(rows)
    assert rows["hpsv2"][1:3] == ["yes", "yes"]
    assert rows["jpeg_size"][1:3] == ["no", "no"]
    assert rows["callable"][1:3] == ["if", "stated"]
    for file in ("HPS_v2.1_compressed.pt from hub xswu/HPSv2", "ImageReward.pt from hub THUDM/ImageReward"):
        assert file in out
    assert "not in " in out or "found: " in out


def test_what_is_found_is_said(capsys, monkeypatch, tmp_path):
    import torch

    from fastcraft.rewards.aesthetic import RELEASED_HEAD

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / RELEASED_HEAD.name).write_bytes(b"x")
    assert main(["info", "--rewards"]) == 0
    assert f"found: {tmp_path / 'checkpoints' / RELEASED_HEAD.name}" in capsys.readouterr().out


def test_info_needs_a_topic(capsys):
    assert main(["info"]) == 2
    assert "one of --rewards" in capsys.readouterr().err


@pytest.mark.parametrize("path", [*COMMANDS.values(), *TOPICS.values()])
def test_every_entry_is_a_module_with_what_it_needs(path):
    module = importlib.import_module(path)
    assert callable(module.add_arguments)
    assert callable(module.run)


def test_help_and_a_wrong_command(capsys):
    for arguments, status in ((["--help"], 0), (["scor"], 2), ([], 2)):
        with pytest.raises(SystemExit) as error:
            main(arguments)
        assert error.value.code == status
    assert "score" in capsys.readouterr().out
