"""learned and sinusoidal, which add positions to the token embeddings."""

import pytest
import reference
import torch
from models import BLOCK, build, close, config, tokens

from model import GPT, SCHEMES


@pytest.mark.parametrize("width", [2, 6, 48])
def test_sinusoids(width):
    """In float64 for a float64 model: angles, cos and sin are never below the model's dtype."""
    model = GPT(config("sinusoidal", {"base": 100.0, "scale": 2.0}, n_head=1, n_embd=width)).double()
    seen = {}
    model.transformer.h[0].register_forward_pre_hook(lambda module, args: seen.update(x=args[0]))
    model(torch.zeros(1, 300, dtype=torch.int64))
    close(seen["x"][0] - model.transformer.wte.weight[0], reference.sinusoids(300, width, 100.0, 2.0), atol=1e-12)


@pytest.mark.parametrize("case", ["learned", "sinusoidal"])
def test_an_offset_changes_absolute_positions(case):
    model, idx = build(case), tokens(BLOCK - 3)
    assert (model.hidden(idx, offset=3) - model.hidden(idx)).abs().max() > 1e-3


def test_learned_refuses_to_extend_and_names_both_lengths():
    model = build("learned")
    for call in (
        lambda: model(tokens(BLOCK + 1)),
        lambda: model(tokens(BLOCK + 1), tokens(BLOCK + 1)),
        lambda: model.generate(tokens(4), BLOCK - 2),
    ):
        with pytest.raises(ValueError, match=rf"(?s)learned.*\b{BLOCK}\b.*\b{BLOCK + 1}\b"):
            call()
    assert {pos for pos, scheme in SCHEMES.items() if not scheme.extends} == {"learned", "urpe"}
