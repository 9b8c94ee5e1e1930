"""What only an accelerator can show: no host sync, NCCL, bounded device memory. Everything else runs on the CPU."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

from support.models import batch, build

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel as DDP

from dist_ema import ShardedEMA, kernels
from dist_ema.errors import EMAStateError
from dist_ema.geometry.runs import Rows, whole
from dist_ema.kernels import cuda
from dist_ema.kernels.fingerprint import Part, device_digest, partial_digest
from dist_ema.kernels.rounding import ElementPositions, Rounding, average_key

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture
def nccl() -> Iterator[None]:
    """A group of one process."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0", RANK="0", WORLD_SIZE="1")
    dist.init_process_group("nccl", rank=0, world_size=1, device_id=torch.device("cuda", 0))
    yield
    dist.destroy_process_group()


def _wrap(kind: str) -> nn.Module:
    model = build(scalar=False).cuda()
    if kind == "ddp":
        return DDP(model)
    if kind == "fsdp1":
        return FSDP(model, use_orig_params=True, device_id=0)
    if kind == "fsdp2":
        return fully_shard(model, mesh=init_device_mesh("cuda", (1,)))
    if kind == "hsdp":
        return fully_shard(model, mesh=init_device_mesh("cuda", (1, 1), mesh_dim_names=("replicate", "shard")))
    if kind == "tp":
        plan = {name: ColwiseParallel() for name, part in model.named_modules() if isinstance(part, nn.Linear)}
        return parallelize_module(model, init_device_mesh("cuda", (1,)), plan)
    return model


@torch.no_grad()
def _train(model: nn.Module) -> None:
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.ones_like(parameter))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("skip_nonfinite", [True, False])
def test_update_never_waits_for_the_device(dtype: torch.dtype, skip_nonfinite: bool) -> None:
    """A host sync in each step costs more than the update."""
    model = nn.Linear(3000, 3000).cuda().to(dtype)
    ema = ShardedEMA(model, averages={"a": 0.9, "b": 0.99}, skip_nonfinite=skip_nonfinite)
    ema.update()
    ema.update()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            ema.update()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_average_on_the_device_equals_that_on_the_host(dtype: torch.dtype) -> None:
    """Two routes of arithmetic must give one average, NaN and Inf included."""
    host = nn.Linear(333, 777).to(dtype)
    device = nn.Linear(333, 777).to(dtype).cuda()
    device.load_state_dict(host.state_dict())
    emas = [ShardedEMA(model, decay=0.9) for model in (host, device)]
    for step in range(5):
        for model, ema in zip((host, device), emas, strict=True):
            _train(model)
            if step == 2:
                with torch.no_grad():
                    model.weight[0, :3] = torch.tensor([float("nan"), float("inf"), -float("inf")])
            ema.update()
            if step == 2:
                with torch.no_grad():
                    model.weight[0, :3] = 1.0
    first, second = (ema.full_state_dict() for ema in emas)
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, rtol=3e-7, atol=0)
    assert [ema.metrics()["ema/skipped_elements"] for ema in emas] == [3, 3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("guarded", [True, False])
@pytest.mark.parametrize("offset", [0, 1])
def test_triton_kernel_gives_the_eager_route_to_one_unit(dtype: torch.dtype, guarded: bool, offset: int) -> None:
    """Hundreds of uneven tensors, sources at any address, three averages, two of them unaligned; 2**-23 of the larger
    of shadow and source."""
    kernel = cuda.choice()
    assert kernel is not None
    torch.manual_seed(0)
    sizes = [(37 * index * index) % 5000 for index in range(300)] + [3_000_001]
    sources = [torch.randn(size + offset, device="cuda").to(dtype)[offset:] for size in sizes]
    for source in sources:
        source[::97] = float("nan") if guarded else 1.0
    flats = [torch.randn(sum(sizes), device="cuda") for _ in range(2)]
    averages = [list(flat.split(sizes)) for flat in flats] + [[torch.randn(size, device="cuda") for size in sizes]]
    ranges = [(0, size) for size in sizes]
    for weights in ([1e-7, 1e-4, 0.3], [0.5, 0.7, 1.0]):
        counts, results = [], []
        for chosen in (kernel, None):
            guard = kernels.Guard() if guarded else None
            copies = [[shadow.clone() for shadow in average] for average in averages]
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(cuda, "_decided", [chosen])
                kernels.lerp(copies, sources, ranges, weights, kernels.Scratch(), guard)
            counts.append(guard.total() if guard is not None else 0)
            results.append(copies)
        assert counts[0] == counts[1]
        for first, second, before in zip(*results, averages, strict=True):
            for a, b, start, source in zip(first, second, before, sources, strict=True):
                unit = torch.maximum(start.abs(), source.float().nan_to_num(0).abs()) * 2**-23
                assert bool(((a - b).abs() <= unit).all()), weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("offset", [0, 1])
def test_rounded_shadows_have_the_bits_of_the_eager_route(dtype: torch.dtype, offset: int) -> None:
    """Whole tensors, columns and odd runs, positions past 2**32, sources at any address, two averages, NaN and Inf."""
    kernel = cuda.choice()
    assert kernel is not None
    torch.manual_seed(0)
    runs = [
        ((5, 300_001),),
        Rows(start=2**32 - 90_000, length=37, step=100, number=5_000),
        ((2**40, 1), (2**40 + 9, 70)),
    ]
    sizes = [sum(length for _, length in found) for found in runs]
    rounding = Rounding(ElementPositions(list("abc"), runs), [average_key(7, 3, name) for name in "xy"])
    sources = [torch.randn(size + offset, device="cuda").to(dtype)[offset:] for size in sizes]
    for source in sources:
        source[::97], source[5::1009] = float("nan"), float("inf")
    averages = [[torch.randn(size, device="cuda").bfloat16() for size in sizes] for _ in range(2)]
    results = []
    for chosen in (kernel, None):
        copies = [[shadow.clone() for shadow in average] for average in averages]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cuda, "_decided", [chosen])
            given = copies, sources, [(0, size) for size in sizes], [1e-3, 0.7], kernels.Scratch()
            kernels.lerp(*given, kernels.Guard(), rounding)
        results.append(copies)
    for first, second in zip(*results, strict=True):
        assert all(torch.equal(a.view(torch.int16), b.view(torch.int16)) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shadow", [torch.float32, torch.bfloat16])
def test_channels_last_goes_through_the_kernel(dtype: torch.dtype, shadow: torch.dtype) -> None:
    """Convolutions of image models: each tensor alone was a handful of slow launches."""
    model = nn.Sequential(nn.Conv2d(64, 96, 3), nn.Conv3d(8, 9, 3), nn.Linear(33, 40)).cuda().to(dtype)
    model[0].to(memory_format=torch.channels_last)
    model[1].to(memory_format=torch.channels_last_3d)
    plain = nn.Sequential(nn.Conv2d(64, 96, 3), nn.Conv3d(8, 9, 3), nn.Linear(33, 40)).cuda().to(dtype)
    plain.load_state_dict(model.state_dict())
    assert not model[0].weight.is_contiguous()
    emas = [ShardedEMA(one, decay=0.9, dtype=shadow) for one in (model, plain)]
    with pytest.MonkeyPatch.context() as patch:
        for step in range(4):
            for one, ema in zip((model, plain), emas, strict=True):
                _train(one)
                ema.update()
            if step == 0:  # the first copy needs no kernel
                patch.setattr(
                    "dist_ema.kernels.lerp._eager_lerp", lambda *_: pytest.fail("a tensor was left to the eager route")
                )
    first, second = (ema.full_state_dict() for ema in emas)
    assert all(torch.equal(first[name], value) for name, value in second.items())


def test_a_bf16_average_is_not_captured_into_a_graph() -> None:
    """Replays would repeat one update's random bits."""
    model = nn.Linear(300, 300).cuda()
    ema = ShardedEMA(model, decay=0.5, dtype=torch.bfloat16)
    for _ in range(2):
        ema.update()
    with pytest.raises(EMAStateError, match="cannot be captured"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        ema.update()
    ema.update()
    assert ema.num_updates == 3


def test_fingerprints_are_those_of_the_host_and_wait_once() -> None:
    """A wait for each block of 65,536 elements took longer than a training step."""
    model = nn.Sequential(*(nn.Linear(300, 500) for _ in range(20))).cuda()
    ema = ShardedEMA(model, decay=0.5)
    ema.update()
    parts = [Part(value, whole(value.numel())) for value in model.state_dict().values()]
    torch.cuda.set_sync_debug_mode("error")
    try:
        sums = [device_digest(part) for part in parts]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    host = [partial_digest(part.values.cpu(), part.runs) for part in parts]
    assert [int(one) % 2**64 for one in sums] == host == list(ema.fingerprint().values())


def test_update_can_be_captured_into_a_graph() -> None:
    """Whole training steps are captured; what waits for the device would end the capture."""
    model = nn.Linear(300, 300).cuda()
    ema = ShardedEMA(model, decay=0.5)
    for _ in range(2):
        ema.update()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ema.update()
    with torch.no_grad():
        model.weight.fill_(3.0)
    for _ in range(40):
        graph.replay()
    assert torch.equal(ema.full_state_dict()["weight"], torch.full((300, 300), 3.0))


def test_update_needs_no_device_memory_of_the_models_size() -> None:
    """An fp32 copy of bf16 weights, or a mask of them, is memory that a full GPU does not have."""
    model = nn.Linear(16384, 16384, bias=False, device="cuda", dtype=torch.bfloat16)  # 512 MiB
    ema = ShardedEMA(model, decay=0.9)
    ema.update()
    ema.update()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    ema.update()
    assert torch.cuda.max_memory_allocated() - before <= 128 << 20


@pytest.mark.usefixtures("nccl")
@pytest.mark.parametrize("kind", ["plain", "ddp", "fsdp1", "fsdp2", "hsdp", "tp"])
def test_evaluation_export_and_checkpoint_through_nccl(kind: str, tmp_path: Path) -> None:
    """NCCL sends no CPU tensor, and every gathering call has to know that."""
    model = _wrap(kind)
    ema = ShardedEMA(model, decay=0.5)
    for _ in range(3):
        _train(model)
        ema.update()
    model.eval()
    tokens = batch(0).cuda()
    with torch.no_grad():
        live = model(tokens)
        with ema.average_parameters():
            averaged = model(tokens)
        assert torch.equal(model(tokens), live)
    state = ema.full_state_dict()
    assert all(value.device.type == "cpu" for value in state.values())
    plain = build(scalar=False)
    plain.load_state_dict(state)
    plain.cuda().eval()
    torch.testing.assert_close(plain(tokens), averaged, rtol=1e-4, atol=1e-4)
    ema.export(tmp_path / "export", gather=True)
    exported = load_file(tmp_path / "export" / "model.safetensors")
    assert all(torch.equal(exported[name], value) for name, value in state.items())
    before = ema.fingerprint()
    ema.save(tmp_path / "checkpoint", block=False)
    _train(model)
    ema.update()
    assert ema.fingerprint() != before
    ema.load(tmp_path / "checkpoint")
    assert ema.fingerprint() == before
    ema.close()


def _of_two(rank: int, port: int, folder: str) -> None:
    """One of two processes on one GPU, whose tensors gloo sends through the host: NCCL refuses two on one."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE="2")
    dist.init_process_group("gloo")
    model = fully_shard(build(scalar=False).cuda(), mesh=init_device_mesh("cuda", (2,)))
    ema = ShardedEMA(model, decay=0.5)
    ema.update()
    _train(model)
    ema.update()
    plain = {
        name: value.double() + 0.5 for name, value in build(scalar=False).named_parameters() if value.requires_grad
    }
    full = ema.full_state_dict()
    if rank == 0:
        for name, value in plain.items():
            torch.testing.assert_close(full[name].double(), value, rtol=0, atol=1e-6)
    digest = ema.fingerprint()
    ema.save(Path(folder) / "checkpoint")
    ema.reset()
    ema.load(Path(folder) / "checkpoint")
    assert ema.fingerprint() == digest
    with ema.average_parameters():
        model(batch(0).cuda())
    dist.destroy_process_group()


def test_two_processes_on_one_gpu(tmp_path: Path) -> None:
    """Shards that differ, which one process does not have."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(_of_two, (port, str(tmp_path)), nprocs=2)
