"""The order of our threads' work against training, on a fake GPU that does everything as late as it may."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock
from unittest.mock import Mock

from support import stream_checks
from support.fake_cuda import FakeCuda

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from dist_ema import ShardedEMA, kernels
from dist_ema.comm import collectives
from dist_ema.errors import EMAConfigError, EMAStateError
from dist_ema.runtime.streams import Handover, OwnStream, Relay
from dist_ema.shadow.beside import Beside


@pytest.fixture
def gpu() -> Iterator[FakeCuda]:
    with FakeCuda() as gpu:
        yield gpu


@pytest.mark.parametrize("check", stream_checks.CHECKS)
def test_in_order(check: str, gpu: FakeCuda, tmp_path: Path) -> None:
    stream_checks.CHECKS[check](gpu, tmp_path)


#: What each check would not notice if the fake were too quick: without the wait, it has to fail.
WAITS: list[tuple[str, type, str, Callable[..., object]]] = [
    ("check_an_offloaded_update_takes_the_weights_of_its_moment", OwnStream, "follow", lambda _: None),
    ("check_an_offloaded_update_takes_the_weights_of_its_moment", OwnStream, "hold_back", lambda _: None),
    ("check_an_update_beside_training_takes_the_weights_of_its_moment", OwnStream, "follow", lambda _: None),
    ("check_an_update_beside_training_takes_the_weights_of_its_moment", OwnStream, "hold_back", lambda _: None),
    ("check_an_update_beside_training_takes_the_weights_of_its_moment", Beside, "join", lambda _: None),
    ("check_an_update_beside_training_takes_the_weights_of_its_moment", Beside, "wait_for_reads", lambda _: None),
    ("check_a_background_save_reads_what_was_queued_before_it", OwnStream, "follow", lambda _: None),
    ("check_a_load_is_not_overwritten_by_what_was_queued_before_it", OwnStream, "follow", lambda _: None),
    ("check_a_load_is_not_overwritten_by_what_was_queued_before_it", Handover, "join", lambda _: None),
    (
        "check_a_load_is_not_overwritten_by_what_was_queued_before_it",
        Relay,
        "buffer",
        lambda relay, numel, dtype: relay._buffers[relay._next][: numel * dtype.itemsize].view(dtype),
    ),
]


@pytest.mark.parametrize(("check", "kind", "wait", "none"), WAITS, ids=lambda value: getattr(value, "__name__", value))
def test_each_wait_is_needed(
    check: str, kind: type, wait: str, none: Callable[..., object], gpu: FakeCuda, tmp_path: Path
) -> None:
    # Either the values are wrong, or the library notices that the order was.
    with mock.patch.object(kind, wait, none), pytest.raises((AssertionError, EMAStateError)):
        stream_checks.CHECKS[check](gpu, tmp_path)


def test_threads_of_ours_use_no_default_stream_and_no_other_device(gpu: FakeCuda, tmp_path: Path) -> None:
    """There they would hold up everyone's kernels, and make a context of half a gigabyte on device 0 in every rank."""
    model = gpu.put(nn.Linear(64, 64))
    ema = ShardedEMA(model, decay=0.5, skip_nonfinite=False)
    ema.update()
    ema.save(tmp_path / "one", block=False)
    ema.wait()
    ema.load(tmp_path / "one")
    offloaded = ShardedEMA(model, decay=0.5, offload="cpu", skip_nonfinite=False)
    offloaded.update()
    offloaded.wait()
    ours = {use[1:] for use in gpu.uses if not use[0]}
    assert ours == {("ours", 1)}
    assert not [use for use in gpu.uses if use[1] == "default"]
    assert torch.equal(ema.full_state_dict()["weight"], offloaded.full_state_dict()["weight"])


@torch.no_grad()
def test_weights_written_beside_an_update_are_an_error_until_the_average_is_made_anew(gpu: FakeCuda) -> None:
    """Some elements would be from before the write and some from after it, and no figure would show it."""
    model = gpu.put(nn.Linear(4, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ema = ShardedEMA(model, decay=0.5)
    handle = ema.attach(optimizer, overlap=True)
    optimizer.step()  # the first copy is made in order
    model.weight.fill_(1.0)
    optimizer.step()
    ema.wait()
    model.weight.fill_(2.0)
    optimizer.step()
    model.bias.fill_(3.0)
    for call in (optimizer.step, ema.update, ema.full_state_dict, ema.wait, handle.remove, ema.update):
        if call == handle.remove:
            call()
        else:
            with pytest.raises(EMAStateError, match=r"'bias' and 0 more parameters were written.*wait\(\)"):
                call()
    ema.reset()
    ema.update()
    ema.update()
    assert torch.equal(ema.full_state_dict()["bias"], torch.full((4,), 3.0))


def test_what_cannot_run_beside_training_is_refused_or_said_once(caplog: pytest.LogCaptureFixture) -> None:
    """A script for GPUs is tried out on the CPU; there are weights that have to be right at once."""
    model, teacher = nn.Linear(2, 2), nn.Linear(2, 2).requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for options, why in (({"into": teacher}, "teacher"), ({"offload": "cpu"}, "anyway")):
        with pytest.raises(EMAConfigError, match=f"overlap=True.*{why}"):
            ShardedEMA(model, decay=0.5, **options).attach(optimizer, overlap=True)
    ema = ShardedEMA(model, decay=0.5)
    with pytest.raises(EMAConfigError, match=r"overlap=True.*call="):
        ema.attach(optimizer, overlap=True, call=ema.update)
    ema.attach(optimizer, overlap=True)
    for _ in range(4):
        optimizer.step()
        with torch.no_grad():
            model.weight.add_(1.0)  # nothing reads it any more
    assert ema.num_updates == 4
    assert caplog.text.count("changes nothing: the weights are on cpu") == 1


@pytest.mark.parametrize(
    ("backends", "device"),
    [
        ("cpu:gloo,cuda:gloo", "cpu"),
        ("cpu:gloo", "cpu"),
        ("cuda:nccl", "cuda:3"),
        ("cpu:gloo,cuda:nccl", "cuda:3"),
        ("xpu:xccl", "xpu:3"),
        ("cpu:mpi,cuda:mpi", "cpu"),
    ],
)
def test_a_group_is_sent_tensors_of_its_own_device(backends: str, device: str) -> None:
    """XCCL takes no tensor of the CPU, no more than NCCL does."""
    module = Mock(current_device=lambda: 3)
    with (
        mock.patch.object(collectives, "_backends", lambda _: backends),
        mock.patch.object(torch, "get_device_module", lambda _: module),
    ):
        assert str(collectives.device_for(Mock(bound_device_id=None))) == device
        kind = device.partition(":")[0]
        bound = Mock(bound_device_id=torch.device(kind, 1))
        assert str(collectives.device_for(bound)) == ("cpu" if kind == "cpu" else f"{kind}:1")


def test_a_device_without_float64_is_measured_on_the_host() -> None:
    """MPS has none, and metrics() ended in an error there."""
    with (
        mock.patch.object(kernels.elements, "_WITHOUT_FLOAT64", {"meta"}),
        pytest.raises(NotImplementedError, match="meta"),
    ):
        kernels.squared_distance(torch.zeros(3), torch.zeros(3, device="meta"), 0, 3)  # asked for its values
    assert float(kernels.squared_distance(torch.zeros(3), torch.full((3,), 2.0), 0, 3)) == 12


@pytest.mark.world_size(2)
def test_the_next_forward_waits_for_what_was_written_after_the_event_of_the_step(rank: int) -> None:
    """With FSDP2's set_post_optim_event() it waits for that event alone, and would gather what is half written."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    for module in (*model, model):
        fully_shard(module, mesh=init_device_mesh("cpu", (2,)))
    ema = ShardedEMA(model, decay=0.5)
    ema.update()
    context = model._get_fsdp_state()._state_ctx

    def forward() -> None:
        assert context.post_optim_event is None
        model(torch.ones(2, 4))

    model.set_post_optim_event(Mock(name="recorded by the last step"))
    with ema.average_parameters():
        forward()
        model.set_post_optim_event(Mock(name="and again"))
    forward()
    model.set_post_optim_event(Mock(name="and once more"))
    ema.copy_to()
    forward()
