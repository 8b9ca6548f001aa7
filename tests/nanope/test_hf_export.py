"""nanope/hf.py: which models become models of the transformers library, and that they compute the same."""

import pytest
import torch

from model import GPT, GPTConfig
from nanope.hf import as_transformers


def model_of(**fields):
    """A model whose weights are larger than initial ones, so that positions matter."""
    model = GPT(GPTConfig(block_size=24, vocab_size=64, n_layer=2, n_head=2, n_embd=16, **fields)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())), alpha=0.2)
    return model


@pytest.mark.slow
@pytest.mark.parametrize(
    "fields, kind",
    [
        (dict(pos="learned", bias=True), "GPT2LMHeadModel"),
        (dict(pos="rope", pos_options={"fraction": 0.5, "base": 500.0}), "GPTNeoXForCausalLM"),
        (dict(pos="crope", bias=True), "GPTNeoXForCausalLM"),
    ],
)
@torch.no_grad()
def test_logits_are_the_same(fields, kind):
    pytest.importorskip("transformers")
    model = model_of(**fields)
    theirs = as_transformers(model, eot=63)
    assert type(theirs).__name__ == kind and theirs.config.eos_token_id == 63
    idx = torch.randint(64, (2, 24), generator=torch.Generator().manual_seed(1))
    assert (theirs(input_ids=idx).logits - model(idx)[0]).abs().max() < 1e-5


@pytest.mark.parametrize(
    "fields, words",
    [
        *((dict(pos=pos), f"{pos} cannot be exported") for pos in ("comrope", "carope", "alibi", "sinusoidal", "none")),
        (dict(pos="rope+alibi"), "no architecture of transformers has it"),
        (dict(pos=["rope", "none"]), "no architecture of transformers has it"),
        (dict(window=[8, 0]), "window .* cannot be exported"),
        (dict(pos="rope", pos_options={"explicit": True}), "explicit frequencies cannot be exported"),
    ],
)
def test_what_transformers_does_not_have(fields, words):
    with pytest.raises(ValueError, match=words):
        as_transformers(model_of(**fields), eot=63)
