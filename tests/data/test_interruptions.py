"""Runs that are killed, interrupted, divided among machines or out of disk space: the same command continues."""

import errno
import os
import random
import resource
import shutil
import subprocess
import time

import pytest
from preparing import SMALL, contents, finish, start, times

from data.prepare import prepare
from data.shards import DataError, open_data

SHARD = r"\.bin\.\d+\.tmp$"  # opened when a shard begins
FINISHED = r"-of-\d+\.\w+\.bin$"  # renamed to when a shard is finished


def kill(out, *options, source, fault):
    """Run the command until the fault kills it."""
    process = start(out, *options, source=source, fault=fault)
    process.communicate(timeout=60)
    assert process.returncode == -9


@pytest.mark.slow
def test_a_killed_run_continues_after_its_last_shard(corpus, whole, tmp_path, drawn_figures):
    """Finished shards are kept, those after them made anew, and what was half written is not taken for a shard."""
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    kill(out, source=corpus[0], fault=["os.rename", FINISHED, 6, "kill"])
    before, units = times(partial, "*.bin"), times(partial, "*.unit.json")
    assert len(before) == 5 and not out.exists()
    with pytest.raises(DataError, match="not a finished"):
        open_data(partial)
    with pytest.raises(DataError, match="out.partial was made with other options.*shard_tokens"):
        prepare("fineweb-edu", out, corpus[0])  # not a mixture
    last = max(before)
    (partial / last).with_suffix(".json").unlink()  # as if killed between a shard and its record
    (partial / last).write_bytes(b"half")
    kill(out, source=corpus[0], fault=["os.rename", r"/train_00000\.bin$", 1, "kill"])
    after = times(partial, "*.bin")
    assert {name for name in before if after[name] == before[name]} == set(before) - {last}
    assert len(units) < len(times(partial, "*.unit.json"))
    prepare("fineweb-edu", out, corpus[0], **SMALL)
    assert contents(out) == contents(whole.folder) and not partial.exists()


SEAMS = [
    ("os.rename", r"\.json$"),  # the plan
    ("open", SHARD),
    ("os.rename", r"\.unit\.json$"),
    ("os.rename", r"/train_00001\.bin$"),
    ("os.rename", r"lengths\.png$"),
    ("os.rename", r"manifest\.json$"),
    ("os.rename", r"COMPLETE$"),
    ("os.remove", r"\.unit\.json$"),  # publishing begins
    ("os.remove", r"plan\.json$"),
    ("os.rename", r"/out$"),
    ("open", r"/out/manifest\.json$"),
]


@pytest.mark.slow
@pytest.mark.parametrize("seam", SEAMS)
def test_killed_at_the_seams(corpus, whole, tmp_path, drawn_figures, seam):
    """Just before each of the steps, and so just after the one before it."""
    out = tmp_path / "out"
    kill(out, source=corpus[0], fault=[*seam, 1, "kill"])
    prepare("fineweb-edu", out, corpus[0], **SMALL)
    assert contents(out) == contents(whole.folder) and not (tmp_path / "out.partial").exists()


@pytest.mark.slow
def test_killed_at_random_moments(corpus, whole, tmp_path):
    rng, out = random.Random(), tmp_path / "out"
    began = time.monotonic()
    finish(start(tmp_path / "timed", "--workers", 2, source=corpus[0]))
    span, kept, killed = time.monotonic() - began, [], 0
    while killed < 3:
        fault = ["os.rename", r"\.json$", 0, "slow down"]
        process = start(out, "--workers", rng.choice([1, 2]), source=corpus[0], fault=fault)
        if killed:  # the first at any moment; the others once there is something to keep
            while process.poll() is None and not times(tmp_path / "out.partial", "*.bin"):
                time.sleep(0.01)
        try:
            process.wait(rng.uniform(0, 0.3 * span) if killed else rng.uniform(0.2 * span, span))
            assert process.returncode == 0, process.stderr.read()
            shutil.rmtree(out)  # it was faster; once more from the beginning
            span *= 0.8
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            killed += 1
            kept.append(len(times(tmp_path / "out.partial", "*.bin")))
            if out.exists():  # only what is whole has the name
                assert contents(out) == contents(whole.folder)
                shutil.rmtree(out)
    finish(start(out, source=corpus[0]))
    assert max(kept) > 0, kept
    assert contents(out) == contents(whole.folder) and not (tmp_path / "out.partial").exists()


@pytest.mark.slow
@pytest.mark.parametrize("count", [3, 5])  # by files where there are enough, else by units
def test_parts_merge_to_the_same_bytes(corpus, whole, tmp_path, count):
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    for i in reversed(range(2, count + 1)):
        assert f"part {i} of {count} is done" in finish(start(out, "--part", f"{i}/{count}", source=corpus[0]))
    assert "is not finished" in finish(start(out, "--merge", source=corpus[0]), code=1)
    elsewhere = tmp_path / "elsewhere" / "out"  # another machine: the folder is copied
    elsewhere.parent.mkdir()
    finish(start(elsewhere, "--part", f"1/{count}", source=corpus[0]))
    assert not elsewhere.exists()
    made = [set(times(folder, "*.unit.json")) for folder in (partial, tmp_path / "elsewhere" / "out.partial")]
    assert all(made) and not made[0] & made[1]
    shutil.copytree(tmp_path / "elsewhere" / "out.partial", partial, dirs_exist_ok=True)
    finish(start(out, "--merge", source="no source is needed"))
    assert contents(out) == contents(whole.folder)


@pytest.mark.slow
def test_two_at_once(corpus, tmp_path):
    """A second process is sent away while the first is at work, and a killed one leaves no lock behind."""
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    first = start(out, source=corpus[0], fault=["open", SHARD, 1, "wait"])
    assert first.stdout.readline() == "working\n"
    there = set(times(partial))
    assert "another data/prepare.py is at work" in finish(start(out, source=corpus[0]), code=1)
    assert "plan.json" in there and there == set(times(partial))
    first.kill()
    first.communicate()
    prepare("fineweb-edu", out, corpus[0], **SMALL)


@pytest.mark.slow
def test_ctrl_c_in_one_process(corpus, whole, tmp_path, drawn_figures):
    """It says how to continue, and keeps what is finished."""
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    message = finish(start(out, source=corpus[0], fault=["os.rename", FINISHED, 5, "interrupt"]), code=1)
    assert "interrupted; the same command continues" in message and f"--out {out}" in message
    before = times(partial, "*.bin")
    assert len(before) == 4 and not out.exists()
    kill(out, source=corpus[0], fault=["os.rename", FINISHED, 5, "kill"])
    assert len(times(partial, "*.bin")) == 8 and before.items() <= times(partial, "*.bin").items()  # not made again
    prepare("fineweb-edu", out, corpus[0], **SMALL)
    assert contents(out) == contents(whole.folder)


@pytest.mark.slow
@pytest.mark.parametrize("action, code", [("interrupt all", 1), ("kill the parent", -9)])
def test_workers_end_with_the_command(corpus, tmp_path, action, code):
    process = start(
        tmp_path / "out", "--workers", 2, source=corpus[0], fault=["open", SHARD, 1, action], start_new_session=True
    )
    _, error = process.communicate(timeout=60)  # returns when all that hold its stderr are gone: workers too
    assert process.returncode == code and "Traceback" not in error
    if code == 1:
        assert "interrupted; the same command continues" in error


@pytest.mark.slow
def test_a_dead_worker(corpus, whole, tmp_path, drawn_figures):
    dying = start(tmp_path / "out", "--workers", 2, source=corpus[0], fault=["open", SHARD, 2, "kill"])
    assert "a worker process died" in finish(dying, code=1)
    prepare("fineweb-edu", tmp_path / "out", corpus[0], **SMALL)
    assert contents(tmp_path / "out") == contents(whole.folder)


@pytest.mark.slow
@pytest.mark.parametrize("finished", [False, True])
def test_a_full_disk(corpus, whole, tmp_path, finished):
    """A limit on the size of files stands for the full disk: the write itself fails. What is finished is kept."""
    limit = max(path.stat().st_size for path in whole.folder.glob("*.bin")) - 1 if finished else 500
    limited = {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))}
    message = finish(start(tmp_path / "out", source=corpus[0], **limited), code=1)
    assert "File too large; make room and run the same command again, which continues" in message
    assert (tmp_path / "out.partial").exists() == finished
    prepare("fineweb-edu", tmp_path / "out", corpus[0], **SMALL)


@pytest.mark.slow
def test_what_was_written_is_checked_before_it_takes_its_place(corpus, tmp_path):
    message = finish(start(tmp_path / "out", source=corpus[0], fault=["os.rename", "COMPLETE", 1, "damage a shard"]), 1)
    assert "out.partial/val_00000.bin was altered" in message
    assert not (tmp_path / "out").exists()


# ---- the last step ----


@pytest.mark.slow
def test_links_are_followed(corpus, whole, tmp_path, drawn_figures):
    """To a folder, and to one that is not there yet: the link stays, and points to the finished folder."""
    (tmp_path / "real").mkdir()
    for name, target in (("out", "real"), ("dangling", "not/yet")):
        (tmp_path / name).symlink_to(tmp_path / target)
        prepare("fineweb-edu", tmp_path / name, corpus[0], **SMALL)
        assert (tmp_path / name).is_symlink() and contents(tmp_path / target) == contents(whole.folder)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dangling", "not", "out", "real"]


def appear_as_folder(out):
    out.mkdir()
    (out / "notes.txt").write_text("mine")


def appear_as_link(out):
    out.with_name("elsewhere").mkdir()
    out.symlink_to(out.with_name("elsewhere"))


@pytest.mark.slow
@pytest.mark.parametrize("appear", [appear_as_folder, appear_as_link, lambda out: out.write_text("mine")])
def test_something_appears_at_the_last_moment(corpus, whole, tmp_path, monkeypatch, drawn_figures, appear):
    """Nothing that is complete is lost, and the same command finishes without doing work again."""
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    rename = os.replace

    def replace(old, new):
        if new == out and not os.path.lexists(out):
            appear(out)
        rename(old, new)

    monkeypatch.setattr("os.replace", replace)
    with pytest.raises(DataError, match=f"{out} .*Nothing is lost: {partial} is complete"):
        prepare("fineweb-edu", out, corpus[0], **SMALL)
    made = times(partial, "*.bin")
    monkeypatch.setattr("os.replace", rename)
    if out.is_symlink() or not out.is_dir():
        out.unlink()
    else:
        with pytest.raises(DataError, match="in the way"):
            prepare("fineweb-edu", out, corpus[0], **SMALL)
        out.rename(tmp_path / "moved")
    prepare("fineweb-edu", out, corpus[0], **SMALL)
    assert contents(out) == contents(whole.folder) and times(out, "*.bin") == made


def test_refused_before_the_work(source, tmp_path, monkeypatch):
    """What the last step could not replace: a mount point, a circle of links, the folder that one is in."""

    def remove(path):
        raise OSError(errno.EBUSY, "Device or resource busy", str(path))

    (tmp_path / "disk").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr("os.rmdir", remove)
        with pytest.raises(DataError, match="disk is a mount point"):
            prepare("files", tmp_path / "disk", source, "byte")
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    with pytest.raises(DataError, match="circle cannot be used"):
        prepare("files", tmp_path / "circle", source, "byte")
    for name in ("x" * 300, "x" * 250):  # which .partial makes too long
        with pytest.raises(DataError, match="name too long"):
            prepare("files", tmp_path / name, source, "byte")
    with pytest.raises(DataError, match="the root of the disk"):
        prepare("files", "/", source, "byte")
    (tmp_path / "out.partial").write_text("mine")
    with pytest.raises(DataError, match="out.partial is in the way: it is not a folder"):
        prepare("files", tmp_path / "out", source, "byte")
    (tmp_path / "out.partial").unlink()
    monkeypatch.chdir(tmp_path / "disk")
    with pytest.raises(DataError, match="is the folder you are in"):
        prepare("files", ".", source, "byte")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["circle", "disk", source.name]
