"""Checkpoints: whole or absent, checksummed, of one run at a time."""

import errno
import os

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("pyarrow")

from bertfast.commands.errors import UserError  # noqa: E402
from bertfast.recipes.pretrain import checkpoints  # noqa: E402
from bertfast.recipes.pretrain.checkpoints import Checkpoint  # noqa: E402


def made(step):
    weights = {"weight": torch.full((1000,), float(step))}
    return Checkpoint(step, {"place": [0, 0, step, step]}, weights, {"state": {"step": step}})


def steps(folder):
    return [step for step, _ in checkpoints.listed(folder)]


def test_the_last_ones_are_kept_and_read(tmp_path):
    assert checkpoints.latest(tmp_path) is None
    for step in (3, 6, 100_000_000, 9):
        checkpoints.write(tmp_path, made(step), keep=2)
    assert steps(tmp_path) == [100_000_000, 9]
    found = checkpoints.latest(tmp_path)
    assert found.step == 100_000_000 and found.run == {"place": [0, 0, found.step, found.step]}
    assert torch.equal(found.model["weight"], made(found.step).model["weight"])
    assert found.optimizer == {"state": {"step": found.step}}


def cut(path):
    path.write_bytes(path.read_bytes()[:-7])


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("harm", [cut, flip, os.unlink], ids=["cut", "one bit", "gone"])
@pytest.mark.parametrize("name", ["model.pt", "optimizer.pt", "run.json", "manifest.json"])
def test_a_damaged_one_is_put_aside(name, harm, tmp_path):
    for step in (1, 2):
        path = checkpoints.write(tmp_path, made(step), keep=2)
    harm(path / name)
    with pytest.warns(UserWarning, match="step-00000002' is damaged .*the one before it is taken"):
        assert checkpoints.latest(tmp_path).step == 1
    assert steps(tmp_path) == [1] and (tmp_path / "damaged-step-00000002").is_dir()
    (tmp_path / "step-00000001" / "run.json").unlink()
    with pytest.warns(UserWarning), pytest.raises(UserError, match="no checkpoint .* is whole"):
        checkpoints.latest(tmp_path)


def test_without_room_the_one_before_stays(tmp_path, monkeypatch):
    checkpoints.write(tmp_path, made(1), keep=2)
    write = checkpoints.Hashed.write
    left = 3000

    def limited(self, data):
        nonlocal left
        left -= len(data)
        if left < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(self, data)

    monkeypatch.setattr(checkpoints.Hashed, "write", limited)
    text = "of step 2 can't be .*no space is left on the disk. step-00000001 is there to go on from"
    with pytest.raises(UserError, match=text):
        checkpoints.write(tmp_path, made(2), keep=2)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    assert checkpoints.latest(tmp_path).step == 1


def test_files_are_flushed_before_the_rename(tmp_path, monkeypatch):
    flushed, renamed = [], []
    fsync, rename = os.fsync, type(tmp_path).rename
    monkeypatch.setattr(
        os, "fsync", lambda d: (flushed.append(os.readlink(f"/proc/self/fd/{d}")), fsync(d))
    )
    monkeypatch.setattr(
        type(tmp_path), "rename", lambda p, t: (renamed.append(list(flushed)), rename(p, t))[1]
    )
    checkpoints.write(tmp_path, made(1), keep=1)
    (before,) = renamed
    names = {os.path.relpath(path, tmp_path) for path in before}
    aside = "step-00000001.writing"
    files = ("model.pt", "optimizer.pt", "run.json", "manifest.json")
    assert names == {aside, *(f"{aside}/{name}" for name in files)}
    assert flushed[-1] == str(tmp_path)


def test_one_run_at_a_time(tmp_path):
    left = tmp_path / "checkpoints" / "step-00000009.writing"
    left.mkdir(parents=True)
    with checkpoints.locked(tmp_path):
        assert not left.exists()
        said = f"another run is at work in {str(tmp_path)!r}, process {os.getpid()}"
        with pytest.raises(UserError, match=said):
            with checkpoints.locked(tmp_path):
                pass
    with checkpoints.locked(tmp_path):
        pass


def test_a_folder_that_cant_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--out: .*/file/run' can't be written"):
        with checkpoints.locked(tmp_path / "file" / "run"):
            pass
