"""What ranks share."""

import torch
import torch.distributed as dist

from model import GPT, GPTConfig
from nanope.distributed import Ranks, data_parallel

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
