"""nanope/block_masks.py: FlexAttention's masks."""

import dataclasses

import pytest
import torch
import torch.nn.attention.flex_attention as flex
from models import Largest, build, layer_context

from nanope import block_masks


def test_prompts_and_small_heads_have_no_block_masks():
    """Asked of the model's own contexts, as on a GPU."""
    for fields, cached, made in (({}, False, True), ({}, True, False), ({"n_head": 4, "n_embd": 32}, False, False)):
        pos, x = build("alibi", **fields).transformer.h[0].attn.pos, torch.randn(2, 40, 48)
        ctx = dataclasses.replace(layer_context(pos, x), dtype=torch.float32, device=torch.device("cuda"))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(block_masks, "causal_block_mask", lambda *_: "made")
            assert block_masks.BlockMasks(ctx, 0.0, cached).of(pos, 0) == ("made" if made else None)


@pytest.mark.parametrize("length", [1, 127, 128, 129, 300, 512, 1000])
@pytest.mark.parametrize("window", [0, 1, 5, 128, 129, 200, 600])
def test_block_masks_are_those_of_create_block_mask(length, window):
    if window >= length:
        return
    ours = block_masks.causal_block_mask(length, window, torch.device("cpu"))
    theirs = flex.create_block_mask(ours.mask_mod, None, None, length, length, device="cpu")
    assert ours.shape == theirs.shape and ours.BLOCK_SIZE == theirs.BLOCK_SIZE
    assert torch.equal(ours.to_dense(), theirs.to_dense())
    for name in ("kv", "full_kv", "q", "full_q"):
        counts, other = getattr(ours, f"{name}_num_blocks"), getattr(theirs, f"{name}_num_blocks")
        assert torch.equal(counts, other) and counts.dtype == other.dtype, name
        blocks, others = getattr(ours, f"{name}_indices"), getattr(theirs, f"{name}_indices")
        for row, count in enumerate(counts[0, 0].tolist()):
            assert torch.equal(blocks[0, 0, row, :count], others[0, 0, row, :count]), name


def test_a_long_block_mask_forms_few_elements():
    with Largest() as largest:
        block_masks.causal_block_mask(2**16, 4096, torch.device("cpu"))
    assert largest.elements <= (2**16 / 128 + 1) ** 2
