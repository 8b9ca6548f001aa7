"""Training on a task: whole examples as rows, and a loss that is the mean over the answers of a step."""
# ruff: noqa: F811 - pytest finds fixtures by their names; those of training.py are imported

import json

import pytest
import torch
import torch.nn.functional as F
from training import CPU, TINY, arguments, at_step, crash, losses, one_thread, same_run  # noqa: F401 - fixtures

from data.prepare import prepare
from data.shards import DataError, file_sha256, fingerprint, mask_path, write_manifest
from data.tasks import TASKS, Examples
from data.tokenizer import load_tokenizer
from model import GPT, GPTConfig
from nanope.config import RunConfig
from nanope.distributed import Ranks
from nanope.feed import Feed, Validation
from train import main, train


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """A data folder of flip-flop, whose answers have one to several places."""
    return prepare(
        "task", tmp_path_factory.mktemp("task") / "data", examples=Examples("flipflop", 8, 400), shard_tokens=2000
    )


@pytest.fixture
def make(task, tmp_path):
    def config(name="run", **fields):
        return RunConfig(**{**TINY, "data_dir": str(task.folder), "out_dir": str(tmp_path / name), **fields})

    return config


def test_a_row_is_an_example_and_its_answer_is_the_target(task, make):
    split, tokenizer, config = task.split("train"), load_tokenizer("characters"), make()
    count, seen = task.records("train")[0]["documents"] + task.records("train")[1]["documents"], []
    feed = Feed(split, config, 8, 4, Ranks(), CPU)
    for step in range(12):
        for x, y, _ in feed.batches(step):
            for inputs, targets in zip(x.tolist(), y.tolist()):
                text = tokenizer.decode(inputs)
                scored = TASKS["flipflop"].scored(text)
                assert inputs == [*tokenizer.encode(text), *[511] * (16 - len(text))]
                expected = [t if s else -1 for t, s in zip([*inputs[1:], 511], scored[1:])]
                assert targets[: len(text)] == expected and {*targets[len(text) :]} <= {-1}
                seen.append(text)
    feed.close()
    assert len({*seen}) > 0.6 * len(seen) and count > 96  # a permutation: repeats are of equal examples alone
    assert sorted(feed.rows.items(0, feed.rows.total)) == [*range(feed.rows.total)]


def test_the_loss_of_a_step_is_the_mean_over_all_its_answers(task, make):
    """However they lie in micro-batches and on ranks."""
    model, config = GPT(GPTConfig(16, 512, 1, 2, 16)).double(), make()
    whole = Feed(task.split("train"), config, 8, 8, Ranks(), CPU)
    (x, y, weight), *_ = whole.batches(3)
    assert weight == 1
    expected = F.cross_entropy(model(x)[0].flatten(0, 1), y.flatten(), ignore_index=-1)
    for world, micro in (1, 2), (2, 2), (2, 4), (4, 1):
        total = 0
        for rank in range(world):
            feed = Feed(task.split("train"), config, 8 // world, micro, Ranks(rank, world), CPU)
            total += sum(model(x, y)[1] * weight for x, y, weight in feed.batches(3)) / world
            feed.close()
        assert total.item() == pytest.approx(expected.item(), rel=1e-12)
    whole.close()


def test_micro_batches_do_not_change_the_curve(make):
    for name, micro in ("whole", 8), ("parts", 1):
        train(make(name, micro_batch_size=micro))
    a, b = losses(make("whole").out_dir), losses(make("parts").out_dir)
    assert a == pytest.approx(b, rel=1e-5) and a[-1] < a[0]


def test_resumed_is_equal_to_the_bit(make):
    train(make("whole"))
    with pytest.raises(RuntimeError, match="the power is out"):
        train(make("cut"), at_step({8: crash}))
    train(make("cut", resume=True))
    assert same_run(make("whole").out_dir, make("cut").out_dir)


def test_validation_is_the_mean_over_answers(task, make):
    model, config, val = GPT(GPTConfig(16, 512, 1, 2, 16)).double(), make(eval_tokens=10**6), task.split("val")
    sums, count, tokenizer = 0.0, 0, load_tokenizer("characters")
    for start, size in val.documents().tolist():
        ids = torch.from_numpy(val.read(start, start + size + 1))
        scored = torch.from_numpy(TASKS["flipflop"].scored(tokenizer.decode(ids[:-1])))
        nll = F.cross_entropy(model(ids[None, :-1])[0][0], ids[1:], reduction="none")
        sums, count = sums + nll[scored[1:]].sum().item(), count + int(scored.sum())
    found = Validation(val, config, 4, Ranks(), CPU).loss(model, torch.float32)
    assert found == pytest.approx(sums / count, rel=1e-6)


def test_bad_rows_are_refused(task, make, tmp_path):
    with pytest.raises(
        DataError, match="block_size 8 is shorter than the longest example .* 16 tokens: take block_size 16"
    ):
        train(make(block_size=8, batch_tokens=64))
    folder = tmp_path / "unanswered"
    prepare("task", folder, examples=Examples("copy", 3, 100))
    mask = mask_path(folder / "train_00000.bin")
    mask.write_bytes(bytes(10) + mask.read_bytes()[10:])  # of the first example at least
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["splits"]["train"][0]["mask"] = {"sha256": file_sha256(mask), "fingerprint": fingerprint(mask)}
    write_manifest(folder, manifest)
    with pytest.raises(DataError, match="example 0 has no answer: its mask has no target"):
        train(make(data_dir=str(folder)))
    assert not (tmp_path / "run").exists()


def test_the_command_and_its_plan(make, capsys):
    main([*arguments(make(max_steps=2, warmup_steps=1))])
    assert "training tokens, 0.04 epochs" in capsys.readouterr().err
    main([*arguments(make()), "--plan"])
    assert "epochs" in capsys.readouterr().out
