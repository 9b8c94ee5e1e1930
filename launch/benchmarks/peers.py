"""How others average, on the tensors that ``launch/benchmark.py update`` averages.

Where a package can be imported it is called, and its row has its version; "the form of" is its arithmetic written out.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor, Shard
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

DECAY = 0.9999
WEIGHT = 1 - DECAY


class Model(nn.Module):
    """Nothing but parameters: ``tensors`` flat ones of very different sizes, ``elements`` in all."""

    def __init__(self, elements: int, tensors: int, dtype: torch.dtype, device: str) -> None:
        super().__init__()
        draw = random.Random(0)
        shares = [draw.lognormvariate(0, 1.5) for _ in range(tensors)]
        sizes = [max(1, int(share / sum(shares) * elements)) for share in shares]
        torch.manual_seed(0)
        self.tensors = nn.ParameterList(torch.randn(size, device=device).to(dtype) for size in sizes)


@dataclass
class Contender:
    """One way to average.

    Attributes:
        update: averages the weights of ``live`` once.
        shadows: the averages, in the order of the model's parameters.
        live: the model that it averages, where that cannot be the common one.
    """

    update: Callable[[], object]
    shadows: Callable[[], Sequence[Tensor]]
    live: nn.Module | None = None


Builder = Callable[[Model], Contender]


@dataclass
class FullTensor:
    """A row of the table to be. Each ``builder`` makes the first copy, so that every update averages.

    Attributes:
        builder: makes the contender.
        shadow: dtype of its average.
        averages: how many it keeps.
    """

    builder: Builder
    shadow: torch.dtype = torch.float32
    averages: int = 1


def weights(model: Model) -> list[Tensor]:
    return [parameter.detach() for parameter in model.tensors]


def parameters(model: nn.Module) -> list[Tensor]:
    return [parameter.detach() for parameter in model.parameters()]


def package(module: str, name: str) -> Any:
    """A class of an optional package, or None where it cannot be imported."""
    with contextlib.suppress(Exception):  # whatever an optional package's import may raise
        return getattr(importlib.import_module(module), name)
    return None


def composer(model: Model) -> Contender:
    """Composer's compute_ema under FSDP: every update gathers the model and visits a full copy.

    Written out: mosaicml asks for a torch older than the one that is measured.
    """
    average = copy.deepcopy(model).float()
    live = FullyShardedDataParallel(
        copy.deepcopy(model), use_orig_params=True, device_id=torch.device(weights(model)[0].device)
    )

    @torch.no_grad()
    def form() -> None:
        for shadow, parameter in zip(average.parameters(), live.parameters(), strict=True):
            shadow.copy_(shadow * DECAY + (1.0 - DECAY) * parameter.detach())

    def update() -> None:
        with FullyShardedDataParallel.summon_full_params(live):
            form()

    return Contender(update, lambda: parameters(average), live)


def averaged_model(model: Model) -> Contender:
    """torch's own class. It copies the model, dtype and all."""
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(DECAY))  # type: ignore[no-untyped-call]
    average.update_parameters(model)
    return Contender(lambda: average.update_parameters(model), lambda: parameters(average.module))


def diffusers(model: Model) -> Contender:
    """diffusers' EMAModel with fp32 shadows, as its training scripts use it (no foreach)."""
    cls = package("diffusers.training_utils", "EMAModel")
    if cls is not None:
        average = cls(model.parameters(), decay=DECAY, min_decay=DECAY)  # min_decay: no warm-up
        average.to(dtype=torch.float32)
        average.step(model.parameters())  # its first step copies
        return Contender(lambda: average.step(model.parameters()), lambda: average.shadow_params)
    shadows = [source.float().clone() for source in weights(model)]

    @torch.no_grad()
    def step() -> None:
        for shadow, parameter in zip(shadows, model.tensors, strict=True):
            shadow.sub_(WEIGHT * (shadow - parameter))

    return Contender(step, lambda: shadows)


def ema_pytorch(model: Model) -> Contender:
    """ema-pytorch's EMA around an fp32 copy, averaging at every step: tensor by tensor, as by default."""
    average = copy.deepcopy(model).float()
    cls = package("ema_pytorch", "EMA")
    if cls is not None:
        options = {"update_every": 1, "update_after_step": 0, "min_value": DECAY}  # min_value: no warm-up
        ema = cls(model, average, beta=DECAY, coerce_dtype=True, include_online_model=False, **options)
        ema.update()  # its first update copies
        return Contender(ema.update, lambda: parameters(average))

    @torch.no_grad()
    def update() -> None:
        for shadow, parameter in zip(average.parameters(), model.parameters(), strict=True):
            shadow.lerp_(parameter.to(shadow.dtype), WEIGHT)

    return Contender(update, lambda: parameters(average))


def timm(model: Model) -> Contender:
    """timm's ModelEmaV3 with an fp32 shadow: a foreach lerp, or where dtypes differ one to multiply and one to add."""
    cls = package("timm.utils", "ModelEmaV3")
    if cls is not None:
        ema = cls(model, decay=DECAY, dtype=torch.float32)
        return Contender(lambda: ema.update(model), lambda: parameters(ema.module))
    shadows = [source.float().clone() for source in weights(model)]

    @torch.no_grad()
    def update() -> None:
        live = list(model.state_dict().values())
        if live[0].dtype == torch.float32:
            torch._foreach_lerp_(shadows, live, WEIGHT)
        else:
            torch._foreach_mul_(shadows, DECAY)
            torch._foreach_add_(shadows, live, alpha=WEIGHT)

    return Contender(update, lambda: shadows)


def nemo(model: Model) -> Contender:
    """NeMo's ema_update, and DINOv3's: multiply, then add, in the model's dtype. Two passes, each rounded."""
    shadows = [source.clone() for source in weights(model)]

    @torch.no_grad()
    def update() -> None:
        torch._foreach_mul_(shadows, DECAY)
        torch._foreach_add_(shadows, weights(model), alpha=1.0 - DECAY)

    return Contender(update, lambda: shadows)


def deepspeed_chat(model: Model) -> Contender:
    """DeepSpeed-Chat's moving_average: out of place and copied, in the model's dtype, tensor by tensor."""
    average = copy.deepcopy(model)

    @torch.no_grad()
    def update() -> None:
        for parameter, shadow in zip(model.parameters(), average.parameters(), strict=True):
            shadow.data.copy_(torch.lerp(parameter.data, shadow.data, DECAY))

    return Contender(update, lambda: weights(average))


def torchtitan(model: Model) -> Contender:
    """torchtitan's: one foreach over DTensors, in the model's dtype."""
    mesh = init_device_mesh(weights(model)[0].device.type, (1,))

    def shard(local: Tensor) -> Tensor:
        return DTensor.from_local(local, mesh, [Shard(0)], run_check=False)

    averages = [source.clone() for source in weights(model)]
    live, shadows = [[shard(local) for local in side] for side in (weights(model), averages)]
    return Contender(lambda: torch._foreach_lerp_(shadows, live, WEIGHT), lambda: list(averages))


def peers(dtype: torch.dtype) -> dict[str, FullTensor]:
    """Label and contender of each, in the table's order, for weights of this dtype."""
    own = "" if dtype == torch.float32 else " (bf16 shadow)"

    def real(name: str, distribution: str, module: str) -> str:
        if package(module, name) is None:
            return f"the form of {distribution} {name}"
        return f"{distribution} {metadata.version(distribution)} {name}"

    return {
        f"the form of torchtitan, DTensors{own}": FullTensor(torchtitan, dtype),
        f"torch AveragedModel{own}": FullTensor(averaged_model, dtype),
        real("ModelEmaV3", "timm", "timm.utils"): FullTensor(timm),
        f"the form of NeMo and DINOv3, mul and add{own}": FullTensor(nemo, dtype),
        real("EMA", "ema-pytorch", "ema_pytorch"): FullTensor(ema_pytorch),
        real("EMAModel", "diffusers", "diffusers.training_utils"): FullTensor(diffusers),
        f"the form of DeepSpeed-Chat{own}": FullTensor(deepspeed_chat, dtype),
        "the form of Composer compute_ema, FSDP": FullTensor(composer),
    }
