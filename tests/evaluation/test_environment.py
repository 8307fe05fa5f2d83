"""The environment says what it ran on and nothing about whose machine it is."""

import getpass
import json
import os
import re
import shutil
import socket
import subprocess
from pathlib import Path

import pytest
import torch

import fastcraft
from fastcraft.evaluation.environment import PACKAGES, environment


def strings(tree):
    if isinstance(tree, dict):
        return [text for item in tree.values() for text in strings(item)] + list(tree)
    if isinstance(tree, list):
        return [text for item in tree for text in strings(item)]
    return [tree] if isinstance(tree, str) else []


def test_versions_and_devices():
    facts = environment()
    assert facts == json.loads(json.dumps(facts))
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["versions"]["fastcraft"] == fastcraft.__version__
    assert set(facts["versions"]) == {"fastcraft", "python", *PACKAGES}
    assert len(facts["devices"]) == torch.cuda.device_count()
    assert facts["num_cores"] >= 1
    assert facts["memory_mib"] > 256


def test_nothing_private(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_" + "x" * 30)
    texts = strings(environment())
    home = str(Path.home())
    for private in (socket.gethostname(), "hf_xxx", home if home != "/" else "/home/"):
        assert not any(private in text for text in texts), f"{private!r} is in the environment"
    user = getpass.getuser()
    assert not any(re.search(rf"\b{re.escape(user)}\b", text) for text in texts), f"{user!r} is in the environment"
    paths = [text for text in texts if text.startswith(os.sep) or re.search(r"\w/\w+/\w", text)]
    assert not paths, "a path is in the environment"


def test_a_missing_package_is_null(monkeypatch):
    monkeypatch.setattr("fastcraft.evaluation.environment.PACKAGES", ("no-such-package",))
    assert environment()["versions"]["no-such-package"] is None


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_commit_only_of_the_own_checkout(tmp_path, monkeypatch):
    def git(*arguments):
        identity = ("-c", "user.name=x", "-c", "user.email=x@example.org")
        command = ["git", "-C", str(tmp_path), *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    def commit_seen_from(module):
        monkeypatch.setattr(fastcraft, "__file__", str(module))
        facts = environment()
        return facts["git_commit"], facts["git_modified"]

    own, foreign = tmp_path / "fastcraft" / "__init__.py", tmp_path / "site-packages" / "fastcraft" / "__init__.py"
    for module in (own, foreign):
        module.parent.mkdir(parents=True)
        module.touch()
    assert commit_seen_from(own) == (None, None)
    git("init", "-q")
    git("add", ".")
    git("commit", "-q", "-m", "first")
    assert commit_seen_from(own) == (git("rev-parse", "HEAD"), False)
    assert commit_seen_from(foreign) == (None, None)
    own.write_text("changed")
    assert commit_seen_from(own) == (git("rev-parse", "HEAD"), True)
