"""NLL and hits of given tokens, batches, and very long contexts."""

import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from evaluating import evaluate, model, rows

from model import GPT, GPTConfig
from nanope import REPO
from nanope.evaluation import scoring
from nanope.evaluation.scoring import Compute, score_head, score_tokens


def test_equal_likeliest_tokens_count_as_argmax_has_them():
    h, weight = torch.ones(6, 4), torch.tensor([[0.0], [1.0], [1.0], [0.5]]).expand(4, 4).clone()  # tokens 1 and 2 tie
    targets = torch.tensor([1, 2, 3, 1, 0, 2])
    nll, hits = score_head(h, weight, targets)
    assert hits.tolist() == [True, False, False, True, False, False]
    assert torch.allclose(nll, F.cross_entropy(h @ weight.t(), targets, reduction="none"))


def test_batches_do_not_change_the_figures(data):
    gpt = model("carope")
    first, second = (
        rows(evaluate(gpt, data, [64], ["same-targets"], Compute(batch_tokens=n), max_targets=500))[64][
            "nats_per_token"
        ]
        for n in (64, 10_000)
    )
    assert first == pytest.approx(second, abs=1e-6)


@pytest.mark.parametrize("pos", ["rope", "alibi", "carope", "fox", "path", "xpos", "learned"])
def test_windows_filled_up_as_on_a_gpu_have_the_same_figures(pos, monkeypatch):
    """To whole blocks of attention, where the scheme goes as far; learned's table ends at 200."""
    gpt, sizes = GPT(GPTConfig(200, 64, 2, 2, 16, pos=pos), seed=0).eval(), []
    tokens, scored = np.random.default_rng(0).integers(0, 64, (2, 151)), np.array([150, 20])
    gpt.transformer.wte.register_forward_pre_hook(lambda module, args: sizes.append(args[0].size(1)))
    plain, hits = score_tokens(gpt, tokens, scored)
    monkeypatch.setattr(scoring, "kind_of", lambda device: "cuda")
    filled, same = score_tokens(gpt, tokens, scored)
    assert sizes == [150, 150 if pos == "learned" else 256]
    assert np.abs(filled - plain).max() < 1e-5 and np.array_equal(hits, same)


@pytest.mark.parametrize("length, size", [
    (1, 16), (16, 16), (17, 32), (100, 128), (129, 256), (1000, 1024), (1025, 1280), (1536, 1536), (5000, 5120),
])  # fmt: skip
def test_windows_are_filled_up_to_few_sizes(length, size, monkeypatch):
    gpt = GPT(GPTConfig(200, 64, 2, 2, 16, pos="rope"), seed=0)
    assert scoring.whole_blocks(gpt, length) == length
    monkeypatch.setattr(scoring, "kind_of", lambda device: "cuda")
    assert scoring.whole_blocks(gpt, length) == size


def test_a_report_names_the_kernel_of_each_length(monkeypatch):
    gpt = GPT(GPTConfig(16, 64, 2, 2, 16, pos="rope", window=32), seed=0)
    assert Compute().conditions(gpt, [16, 32])["backend"] == "sdpa flash_attention"
    assert Compute().conditions(gpt, [16, 32, 64, 128])["backend"] == (
        "sdpa flash_attention at 16, 32; sdpa with a window, by chunks at 64, 128"
    )
    assert (
        Compute().conditions(gpt, [16])["dtype"] == "float32"
        and Compute(tf32=True).conditions(gpt, [16])["dtype"] == "tf32"
    )


@pytest.mark.slow
@pytest.mark.parametrize("pos", ["rope", "alibi", "carope", "fox", "path", "stickbreaking"])
def test_causal_at_8192_positions(pos):
    gpt = GPT(GPTConfig(16, 64, 1, 2, 16, pos=pos), seed=0)
    tokens = np.random.default_rng(0).integers(0, 64, (1, 8193))
    changed = tokens.copy()
    changed[0, 8000] = (changed[0, 8000] + 1) % 64
    before, after = (score_tokens(gpt, t, np.array([8192]))[0] for t in (tokens, changed))
    assert np.array_equal(before[:7999], after[:7999])  # up to the target 7,999
    assert np.abs(before[8000:] - after[8000:]).max() > 1e-6


@pytest.mark.slow
def test_memory_is_linear_in_length():
    # Scores of 24,576 positions would be 2.4 GB a head, and the logits of all 2.4 GB
    code = """
import resource, sys, numpy as np
from model import GPT, GPTConfig
from nanope.evaluation.scoring import score_tokens
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
gpt = GPT(GPTConfig(16, 24576, 1, 1, 16, pos="rope"), seed=0)
before = peak()
score_tokens(gpt, np.zeros((1, 24577), np.int64), np.array([2048]))
print(peak() - before)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 400  # MB
