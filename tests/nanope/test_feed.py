"""nanope/feed.py: batches in their order, and validation on fixed windows."""
# ruff: noqa: F811 - pytest finds fixtures by their names; those of training.py are imported

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from training import CPU, finish, folders, make, one_thread, start, write_text  # noqa: F401 - fixtures

from data.prepare import prepare
from data.shards import WindowOrder, batch, fingerprint, open_data, write_manifest
from model import GPT, GPTConfig
from nanope.distributed import Ranks
from nanope.feed import Feed, Validation


def test_the_feed_reads_ahead_and_in_order(make):
    """Over an epoch's edge, on each of two ranks, as without reading ahead; also if a step is repeated or skipped."""
    config = make()
    split = open_data(config.data_dir).split("train")
    order = WindowOrder(len(split), 16, 1)
    for rank in 0, 1:
        feed = Feed(split, config, 4, 2, Ranks(rank, 2), CPU)
        for step in [0, 1, 2, 2, 9, *range(25, 32)]:
            got = list(feed.batches(step))
            x, y = batch(split, order.starts((step * 2 + rank) * 4, 4), 16)
            assert len(got) == 2
            assert np.array_equal(torch.cat([g[0] for g in got]), x)
            assert np.array_equal(torch.cat([g[1] for g in got]), y)
        feed.close()


def test_validation_is_sharded_and_reads_nothing_twice(make):
    config, split = make(eval_tokens=10**9), open_data(make().data_dir).split("val")
    parts = [Validation(split, config, 4, Ranks(rank, 3), CPU).items for rank in range(3)]
    assert sorted(np.concatenate(parts).tolist()) == [16 * i for i in range((len(split) - 1) // 16)]
    assert len(Validation(split, make(eval_tokens=1), 4, Ranks(), CPU).items) == 1
    with pytest.raises(ValueError, match="val split of .* fewer than one window of 5000"):
        Validation(split, make(block_size=5000), 4, Ranks(), CPU)


def test_validation_is_without_dropout(make):
    model, split = GPT(GPTConfig(16, 320, 1, 2, 16, dropout=0.5)), open_data(make().data_dir).split("val")
    validation = Validation(split, make(), 4, Ranks(), CPU)
    assert validation.loss(model, torch.float32) == validation.loss(model, torch.float32)


def test_compiled_validation_has_one_shape(make):
    """The last batch is padded with what is no target."""
    model, split = GPT(GPTConfig(16, 320, 1, 2, 16)), open_data(make().data_dir).split("val")
    shapes = []
    model.register_forward_pre_hook(lambda _, arguments: shapes.append(len(arguments[0])))
    found = [Validation(split, make(compile=c), 5, Ranks(), CPU).loss(model, torch.float32) for c in (False, True)]
    assert shapes == [5, 5, 5, 1, 5, 5, 5, 5] and found[0] == pytest.approx(found[1], rel=1e-6)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="this system has no /proc")
def test_memory_stays_flat_on_a_large_data_folder(tmp_path):
    """120 steps over 1 GB of shards, windows all over them: the process does not grow with what it has read. Early, as
    the kernel maps much around each page that is read: all of the shards within 100 steps."""
    folder = tmp_path / "large"
    folder.mkdir()
    rng = np.random.default_rng(0)
    prepare("files", tmp_path / "small", write_text(tmp_path / "text.jsonl", 1, 7), "byte", val_tokens=600)
    manifest = json.loads((tmp_path / "small" / "manifest.json").read_text())
    shutil.copy(tmp_path / "small" / "val_00000.bin", folder)
    block, shards = rng.integers(0, 256, 2**24, dtype=np.uint16), []
    block.tofile(tmp_path / "block.bin")
    for i in range(30):  # 30 × 32 MiB; more than memmapped pages could hide. A page counts wherever it is mapped
        path = folder / f"train_{i:05d}.bin"
        path.hardlink_to(tmp_path / "block.bin")
        record = {"file": path.name, "tokens": len(block), "sha256": "", "fingerprint": fingerprint(path)}
        shards.append({**manifest["splits"]["train"][0], **record})
    manifest["splits"]["train"] = shards
    write_manifest(folder, {k: v for k, v in manifest.items() if k != "format"})
    code = """
import train, data.shards
data.shards.VERIFY_LIMIT = 0
sizes = []
def rss():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmRSS"))
def observe(event, step, subject):
    if event == "step" and step in (10, 119):
        sizes.append(rss())
train.main(observe=observe)
print(*sizes)
"""
    fields = dict(data_dir=folder, out_dir=tmp_path / "run", max_steps=120, warmup_steps=10, device="cpu")
    fields |= dict(block_size=16, n_layer=1, n_head=1, n_embd=4, batch_tokens=1024, log_interval=10)
    fields |= dict(eval_interval=0, eval_tokens=256, checkpoint_interval=5)
    given = [text for k, v in fields.items() for text in (f"--{k}", str(v))]
    status, out, err = finish(start(["-c", code, *given], tmp_path), timeout=300)
    assert status == 0, err
    early, late = map(int, out.split())
    assert late - early < 16 * 1024, f"{early} kB after 10 steps, {late} kB after 119"
