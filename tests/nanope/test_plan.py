"""nanope/plan.py: its figures against formulas worked out by hand, and against real steps of real models."""

import dataclasses
import math
import random

import pytest
import torch

from data.prepare import prepare
from data.shards import open_data
from model import GPT, SCHEMES, GPTConfig
from nanope import checkpoint, trace
from nanope.config import RunConfig
from nanope.costs import memory, simulate
from nanope.loss import chunk_rows
from nanope.optim import make_optimizer
from nanope.plan import plan, plan_text, scheme_table, show

# Small models. The vocabulary is large enough for the loss head to work in chunks: 2^23 / 20,032 = 418 rows
ROWS, LENGTH, VOCAB = 5, 96, 20032
SHAPE = dict(block_size=LENGTH, vocab_size=VOCAB, n_layer=3, n_head=2, n_embd=64)
SMALL = RunConfig(block_size=1024, data_dir="nowhere")  # GPT-2 small, 19,000 steps of 524,288 tokens
QUICK = ("learned", "rope", "crope", "comrope", "carope", "t5", "seqpe")  # no, one or several own parameters


def run(**fields):
    """The RunConfig of a small run on the CPU: 4 × 5 windows a step."""
    batch = dict(batch_tokens=4 * ROWS * LENGTH, micro_batch_size=ROWS, device="cpu", data_dir="nowhere")
    return RunConfig(**{**SHAPE, **batch, **fields})


def ids():
    return torch.randint(VOCAB, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))


# ---- parameters


@pytest.mark.parametrize("pos", [pos if pos in QUICK else pytest.param(pos, marks=pytest.mark.slow) for pos in SCHEMES])
def test_parameters_add_up(pos):
    p = plan(run(pos=pos, bias=True, vocab_size=320, pos_lr_matrices=True), details=False)
    model = GPT(p.config.model_config())
    assert (
        sum(n for part, n in p.parameters.items() if part != "total")
        == p.parameters["total"]
        == model.parameter_count()
        == sum(p.groups.values())
    )
    assert p.flops_per_token == model.flops_per_token()
    own = {n for n, _ in model.named_parameters()} - {
        n for n, _ in GPT(dataclasses.replace(p.config.model_config(), pos="none")).named_parameters()
    }
    if pos != "crope":  # whose projection has other names
        parameters = dict(model.named_parameters())
        assert p.parameters.get("positional table", 0) + p.parameters.get("positional scheme", 0) == sum(
            parameters[n].numel() for n in own
        )


def test_gpt2_small_parameters_by_part():
    p = plan(dataclasses.replace(SMALL, pos="learned", bias=True, vocab_size=50257), details=False)
    assert p.parameters["token embedding (tied)"] == 50257 * 768
    assert p.parameters["positional table"] == 1024 * 768
    assert p.parameters["attention projections"] == 12 * (4 * 768**2 + 4 * 768)
    assert p.parameters["MLP"] == 12 * (8 * 768**2 + 5 * 768)
    assert p.parameters["total"] == 124_439_808  # the figure everyone knows


# ---- memory


def allocated_by_a_real_step(config, micro_batches):
    """The most bytes that the CPU's allocator hands out at once in a step of training, beside parameters, moments."""
    model, idx = GPT(config.model_config()), ids()
    model.activation_checkpointing = config.activation_checkpointing
    optimizer = make_optimizer(model, config)

    def step():
        for _ in range(micro_batches):
            model(idx, idx)[1].backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step()  # makes the moments
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    events = sorted(
        (e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns()
    )
    live = peak = 0
    for event in events:
        live += event.nbytes()
        peak = max(peak, live)
    return peak


PLANNED = ["learned", "rope", "comrope", "carope", "alibi", "fox", "pope", "path"]


@pytest.mark.slow
@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("pos", PLANNED)
def test_peak_is_what_the_allocator_hands_out(pos, accumulation, **fields):
    """All of a step's memory; with accumulation the gradients lie there during the next forward pass. Kernels' own
    buffers, some kB, are not in the estimate."""
    config = run(pos=pos, batch_tokens=accumulation * ROWS * LENGTH, **fields)
    p = plan(config)
    parts = p.memory["cpu"]
    real = allocated_by_a_real_step(p.config, min(accumulation, 2))
    estimate = parts["total"] - parts["parameters"] - parts["AdamW's moments"] - parts["input"]
    assert sum(n for part, n in parts.items() if part != "total") == parts["total"]
    assert estimate == pytest.approx(real, rel=0.005)
    assert parts["gradients"] == parts["parameters"] == parts["AdamW's moments"] / 2 == 4 * p.parameters["total"]


@pytest.mark.slow
@pytest.mark.parametrize("pos", ["rope", "fox", "path"])
def test_peak_of_activation_checkpointing(pos):
    """It is what a real step takes, and of blocks little is kept."""
    fields = dict(activation_checkpointing=True, n_layer=6)
    test_peak_is_what_the_allocator_hands_out(pos, 1, **fields)
    here, there = (plan(run(pos=pos, **f)).memory["cpu"] for f in (fields, dict(n_layer=6)))
    kept, whole = (sum(n for part, n in m.items() if part.startswith("activations")) for m in (here, there))
    assert kept < (0.4 if pos == "path" else 0.15) * whole  # path keeps what it prepares


@pytest.mark.slow
def test_flops_that_are_computed_again():
    """All of a block's forward products but its last one, which nothing is saved behind; MFU does not count them."""
    config = run(pos="none", activation_checkpointing=True)
    p, plain = plan(config), plan(run(pos="none"))
    parts = p.products
    assert parts["scores, computed again"] == 3 * 4 * 64 * LENGTH
    assert parts["others, computed again"] == 3 * 2 * 8 * 64**2
    assert parts["total"] == sum(n for part, n in parts.items() if part != "total")
    assert p.flops_per_token == plain.flops_per_token and p.hours == plain.hours
    assert "does not count for MFU" in show(p) and "again" not in show(plain)


@pytest.mark.slow
def test_memory_of_a_divided_model():
    """What each of 8 ranks holds, at the width of GPT-2, and what it has whole: the embedding, and blocks."""
    config = dataclasses.replace(SMALL, pos="learned", n_layer=3, micro_batch_size=1, vocab_size=50304)
    fields = dict(fsdp=True, activation_checkpointing=True, device="cuda")
    p = plan(dataclasses.replace(config, **fields), gpus=8)
    parts, total = p.memory["cuda"], p.parameters["total"]
    assert parts["parameters"] == parts["gradients"] == parts["AdamW's moments"] / 2 == total / 2
    outside, block = 4 * 768 * (50304 + 1024 + 1), 4 * (12 * 768**2 + 2 * 768)
    assert parts["gathered parameters"] == outside + 3 * block
    assert parts["gathered gradients"] == outside + 2 * block
    assert "autocast's weights" not in parts  # of one block at a time
    assert sum(n for part, n in parts.items() if part != "total") == parts["total"]
    assert "divided over 8 (FSDP)" in show(p)
    alone = plan(dataclasses.replace(config, **fields), gpus=1).memory["cuda"]  # nothing to divide
    assert alone["parameters"] == 4 * total and "gathered parameters" not in alone


@pytest.mark.slow
def test_memory_of_the_loss_head_on_a_gpu():
    """Its chunks of logits are larger than on a CPU: at least float32 logits and probabilities at once."""
    p = plan(dataclasses.replace(SMALL, device="cuda", n_layer=2))
    assert list(p.memory) == ["cuda"]
    assert p.memory["cuda"]["temporary"] > 2 * 4 * chunk_rows(50304, torch.device("cuda")) * 50304


@pytest.mark.slow
def test_largest_micro_batch_fits_and_the_next_does_not():
    p = plan(dataclasses.replace(SMALL, n_layer=3, n_embd=1536, n_head=12, device="cuda"))
    n = p.largest_micro_batch

    def total(micro):
        return memory(simulate(p.config.model_config(), micro, torch.bfloat16, True, True), micro)["total"]

    assert 512 % n == 0 and n < 512 and total(n) <= 0.93 * 80 * 2**30 < total(2 * n)


def test_each_device_has_the_micro_batch_that_it_would_take():
    """On a CPU at most 16,384 tokens, whatever a GPU takes, which a plan for `auto` has beside it."""
    fields = dict(n_layer=1, n_head=1, n_embd=16, vocab_size=64, batch_tokens=2**17, data_dir="nowhere")
    p = plan(RunConfig(**fields, block_size=1024))
    here = plan(RunConfig(**fields, block_size=1024, device="cpu"))
    assert p.rows == {"cuda": 64, "cpu": 16} and p.memory["cpu"] == here.memory["cpu"]
    assert "2 × micro_batch_size 64 (on a CPU 8 × 16)" in show(p)
    assert "8 × micro_batch_size 16\n" in show(here)


def test_checkpoint_size(tmp_path):
    config = run(n_layer=1)
    model = GPT(config.model_config())
    optimizer = make_optimizer(model, config)
    model(ids(), ids())[1].backward()
    optimizer.step()
    checkpoint.save(tmp_path / "c.pt", {"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    assert 0 <= (tmp_path / "c.pt").stat().st_size - plan(config).checkpoint < 50_000


# ---- batch, time, money


def test_hours_and_cost_by_hand():
    """124M at length 1,024 on 10 B tokens, 8 A100 at 0.4: 6 · 123,568,128 + 12 · 12 · 768 · 1,024 FLOPs a token over
    8 · 312e12 · 0.4 FLOP/s = 8,570 s."""
    p = plan(SMALL, gpus=8, mfu=0.4, price_per_hour=2.5, details=False)
    assert p.tokens == 19000 * 524288 and p.windows == 512
    assert p.flops_per_token == 741_408_768 + 113_246_208
    seconds = 19000 * 524288 * 854_654_976 / (8 * 312e12 * 0.4)
    one, eight = p.hours["A100"]
    assert eight == pytest.approx(seconds / 3600) and one == pytest.approx(8 * eight)
    assert eight == pytest.approx(2.37, abs=0.005)
    assert p.hours["H100"][1] == pytest.approx(eight * 312 / 989)
    assert p.cost(eight, 8) == pytest.approx(8 * 2.37 * 2.5, abs=0.1) and p.cost(one, 1) == pytest.approx(
        p.cost(eight, 8)
    )
    assert plan(SMALL, gpus=8, mfu=0.2, details=False).hours["A100"][1] == pytest.approx(2 * eight)


@pytest.mark.slow
def test_measured_speed():
    p = plan(run(), tokens_per_s=1000.0, price_per_hour=0.5)
    hours = 19000 * 4 * ROWS * LENGTH / 1000 / 3600
    assert p.measured_hours == pytest.approx(hours)
    line = next(line for line in show(p).splitlines() if "as measured" in line)
    assert line.split() == ["as", "measured", f"{hours:,.1f}", "h", "1,000", "tokens/s", "cost", f"{hours / 2:,.2f}"]
    assert "not known without measuring" in show(plan(run())) and "not known" not in show(p)


def test_batch_is_resolved_as_in_training():
    p = plan(dataclasses.replace(SMALL, micro_batch_size=None), gpus=8, details=False)
    assert (p.micro_batch_size, p.accumulation, p.windows) == (16, 4, 512)
    with pytest.raises(ValueError, match="512 windows of 1024, which do not divide over 3 ranks.*1, 2, 4"):
        plan(SMALL, gpus=3)
    with pytest.raises(ValueError, match="micro_batch_size 7 does not divide"):
        plan(dataclasses.replace(SMALL, micro_batch_size=7))


def test_data_folder(tmp_path):
    words = random.Random(0).choices(["to", "be", "or", "not"], k=6000)
    (tmp_path / "text.txt").write_text("\n\n".join(" ".join(words[i : i + 100]) for i in range(0, 6000, 100)))
    prepare("files", tmp_path / "data", tmp_path / "text.txt", "byte", val_tokens=600)
    config = run(data_dir=str(tmp_path / "data"), vocab_size=None, max_steps=100, eval_interval=30, eval_tokens=2**20)
    p = plan(config, details=False)
    assert p.config.vocab_size == 320 and not p.vocabulary_assumed
    assert p.epochs == 100 * 4 * ROWS * LENGTH / p.data_tokens and 10_000 < p.data_tokens < 20_000
    assert "epochs of" in show(p) and "no data folder" not in show(p)
    val = len(open_data(tmp_path / "data").split("val"))
    windows = (val - 1) // LENGTH  # of all that there is; at steps 0, 30, 60, 90 and 100
    assert p.validation == pytest.approx(5 * windows * LENGTH / 3 / p.tokens)
    with pytest.raises(ValueError, match="vocab_size 64 is smaller than the 257"):
        plan(dataclasses.replace(config, vocab_size=64))
    (tmp_path / "data" / "COMPLETE").unlink()
    with pytest.raises(ValueError, match="not a finished data folder"):
        plan(config)


def test_without_a_data_folder(tmp_path):
    p = plan(dataclasses.replace(SMALL, data_dir=str(tmp_path / "none")), details=False)
    assert p.config.vocab_size == 50304 and p.vocabulary_assumed and p.epochs is None and p.data_tokens is None
    assert "no data folder" in show(p) and "vocabulary is assumed" in show(p)
    assert plan(SMALL, vocab_size=257, details=False).config.vocab_size == 320
    assert "assumed" not in show(plan(dataclasses.replace(SMALL, vocab_size=1000), vocab_size=257, details=False))


@pytest.mark.parametrize("eot", [None, 50256])
def test_documents_without_a_data_folder(eot):
    """Whatever the end-of-text of the data will be."""
    config = dataclasses.replace(SMALL, document_mask=True, eot=eot)
    assert plan(config, details=False).config.eot == (eot or 0)
    config = dataclasses.replace(config, block_size=8, batch_tokens=8)
    assert trace.batches(config, torch.device("cpu"))[0].eot == (eot or 0)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(mfu=0), "mfu must lie in"),
        (dict(mfu=1.5), "mfu must lie in"),
        (dict(mfu=math.nan), "mfu must lie in"),
        (dict(gpus=0), "gpus must be a whole number from 1 on"),
        (dict(price_per_hour=-1), "price_per_hour must not be negative"),
        (dict(price_per_hour=math.nan), "price_per_hour"),
        (dict(tokens_per_s=0), "tokens_per_s must be positive"),
        (dict(vocab_size=0), "vocab_size must be at least 1"),
        (dict(mfu=2, gpus=-1), "gpus.*mfu"),
    ],
)
def test_arguments_out_of_range(arguments, message):
    with pytest.raises(ValueError, match=message):
        plan(SMALL, **arguments)


def test_config_out_of_range():
    with pytest.raises(ValueError, match="max_steps must be at least 1"):
        plan(run(max_steps=0))
    with pytest.raises(ValueError, match="pos 'ropee' is no scheme; did you mean rope"):
        plan(run(pos="ropee"))
    with pytest.raises(ValueError, match="device 'gpu' cannot be used"):
        plan(run(device="gpu"))
    for fields in (dict(pos_options={1: 2, "base": 3}), dict(pos_options={"base": {"a"}}), dict(window=(8, 0))):
        with pytest.raises(ValueError):
            plan(run(**fields), details=False)


def test_a_scheme_that_computes_a_number_when_it_is_made(tmp_path):
    """Its constants are known, though the model has no contents; and the file may make tensors of its own."""
    (tmp_path / "mine.py").write_text(
        "import torch\n"
        "from schemes import Scheme\n"
        "TABLE = torch.arange(4.0)\n"
        "class Mine(Scheme):\n"
        "    def __init__(self, config, layer):\n"
        "        super().__init__(config, layer)\n"
        "        self.scale = torch.tensor(float(config.n_embd)).sqrt().item()\n"
        "    def encode(self, qk, x, ctx):\n"
        "        return qk * self.scale / TABLE.sum()\n"
    )
    config = run(pos=f"{tmp_path}/mine.py:Mine")
    assert plan(config, details=False).parameters == plan(run(pos="none"), details=False).parameters
    assert GPT(config.model_config())(ids())[0].isfinite().all()


@pytest.mark.slow
def test_dtypes_of_a_gpu_that_is_not_here():
    """tf32 is float32 in memory, and of GPUs alone; `auto` is bfloat16 on a GPU."""
    tiny = dict(n_layer=1, n_head=1, n_embd=16, block_size=32, vocab_size=64, batch_tokens=64, micro_batch_size=2)
    expected = plan(run(**tiny, device="cuda", dtype="float32")).memory
    assert (
        plan(run(**tiny, device="cuda", dtype="tf32")).memory
        == plan(run(**tiny, device="auto", dtype="tf32")).memory
        == expected
    )
    assert (
        plan(run(**tiny, device="cuda")).memory == plan(run(**tiny, device="cuda", dtype="bfloat16")).memory != expected
    )
    with pytest.raises(ValueError, match="tf32 needs a CUDA device"):
        plan(run(**tiny, device="cpu", dtype="tf32"))


# ---- text


@pytest.mark.slow
def test_text_of_a_plan(tmp_path):
    fields = dict(n_layer=2, n_head=2, n_embd=64, vocab_size=50304, device="cuda", data_dir=str(tmp_path / "none"))
    config = RunConfig(**fields)
    text = plan_text(config, gpus=8, mfu=0.5, price_per_hour=3.0)
    p = plan(config, gpus=8, mfu=0.5, price_per_hour=3.0)
    assert text == show(p)
    one = p.hours["A100"][0]
    for expected in (
        f"{p.parameters['total']:,}",
        f"{p.flops_per_token:,}",
        f"{p.tokens:,}",
        "8 rank(s) × 1 × micro_batch_size 64",
        "all T² scores; without those that causality masks",
        "MFU of 0.5",
        f"cost {3 * one:,.2f}",
        f"{p.memory['cuda']['total'] / 1e9:.2f} GB",
        "8 × H100",
        "80 GB: yes",
    ):
        assert expected in text, expected


def test_ranks_of_the_text_are_those_of_the_launch(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert "= 4 rank(s) × 1 ×" in plan_text(run(n_layer=1)) and "= 2 rank(s) × 2 ×" in plan_text(run(n_layer=1), gpus=2)


@pytest.mark.slow
def test_text_of_several_schemes_and_windows():
    shape = dict(n_layer=2, block_size=192, batch_tokens=4 * ROWS * 192)
    text = plan_text(run(**shape, pos=["rope+alibi", "none"], window=[16, 0]))
    assert text.startswith("rope+alibi, none: 2 layers × 64, 2 heads, length 192, window [16, 0], vocabulary 20,032")
    assert "the scores are those of a window" in text


def test_text_with_dropout():
    """A CPU's attention is plain products then, whose number a plan knows all the same."""
    assert "all T² scores; without" in plan_text(run(n_layer=1, dropout=0.1))


@pytest.mark.slow
@pytest.mark.parametrize("names", [["rope", "crope", "carope"], pytest.param(None, marks=pytest.mark.slow)], ids=str)
def test_scheme_table(names):
    config = RunConfig(n_layer=2, n_head=2, n_embd=64, vocab_size=320, block_size=128)
    lines = (scheme_table(config, names) if names else plan_text(config, schemes=True)).splitlines()
    rows = {line.split(" | ")[0][2:]: line.split(" | ")[1:] for line in lines if line.startswith("| ")}
    assert list(rows)[1:] == (names or list(SCHEMES))
    rope = GPT(GPTConfig(128, 320, 2, 2, 64)).parameter_count()
    for pos in list(rows)[1:]:
        count = GPT(GPTConfig(128, 320, 2, 2, 64, pos=pos)).parameter_count()
        assert rows[pos][0] == f"{count:,}" and rows[pos][2] == f"{count - rope:+,}"
    assert rows["carope"][4] == f"{6 * 2 * 64 * 2:,}" and rows["crope"][4] == "0"
    assert rows["rope"][-1] == "1.000 |"
    assert "| rope+alibi |" in scheme_table(config, ["rope+alibi"])
    with pytest.raises(ValueError, match="'alibbi' is no scheme; did you mean alibi"):
        scheme_table(config, ["alibbi"])
    with pytest.raises(ValueError, match="takes no --gpus"):
        plan_text(config, schemes=True, gpus=8)
