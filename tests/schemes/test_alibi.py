"""alibi: the slopes of the paper."""

import pytest
import reference
import torch
from models import close, config

from model import GPT


@pytest.mark.parametrize("H", [1, 2, 3, 4, 6, 8, 12, 20])
def test_alibi_slopes(H):
    pos = GPT(config("alibi", n_head=H, n_embd=4 * H)).transformer.h[0].attn.pos
    close(pos.slopes(), torch.tensor(reference.alibi_slopes(H), dtype=torch.float64), atol=1e-15)
    if H == 8:  # the paper's own example
        close(pos.slopes(), 0.5 ** torch.arange(1, 9, dtype=torch.float64), atol=1e-15)
