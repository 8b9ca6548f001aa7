"""Models that are divided over ranks by FSDP (`fsdp: true`), as two processes over gloo: the same gradients as of whole
models, the same curve, the same checkpoints, whichever number of ranks reads them."""
# ruff: noqa: F811 - pytest finds fixtures by their names; those of training.py are imported

import dataclasses
import os
from pathlib import Path

import pytest
import rank
import torch
import torch.distributed as dist
from models import BLOCK, CASES, build, tokens
from test_train_ranks import start_ranks, train_by_ranks
from training import all_lines, finish, folders, last, losses, make, one_thread, same_run  # noqa: F401 - fixtures

from model import SCHEMES
from nanope import checkpoint
from nanope.distributed import accumulating, gathered, is_sharded, ranks_of, shard, whole
from train import train

# Every scheme, and options with which layers share parameters, or with other parameters
DIVIDED = [*SCHEMES, "comrope 4 ld", "carope shared", "t5 own", "fire shared", "urpe none clip", "rope low-rank"]
DIVIDED += ["selective base gate bias", "comrope axes ld"]
FIELDS = dict(n_layer=2, n_head=1, micro_batch_size=2, checkpoint_interval=5, keep_checkpoints=99, rank_timeout=30.0)


def averaged_gradients(model, micro_batches):
    """The norm of all gradients, and each, of a step over this rank's micro-batches, averaged over the two ranks."""
    with gathered(model), model.parameters_fixed(3):
        for i, (x, y) in enumerate(micro_batches):
            with accumulating(model, i == len(micro_batches) - 1):
                loss, more = model(x, y)[1], model.auxiliary()
                (loss if more is None else loss + more).backward()
    if not is_sharded(model):
        for p in model.parameters():
            dist.all_reduce(p.grad.div_(2))
    norm = whole(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1))
    return norm, {name: whole(p.grad) for name, p in model.named_parameters()}


def every_scheme():
    """On each of two ranks, in float64: the gradients of a divided model are the means of those of two whole ones.
    Every other one computes its blocks again."""
    torch.set_num_threads(1)
    with ranks_of("cpu", 60.0) as (ranks, device):
        seeds = [4 * ranks.rank + i for i in range(2)]
        batches = [(tokens(BLOCK, seed=seed), tokens(BLOCK, seed=seed + 2)) for seed in seeds]
        for number, case in enumerate(DIVIDED):
            fields = dict(document_mask=True, eot=3) if number % 5 == 4 else {}
            expected = averaged_gradients(build(case, **fields), batches)
            model = build(case, **fields)
            model.activation_checkpointing = number % 2 == 1
            names, count = list(model.state_dict()), model.parameter_count()
            shard(model, ranks, device)
            held = sum(p.to_local().numel() for p in model.parameters() if p.dim())
            assert held < 0.52 * count and model.parameter_count() == count, case
            found = averaged_gradients(model, batches)
            assert list(model.state_dict()) == names and list(found[1]) == list(expected[1]), case
            for name, gradient in {"norm": found[0], **found[1]}.items():
                other = expected[1].get(name, expected[0])
                assert torch.allclose(gradient, other, rtol=1e-10, atol=1e-13), (case, name, gradient, other)
        dist.barrier()
    print(f"{len(DIVIDED)} schemes")


@pytest.mark.slow
def test_gradients_are_those_of_whole_models(tmp_path):
    port = 20000 + os.getpid() % 20000
    group = dict(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    ranks = [rank.Rank([], tmp_path, every_scheme, RANK=str(i), LOCAL_RANK=str(i), **group) for i in range(2)]
    for status, _, said in [finish(process, timeout=240) for process in ranks]:
        assert status == 0 and f"{len(DIVIDED)} schemes" in said, said
    assert {case.split()[0] for case in CASES} == {*SCHEMES}


@pytest.mark.slow
def test_curve_and_checkpoints_are_those_of_ddp(make, tmp_path):
    """Two ranks, of which the second has nothing of carope's W (1, C) and b (1,), and one window of validation less. A
    run goes on from DDP to FSDP and to one rank, which reads what two have written."""
    fields = FIELDS | dict(pos="carope", max_steps=20, eval_tokens=16 * 13, sample_interval=10, pos_lr_multiplier=2.0)
    ddp, fsdp = make("ddp", **fields), make("fsdp", fsdp=True, **fields)
    train_by_ranks(ddp, tmp_path)
    train_by_ranks(fsdp, tmp_path)

    def like_ddp(run):
        for key in ("train/loss", "val/loss", "grad_norm"):
            assert losses(run, key) == pytest.approx(losses(ddp.out_dir, key), rel=2e-6)
        for there, here in zip(*(last(path)["model"].items() for path in (ddp.out_dir, run))):
            assert there[0] == here[0] and torch.allclose(there[1], here[1], rtol=1e-4, atol=1e-5), there[0]
        return True

    assert like_ddp(fsdp.out_dir)
    assert [line["sample"] for line in all_lines(ddp.out_dir) if "sample" in line] == [
        line["sample"] for line in all_lines(fsdp.out_dir) if "sample" in line
    ]
    states = [last(config.out_dir) for config in (ddp, fsdp)]
    described = [
        [(i, k, v.shape, v.stride(), v.dtype) for i, of in state["optimizer"]["state"].items() for k, v in of.items()]
        for state in states
    ]
    assert described[0] == described[1]
    assert states[0]["optimizer"]["param_groups"] == states[1]["optimizer"]["param_groups"]
    files = [checkpoint.find(config.out_dir) for config in (ddp, fsdp)]
    sizes = [path.stat().st_size for path in files]
    assert abs(sizes[0] - sizes[1]) < 200  # the embedding once

    def back_to(run, step):
        for path in checkpoint.step_files(Path(run)):
            if checkpoint.step_of(path) > step:
                path.unlink()

    back_to(fsdp.out_dir, 10)
    train(dataclasses.replace(fsdp, resume=True))  # by one rank
    assert like_ddp(fsdp.out_dir)
    back_to(ddp.out_dir, 10)
    expected = losses(fsdp.out_dir)
    train_by_ranks(dataclasses.replace(ddp, resume=True, fsdp=True), tmp_path)
    assert losses(ddp.out_dir) == pytest.approx(expected, rel=2e-6)


@pytest.mark.slow
def test_two_ranks_resume_exactly(make, tmp_path):
    """Stopped in a validation, then in a step, by a signal to one rank; a full disk at the end, which has room at the
    second try: the bits of a run to which nothing happened."""
    fields = FIELDS | dict(pos="seqpe", n_head=2, max_steps=12, dropout=0.1, fsdp=True, eval_tokens=16 * 13)
    plain, cut = make("plain", **fields), make("cut", **fields, resume=True)
    train_by_ranks(plain, tmp_path)
    stopped = [finish(process) for process in start_ranks(cut, tmp_path, SIGNAL_IN_VALIDATION="1:5")]
    assert all(status == os.EX_TEMPFAIL for status, _, _ in stopped) and "after step 5, checkpoint" in stopped[0][2]
    assert len(losses(cut.out_dir, "val/loss")) == 1
    stopped = [finish(process) for process in start_ranks(cut, tmp_path, SIGNAL_AT="1:8")]
    assert all(status == os.EX_TEMPFAIL for status, _, _ in stopped) and "after step 9, checkpoint" in stopped[0][2]
    said = train_by_ranks(cut, tmp_path, NO_ROOM="step_12.pt")
    assert said.count("a checkpoint could not be written") == 1
    assert same_run(plain.out_dir, cut.out_dir)


@pytest.mark.slow
def test_compiled_blocks_that_are_computed_again(make, tmp_path):
    """In bfloat16: DDP's curve, by a graph of all layers and one of each loss, in training and in validation, and the
    one that tries the compiler."""
    fields = dict(max_steps=4, micro_batch_size=2, n_layer=2, dtype="bfloat16", pos="carope")
    ddp = make("ddp", **fields)
    fsdp = make("fsdp", fsdp=True, activation_checkpointing=True, compile=True, **fields)
    train_by_ranks(ddp, tmp_path)
    assert train_by_ranks(fsdp, tmp_path, BACKEND="aot_eager").count("graphs: 5\n") == 2
    for key in ("train/loss", "val/loss", "grad_norm"):
        assert losses(fsdp.out_dir, key) == pytest.approx(
            losses(ddp.out_dir, key), rel=2e-4 if key == "grad_norm" else 1e-5
        )


@pytest.mark.slow
def test_a_best_checkpoint_that_could_not_be_written(make, tmp_path):
    """The first rank forgets it. All of them write the next one, which is no lower, and none waits for the others."""
    still = dict(learning_rate=1e-30, min_lr=0.0, eval_interval=2, max_steps=8)
    config = make(**FIELDS | still | dict(pos="none", checkpoint_interval=0, fsdp=True))
    assert train_by_ranks(config, tmp_path, NO_ROOM="best.pt").count("could not be written") == 1
    assert len(set(losses(config.out_dir, "val/loss"))) == 1 and checkpoint.find(config.out_dir, "best").exists()
