"""What ranks share."""

import pytest
import torch
import torch.distributed as dist

from model import GPT, GPTConfig
from nanope.distributed import Ranks, data_parallel, pick_device

IDX = torch.arange(32).view(2, 16)


def test_gradients_lie_in_buckets_alone(tmp_path):
    """From the first pass of the first step on, and after zero_grad: never a second copy beside them."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = GPT(GPTConfig(16, 64, 2, 2, 16))
        parallel = data_parallel(model, Ranks(0, 2), torch.device("cpu"))
        held = lambda: {p.grad.untyped_storage().data_ptr() for p in model.parameters()}  # noqa: E731
        for _ in range(3):
            with parallel.no_sync():
                parallel(IDX, IDX)[1].backward()
            assert len(held()) == 1
            parallel(IDX, IDX)[1].backward()
            assert len(held()) == 1
            model.zero_grad(set_to_none=False)
            assert len(held()) == 1 and all(p.grad.eq(0).all() for p in model.parameters())
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(("capability", "allowed"), [((8, 0), True), ((9, 0), True), ((10, 3), False)])
def test_no_command_takes_cudnns_attention_on_capability_10(capability, allowed, monkeypatch):
    monkeypatch.setattr(torch, "zeros", lambda *_, **__: torch.tensor(0.0))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    before = torch.backends.cuda.cudnn_sdp_enabled()
    try:
        assert pick_device("cuda") == torch.device("cuda", 0)
        assert torch.backends.cuda.cudnn_sdp_enabled() == allowed
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)
