"""bench.py bytes and roofline: what is counted, and the arithmetic of an estimate. No GPU is asked."""

import importlib.util
import json

import pytest
import torch

from nanope.bench import bytes as gpu_bytes
from nanope.bench import roofline
from nanope.bench.roofline import CARDS, Traffic, eager_bytes, mfu, parts

HAS_TRITON = torch.version.cuda is not None and importlib.util.find_spec("triton") is not None


def test_eager_bytes_are_of_what_operators_read_and_write():
    x, few, row = torch.zeros(10, 20), torch.zeros(10, 1, dtype=torch.int64), torch.zeros(20)
    with Traffic() as traffic:
        y = x + x  # two reads of 800 bytes, a write
        assert traffic.bytes == 3 * 800
        y.view(200)
        y @ y.t()
        assert traffic.bytes == 3 * 800  # a view moves nothing, and products are counted elsewhere
        y * row.expand(10, 20)
        assert traffic.bytes == 5 * 800 + 80
        y.gather(1, few)
        assert traffic.bytes == 5 * 800 + 80 + 80 + 40


def test_a_block_costs_the_same_in_every_layer_and_a_rotation_more_than_none():
    of_rope = [eager_bytes("rope", 512, 256, layers) for layers in (1, 2, 3)]
    of_none = [eager_bytes("none", 512, 256, layers) for layers in (1, 2)]
    assert of_rope[2] - of_rope[1] == of_rope[1] - of_rope[0] > of_none[1] - of_none[0]


def test_arithmetic_of_the_roofline():
    card = CARDS["H100 SXM"]
    once, twice = (parts(card, tokens, 512, 1e9, 2e9) for tokens in (16384, 32768))
    assert once["elementwise, blocks"] == pytest.approx(12e9 / 2.9e12)
    assert once["elementwise, loss"] == pytest.approx(2e9 / 2.9e12)
    n = 12 * 12 * 768**2
    assert once["products of the blocks"] == pytest.approx(6 * n * 16384 / 600e12)
    assert twice["attention"] == pytest.approx(2 * once["attention"])
    assert parts(card, 16384, 512, 1e9, 2e9, 2.0)["attention"] == pytest.approx(once["attention"] / 2)
    # Two passes of half a step share what AdamW moves
    shared = "AdamW and clipping, shared by a step's passes"
    assert twice[shared] == pytest.approx(2 * once[shared])
    flops = (6 * (n + 50304 * 768) + 12 * 12 * 768 * 512) * 16384
    assert mfu(card, 16384, 512, flops / card.peak) == pytest.approx(1)


def test_tables_of_the_kept_figures(capsys):
    """Speed relative to rope is of the bytes in results/gpu-bytes; now no block moves more than before."""
    before, now = (json.loads((roofline.FOLDER / f"{name}.json").read_text()) for name in ("before", "now"))
    assert before["block"].keys() == now["block"].keys()
    for pos in now["block"]:
        assert sum(now["block"][pos][k] for k in ("forward", "backward")) < 1.001 * sum(
            before["block"][pos][k] for k in ("forward", "backward")
        )
    table = roofline.table_of_schemes(now["block"])
    assert "| rope | 1.00 | 1.00 |" in table
    assert f"{(now['loss']['forward'] + now['loss']['backward']) / 1e9:.3f}" in gpu_bytes.table(now)
    assert all(f"| {pos} |" in gpu_bytes.table(now) for pos in now["block"])


def test_bytes_says_what_is_missing(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(SystemExit, match="take a CUDA build of torch"):
        gpu_bytes.main([])


@pytest.mark.slow
@pytest.mark.skipif(not HAS_TRITON, reason="needs a CUDA build of torch with Triton")
def test_kernels_of_a_block_and_of_the_loss():
    """By hand: the sum into the residual stream reads it in float32 and two results in bfloat16, and writes it."""
    from nanope.bench import lowering

    available = torch.cuda.is_available
    graphs = lowering.block_graphs("rope", {}, 32, 512)
    assert [g.backward for g in graphs] == [False, True] and torch.cuda.is_available is available
    assert graphs[0].kernels[-1][1] == 16384 * 768 * (4 + 2 + 2 + 4)
    assert "triton" in graphs[0].code and sum(g.bytes for g in graphs) < 1.85e9
    loss = lowering.loss_graphs(16384)
    assert sum(g.bytes for g in loss) < 4.6e9  # with a scatter it is 10.8
