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
    files = [released for name in REWARDS.names() for released in REWARDS.get(name).files]
    places = [line.strip() for line in out.splitlines() if line.strip().startswith(("found: ", "not in "))]
    assert [line.startswith("found: ") for line in places] == [bool(released.cached()) for released in files]
    assert len(files) > 5


def test_what_is_found_is_said(capsys, monkeypatch, tmp_path):
    import torch

    from fastcraft.rewards.aesthetic import RELEASED_HEAD

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / RELEASED_HEAD.name).write_bytes(b"x")
    assert main(["info", "--rewards"]) == 0
    assert f"found: {tmp_path / 'checkpoints' / RELEASED_HEAD.name}" in capsys.readouterr().out
    (tmp_path / "checkpoints" / RELEASED_HEAD.name).unlink()
    assert main(["info", "--rewards"]) == 0
    assert f"{RELEASED_HEAD.name} from {RELEASED_HEAD.origin}\n" + " " * 15 + "not in " in capsys.readouterr().out


def test_info_needs_a_topic(capsys):
    assert main(["info"]) == 2
    assert "one of --rewards" in capsys.readouterr().err


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_its_own_help(name, capsys):
    with pytest.raises(SystemExit) as stop:
        main([name, "--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert out.startswith(f"usage: fastcraft {name} ")
    assert " ".join(importlib.import_module(COMMANDS[name]).HELP.split()) in " ".join(out.split())


@pytest.mark.parametrize("flag", TOPICS)
def test_every_topic_has_its_flag_and_is_run_by_it_alone(flag, capsys, monkeypatch):
    ran = []
    for topic, path in TOPICS.items():
        monkeypatch.setattr(f"{path}.run", lambda args, topic=topic: ran.append(topic) or 0)
    option = "--" + flag.replace("_", "-")
    assert main(["info", option, *(["x"] if flag == "model" else [])]) == 0
    assert ran == [flag]


def test_help_and_a_wrong_command(capsys):
    for arguments, status in ((["--help"], 0), (["scor"], 2), ([], 2)):
        with pytest.raises(SystemExit) as error:
            main(arguments)
        assert error.value.code == status
    assert "score" in capsys.readouterr().out
