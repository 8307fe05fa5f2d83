"""Folders put in place by renames."""

import hashlib

from fastcraft.durable import put_in_place, recover, retired, sha256, write_text


def make(folder, content):
    folder.mkdir()
    write_text(folder / "file", content)
    return folder


def test_the_old_folder_gives_way_to_the_new_one(tmp_path):
    final = tmp_path / "final"
    for content in ("old", "new"):
        put_in_place(make(tmp_path / "beside", content), final)
        assert (final / "file").read_text() == content
        assert [path.name for path in tmp_path.iterdir()] == ["final"]


def test_recover_at_each_moment_of_a_kill(tmp_path):
    final = make(tmp_path / "final", "old")
    recover(final)
    assert (final / "file").read_text() == "old"
    final.rename(retired(final))  # killed between the renames
    recover(final)
    assert (final / "file").read_text() == "old"
    make(retired(final), "older")  # killed before the deletion
    recover(final)
    assert (final / "file").read_text() == "old"
    assert not retired(final).exists()


def test_sha256(tmp_path):
    write_text(tmp_path / "file", "ä")
    assert sha256(tmp_path / "file") == hashlib.sha256("ä".encode()).hexdigest()
