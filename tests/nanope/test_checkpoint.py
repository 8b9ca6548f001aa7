"""nanope/checkpoint.py: files that are whole and equal where their states are, and errors that name what is wrong."""
# ruff: noqa: F811 - pytest finds fixtures by their names; those of training.py are imported

import dataclasses
import os
import shutil
import threading
from pathlib import Path

import pytest
import torch
from models import BLOCK, close, config, shaken, tokens
from training import CPU, files_of, folders, one_thread, plain, same, small_files  # noqa: F401 - fixtures

from model import SCHEMES
from nanope import checkpoint, distributed
from nanope.checkpoint import build_model
from nanope.distributed import HostCopies


def test_equal_states_give_equal_files_also_once_read_from_one(tmp_path):
    state = {
        "config": {"pos": "rope", "schedule": "rope", "n": [1, "rope"]},
        "model": {"rope": torch.ones(2)},
        "step": 1,
    }
    copy = HostCopies().copy
    checkpoint.save(tmp_path / "a.pt", checkpoint.host_copy(state, copy))
    checkpoint.save(tmp_path / "b.pt", checkpoint.host_copy(checkpoint.load(tmp_path / "a.pt"), copy))
    texts = {"config": {"pos": "".join("rope"), "schedule": "".join("rope"), "n": [1, "".join("rope")]}}
    checkpoint.save(tmp_path / "c.pt", checkpoint.host_copy(state | texts, copy))
    assert (tmp_path / "a.pt").read_bytes() == (tmp_path / "b.pt").read_bytes() == (tmp_path / "c.pt").read_bytes()


def test_loading_names_what_is_wrong(plain, tmp_path):
    path = tmp_path / "step_1.pt"
    state = checkpoint.load(plain / "last.pt")
    checkpoint.save(path, state)
    assert same(checkpoint.load(path), state)
    content = path.read_bytes()
    for altered in (content[:-1], content[:1000], b"", content[:5000] + bytes([content[5000] ^ 1]) + content[5001:]):
        path.write_bytes(altered)
        with pytest.raises(ValueError, match="step_1.pt is truncated or altered"):
            checkpoint.load(path)
    torch.save({"weights": torch.zeros(2)}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="no checkpoint of train.py: it lacks model"):
        checkpoint.load(tmp_path / "other.pt")
    with pytest.raises(OSError, match="nothing.pt"):
        checkpoint.load(tmp_path / "nothing.pt")
    with pytest.raises(OSError, match="no run"):
        checkpoint.find(tmp_path / "nothing")
    with pytest.raises(OSError, match="no checkpoint '7'; it has last.pt, best.pt, step_12.pt, step_8.pt"):
        checkpoint.find(plain, "7")


@pytest.mark.parametrize("last", ["lost", "empty", "text", "dangling"])
def test_a_run_copied_without_links_has_its_newest_step_as_the_last(plain, tmp_path, last, capsys):
    run = tmp_path / "copy"
    (run / "checkpoints").mkdir(parents=True)
    for path in [*(plain / "checkpoints").iterdir(), plain / "best.pt"]:
        shutil.copy(path, run / path.relative_to(plain))
    newest = run / "checkpoints" / "step_12.pt"
    if last == "empty":
        (run / "last.pt").touch()
    if last == "text":  # what git, zip and some file systems make of a link
        (run / "last.pt").write_text("checkpoints/step_12.pt")
    if last == "dangling":
        (run / "last.pt").symlink_to("checkpoints/step_99.pt")
    assert checkpoint.find(run) == newest == checkpoint.find(run / "last.pt")
    assert capsys.readouterr().err.count(f"taking the newest, {newest}") == 2
    assert checkpoint.load_newest(run)["step"] == 12  # what a resumed run starts from
    assert checkpoint.find(run, "best") == run / "best.pt" and checkpoint.find(plain) == plain / "last.pt"
    (run / "best.pt").write_text("last.pt")
    with pytest.raises(OSError, match="no checkpoint 'best'; it has step_12.pt, step_8.pt"):
        checkpoint.find(run, "best")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("size", [2000, 100_000, 3_000_000])
def test_a_write_that_fails_leaves_the_old_file(tmp_path, size):
    path = tmp_path / "step_1.pt"
    state = {"model": {"w": torch.arange(10)}, "config": {}, "step": 1}
    checkpoint.save(path, state)
    before = files_of(tmp_path)
    with small_files(5000), pytest.raises(OSError, match="File too large.*step_1.pt"):
        checkpoint.save(path, {**state, "model": {"w": torch.zeros(size)}})
    assert files_of(tmp_path) == before and same(checkpoint.load(path), state)


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """After a power loss a name never leads to a part of the content, nor a new checkpoint to an old hash."""
    order, fsync, replace = [], os.fsync, os.replace

    def synced(descriptor):
        order.append(("fsync", os.fstat(descriptor).st_ino))
        fsync(descriptor)

    def renamed(source, target):
        if Path(target).name == "step_1.pt":
            assert not checkpoint.hash_path(Path(target)).exists()
        order.append(("replace", os.stat(source).st_ino))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", renamed)
    for value in 1, 2:
        checkpoint.save(tmp_path / "step_1.pt", {"model": {"w": torch.tensor(value)}, "config": {}, "step": 1})
    renames = [i for i, (what, _) in enumerate(order) if what == "replace"]
    assert len(renames) == 4
    for i in renames:
        assert order[i - 1] == ("fsync", order[i][1]) and order[i + 1][0] == "fsync"  # the file, then its folder


def test_one_write_at_a_time():
    writer, running, most = checkpoint.Writer(), [0], []

    def job():
        running[0] += 1
        most.append(running[0])
        threading.Event().wait(0.02)
        running[0] -= 1

    for _ in range(5):
        writer.submit(job)
    writer.wait()
    assert most == [1] * 5 and running == [0]


def test_checkpoints_that_are_deleted_while_one_is_written(tmp_path, monkeypatch):
    replace = os.replace

    def renamed(source, target):
        replace(source, target)
        if Path(target).name == "step_3.pt.sha256":
            shutil.rmtree(Path(target).parent)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", renamed)
        checkpoint.save_step(tmp_path, {"model": {}, "config": {}, "step": 3}, 2)
    for step in 9, 4, 5, 6:  # 9 was found damaged by the run that resumed before it
        checkpoint.save_step(tmp_path, {"model": {}, "config": {}, "step": step}, 2)
    assert [f.name for f in checkpoint.step_files(tmp_path)] == ["step_6.pt", "step_5.pt"]


class LateCopy:
    """Stands for a tensor on a GPU: its copies to the host arrive when the event is waited for, in the order in which
    they were asked for among its changes."""

    queue = []

    def __init__(self, values):
        self.on_host, self.device = values, torch.device("cuda")
        self.shape, self.dtype, self.stride = values.shape, values.dtype, values.stride

    def copied_into(self, host):
        now = self.on_host.clone()
        self.queue.append(lambda: host.copy_(now))


class Arrival:
    def record(self):
        self.copies, LateCopy.queue = LateCopy.queue, []

    def synchronize(self):
        for copy in self.copies:
            copy()


def test_copies_of_a_gpu_arrive_before_they_are_read_and_reuse_their_memory(monkeypatch):
    """A checkpoint has the values of its moment, whatever the next step does before the copies arrive, in memory that
    is made once."""

    class Host(torch.Tensor):
        def copy_(self, tensor, non_blocking=False):
            assert non_blocking
            tensor.copied_into(self.as_subclass(torch.Tensor))
            return self.as_subclass(torch.Tensor)

    made = []

    def page_locked(tensor):
        made.append(torch.zeros(tensor.shape, dtype=tensor.dtype))
        return made[-1].as_subclass(Host)

    monkeypatch.setattr(distributed, "page_locked", page_locked)
    monkeypatch.setattr(torch.cuda, "Event", Arrival)
    copies, weights, moment = HostCopies(), torch.arange(4.0), torch.ones(2, 3)
    for step in range(3):
        copied = [copies.copy(LateCopy(weights)), copies.copy(LateCopy(moment))]
        wait = copies.finish()
        expected = weights.clone(), moment.clone()
        weights += 1  # the next step, launched before the copies have arrived
        moment *= 2
        if step == 0:
            assert not torch.equal(copied[0], expected[0])
        wait()
        assert all(map(torch.equal, copied, expected))
    assert len(made) == 2
    copies.copy(LateCopy(torch.ones(5)))  # of another shape
    assert len(made) == 3 and made[-1].shape == (5,)


def test_other_ranks_copy_nothing():
    assert HostCopies(main=False).copy(torch.ones(2)) is None


@pytest.mark.parametrize("pos", SCHEMES)
def test_a_model_at_another_block_size_is_the_same_function(pos):
    """As --init_from continues it: what a scheme takes from block_size is that of the weights."""
    model = shaken(config(pos), torch.float32)
    state = {"config": dataclasses.asdict(model.config), "model": model.state_dict()}
    state["config"]["pos_options"] = {}  # as of a run from before these were written out
    idx = tokens(BLOCK // 2)
    try:
        other = build_model(state, block_size=4 * BLOCK)
    except ValueError as error:
        assert pos in ("learned", "urpe"), error  # whose tables end there
        return
    if model.token_text is not None:
        other.token_text = model.token_text
    close(other.eval()(idx)[0], model.eval()(idx)[0], atol=2e-5)
