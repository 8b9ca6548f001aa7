"""The Triton kernels that torch.compile makes for a GPU that is not there, and the bytes that they move.

A tool, no production code. It needs a CUDA build of torch with Triton, and no GPU. A model of one layer is traced on
fake CPU tensors, its fast paths chosen as on CUDA (nanope.ops.as_on). The devices in its graphs are then rewritten, and
Inductor makes their code. While it does, torch.cuda says that an H100 is there: `as_h100` changes these functions and
puts them back. No kernel is compiled to machine code, and none runs.

The bytes of a kernel are of what it reads and writes, each element once (`bytes_of`). A second read, which a cache may
serve, is not in them.
"""

import contextlib
import copy
import math
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from model import GPTConfig
from nanope.costs import GPUAttention, Unfilled
from nanope.loss import linear_cross_entropy
from nanope.ops import as_on, fuse_rotations

DEVICE = SimpleNamespace(  # what Inductor asks of an H100 SXM (sm_90)
    name="NVIDIA H100 80GB HBM3",
    major=9,
    minor=0,
    multi_processor_count=132,
    total_memory=80 * 2**30,
    warp_size=32,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    regs_per_multiprocessor=65536,
    shared_memory_per_block=49152,
    shared_memory_per_block_optin=232448,
    shared_memory_per_multiprocessor=233472,
    L2_cache_size=50 * 2**20,
    clock_rate=1980000,
    memory_clock_rate=2619000,
    memory_bus_width=5120,
    gcnArchName="",
    is_integrated=0,
    is_multi_gpu_board=0,
)


CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@dataclass
class Graph:
    """One compiled graph."""

    backward: bool
    kernels: list[tuple[str, int]]  # of Triton, in order: what it computes, bytes
    others: list[str]  # calls of libraries, in order: matrix products, attention
    code: str  # the module that Inductor wrote

    @property
    def bytes(self) -> int:
        """Of its Triton kernels."""
        return sum(size for _, size in self.kernels)


# ---- what is lowered


def block_graphs(pos, options: dict, rows: int, length: int, width: int = 768, heads: int = 12) -> list[Graph]:
    """A block of a scheme, its forward and its backward pass in bfloat16, for `rows` windows of `length` tokens."""
    with FakeTensorMode(), as_on("cuda"), torch.autocast("cpu", torch.bfloat16):
        model = Unfilled(GPTConfig(length, 64, 1, heads, width, pos=pos, pos_options=options))
        model.attend, found = GPUAttention(torch.bfloat16), []
        model.transformer["h"][0].compile(backend=capturing(found), fullgraph=True, dynamic=False)
        model(torch.zeros(rows, length, dtype=torch.int64))[0].sum().backward()
    return found


def loss_graphs(tokens: int, vocabulary: int = 50304, width: int = 768) -> list[Graph]:
    """The fused loss of `tokens` hidden states in bfloat16, its forward and its backward pass."""
    found = []
    with FakeTensorMode(), as_on("cuda"), torch.autocast("cpu", torch.bfloat16):
        h, weight = (torch.empty(n, width, requires_grad=True) for n in (tokens, vocabulary))
        loss = torch.compile(linear_cross_entropy, backend=capturing(found), fullgraph=True, dynamic=False)
        loss(h, weight, torch.zeros(tokens, dtype=torch.int64)).backward()
    return found


# ---- how


def capturing(found: list[Graph]):
    """A backend for torch.compile that appends a Graph for each graph. What it returns gives tensors without
    contents."""
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.partitioners import min_cut_rematerialization_partition
    from torch._inductor.decomposition import select_decomp_table
    from torch._inductor.fx_passes.joint_graph import joint_graph_passes

    fuse_rotations()  # as GPT.compile_parts does

    def compiler(backward: bool):
        def compile(gm, inputs):
            results = [getattr(n, "meta", {}).get("val") for n in gm.graph.find_nodes(op="output")[0].args[0]]
            found.append(lower(*on_cuda(copy.deepcopy(gm), inputs), backward))

            def run(arguments):
                arguments.clear()
                return [
                    None if r is None else torch.empty_strided(r.size(), r.stride(), dtype=r.dtype) for r in results
                ]

            run._boxed_call = True
            return run

        return compile

    def partition(gm, inputs, **options):
        joint_graph_passes(gm)
        return min_cut_rematerialization_partition(gm, inputs, **options, compiler="inductor")

    return aot_autograd(
        fw_compiler=compiler(False),
        bw_compiler=compiler(True),
        decompositions=select_decomp_table,
        partition_fn=partition,
        keep_inference_input_mutations=True,
    )


def on_cuda(gm: torch.fx.GraphModule, inputs: list) -> tuple[torch.fx.GraphModule, list]:
    """A graph that was traced on the CPU and its inputs, moved to cuda."""
    from torch.fx.passes.fake_tensor_prop import FakeTensorProp

    mode = next(t.fake_mode for t in inputs if isinstance(t, torch.Tensor))

    def moved(value):
        if isinstance(value, torch.Tensor):
            with mode:
                return torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device=CUDA)
        return CUDA if isinstance(value, torch.device) else value

    for node in gm.graph.nodes:
        node.args, node.kwargs = (torch.fx.node.map_aggregate(part, moved) for part in (node.args, dict(node.kwargs)))
    inputs = [moved(value) for value in inputs]
    for node, value in zip(gm.graph.find_nodes(op="placeholder"), inputs):
        node.meta["val"] = value
    FakeTensorProp(gm, mode).propagate_dont_convert_inputs(*inputs)
    gm.recompile()
    return gm, inputs


class Stopped(Exception):
    """Raised where Inductor would compile what it wrote."""


def lower(gm: torch.fx.GraphModule, inputs: list, backward: bool) -> Graph:
    """What Inductor makes of a graph on cuda."""
    import torch._inductor.config
    from torch._inductor import compile_fx, scheduler
    from torch._inductor.graph import GraphLowering

    found = []

    def stop(lowering):
        code, _ = lowering.codegen()
        kernels, others = [], []
        for node in lowering.scheduler.nodes:
            if isinstance(node, scheduler.ExternKernelSchedulerNode):
                others.append(getattr(node.node, "python_kernel_name", None) or type(node.node).__name__)
            elif not isinstance(node, scheduler.NopKernelSchedulerNode):
                kernels.append((what(node), bytes_of(node, lowering)))
        found.append(Graph(backward, kernels, others, getattr(code, "value", code)))
        raise Stopped

    with as_h100(), torch._inductor.config.patch(fx_graph_cache=False, compile_threads=1):
        with replaced(GraphLowering, compile_to_module=stop):
            try:
                compile_fx.compile_fx_inner(gm, inputs, is_backward=backward)
            except Exception:  # Stopped, in an error of Inductor's
                if not found:
                    raise
    return found[0]


def bytes_of(node, lowering) -> int:
    """Bytes that a kernel reads and writes: of each buffer as many elements as its loops reach, once. What stays inside
    of the kernel counts as nothing, and an index that is data as one element an iteration."""
    from torch._inductor.dependencies import MemoryDep

    sizes, parts = lowering.sizevars, node.get_nodes()
    reached = {}
    for part in parts:
        for access in part.read_writes.reads | part.read_writes.writes:
            if isinstance(access, MemoryDep):  # the others are about order
                elements = math.prod(access.size) if access.is_indirect() else access.get_numel()
                found = access.normalize(), sizes.optimization_hint(elements, fallback=0)
                reached.setdefault(access.name, set()).add(found)
    total = 0
    for name, accesses in reached.items():
        made = lowering.scheduler.name_to_buf.get(name)
        if made is not None and made.defining_op in parts and {user.node for user in made.users} <= set(parts):
            continue
        layout = lowering.get_buffer(name).get_layout()
        elements = min(sum(n for _, n in accesses), sizes.optimization_hint(math.prod(layout.size), fallback=0))
        total += elements * layout.dtype.itemsize
    return total


def what(node) -> str:
    """The operations that a kernel computes, in words."""
    origins = [origin for part in node.get_nodes() if part.node for origin in part.node.origins]
    names = (str(getattr(o.target, "__name__", o.target)).removesuffix(".default") for o in origins if o.op[0] == "c")
    return " ".join(dict.fromkeys(name.partition(".")[0] for name in names))


@contextlib.contextmanager
def replaced(owner, **values):
    """Within it, attributes of `owner` have these values."""
    before = {name: getattr(owner, name) for name in values}
    for name, value in values.items():
        setattr(owner, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(owner, name, value)


@contextlib.contextmanager
def as_h100():
    """Within it torch.cuda, dynamo's interface to it and Triton's driver say that one H100 is there: for the code
    generator, since nothing else would work."""
    import triton
    from torch._dynamo.device_interface import CudaInterface
    from torch.utils._triton import has_triton
    from triton.backends.compiler import GPUTarget

    target = GPUTarget("cuda", 10 * DEVICE.major + DEVICE.minor, DEVICE.warp_size)
    driver = SimpleNamespace(
        get_current_target=lambda: target,
        get_active_torch_device=lambda: CUDA,
        get_current_device=lambda: 0,
        get_device_interface=lambda: torch.cuda,
    )
    common = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda *_: None,
        "synchronize": lambda *_: None,
        "get_device_properties": lambda *_: DEVICE,
    }
    private = {"_lazy_init": lambda: None, "_exchange_device": lambda _: 0, "_maybe_exchange_device": lambda _: 0}
    random = {"get_rng_state": lambda *_: torch.zeros(16, dtype=torch.uint8), "set_rng_state": lambda *_: None}
    card = {
        "get_device_capability": lambda *_: (DEVICE.major, DEVICE.minor),
        "get_device_name": lambda *_: DEVICE.name,
        "is_bf16_supported": lambda *_: True,
        "is_initialized": lambda: False,
    }
    interface = {name: staticmethod(value) for name, value in common.items()}
    worker = {name: interface[name] for name in ("current_device", "get_device_properties")}
    torch._C._ensureCUDADeviceGuardSet()
    has_triton.cache_clear()
    with contextlib.ExitStack() as stack:
        stack.enter_context(replaced(torch.cuda, **common, **private, **random, **card))
        stack.enter_context(replaced(CudaInterface, **interface))
        stack.enter_context(replaced(CudaInterface.Worker, **worker))
        stack.enter_context(replaced(triton.runtime.driver, _active=driver))
        stack.callback(has_triton.cache_clear)
        yield
