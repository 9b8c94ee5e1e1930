"""Whatever is written into weights inside ``average_parameters()`` ends up in the average, which nothing would show.

Optimizers that move the weights for an evaluation do that, layers that normalise their weights in forward, and
training steps by mistake. An evaluation itself writes nothing, under any wrapper, and must not be taken for that.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from support.models import CASES, batch
from support.zero_models import batch as zero_batch
from support.zero_models import make_engine, reset_deepspeed, train

import pytest
import torch
from torch import Tensor, nn

from dist_ema import ShardedEMA, update_bn
from dist_ema.errors import EMAError, EMAStateError

TWO = [name for name, case in CASES.items() if 2 in case.group_sizes]


@contextmanager
def warnings() -> Iterator[list[str]]:
    """What the library logs in the block, as warnings or worse."""
    said: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("dist_ema").addHandler(handler)
    try:
        yield said
    finally:
        logging.getLogger("dist_ema").removeHandler(handler)


def evaluate(model: Callable[[Tensor], Tensor]) -> None:
    """As evaluations do it: without gradients, in inference mode, and in lower precision."""
    with torch.no_grad():
        model(batch(0))
    with torch.inference_mode():
        model(batch(1))
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        model(batch(2))


def fit(model: Any, ema: ShardedEMA, steps: int) -> None:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for step in range(steps):
        model(batch(step)).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        ema.update()


@pytest.mark.world_size(2)
@pytest.mark.parametrize("case", TWO)
def test_evaluation_is_no_write(case: str) -> None:
    reset_deepspeed()  # an earlier test may have left ZeRO-3's own linear() in torch
    model = CASES[case].model()
    ema = ShardedEMA(model, decay=0.5)
    fit(model, ema, 2)
    with warnings() as said:
        with ema.average_parameters():
            model.eval()
            evaluate(model)
        with ema.average_parameters():
            evaluate(model)
    assert not [text for text in said if "written" in text]
    ema.full_state_dict()
    ema.close()


@pytest.mark.world_size(2)
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_evaluation_under_zero_is_no_write(stage: int, dtype: str, rank: int) -> None:
    engine = make_engine(stage, dtype)
    ema = ShardedEMA(engine, decay=0.5)
    ema.attach(engine)
    train(engine, range(2))
    engine.eval()
    with warnings() as said, ema.average_parameters(), torch.no_grad():
        engine(zero_batch(0, rank))
        engine(zero_batch(1, rank))
    assert not [text for text in said if "written" in text]
    ema.full_state_dict()
    ema.close()


def write_some(ema: ShardedEMA, model: Any) -> None:
    """As an optimizer does that moves weights in place: here one with a step of its own."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.mul_(2)


def check_written(ema: ShardedEMA, model: Any, write: Callable[[], None], folder: Path) -> None:
    """The block raises, the live weights are back, and nobody reads the average until it is begun anew."""
    live = [source.clone() for source in ema._average.engine.sources()]
    with (
        pytest.raises(EMAStateError, match="written inside average_parameters") as raised,
        ema.average_parameters(),
    ):
        write()
    assert "This has changed the average" in str(raised.value)
    ema._average.engine.reshard()
    for before, after in zip(live, ema._average.engine.sources(), strict=True):
        assert torch.equal(before, after)
    calls: list[Callable[[], object]] = [
        lambda: ema.save(folder / "save"),
        lambda: ema.export(folder / "export"),
        ema.full_state_dict,
        ema.state_dict,
        ema.metrics,
        ema.fingerprint,
        lambda: list(ema.iter_full_tensors()),
        ema.copy_to,
    ]
    for call in calls:
        with pytest.raises(EMAStateError, match="reset"):
            call()
    assert not list(folder.iterdir())
    ema.reset()
    ema.update(due=True)
    ema.save(folder / "save")
    ema.close()


@pytest.mark.world_size(2)
@pytest.mark.parametrize("case", [case for case in TWO if "compiled" not in case])
def test_a_write_inside_is_an_error_and_spoils_only_the_average(case: str, tmp_path: Path) -> None:
    model = CASES[case].model()
    ema = ShardedEMA(model, decay=0.5)
    fit(model, ema, 2)
    check_written(ema, model, lambda: write_some(ema, model), tmp_path)


@pytest.mark.world_size(2)
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_an_optimizers_write_under_zero_is_an_error(stage: int, dtype: str, tmp_path: Path) -> None:
    engine = make_engine(stage, dtype)
    ema = ShardedEMA(engine, decay=0.5)
    ema.attach(engine)
    train(engine, range(2))
    groups = engine.optimizer.param_groups

    def write() -> None:
        with torch.no_grad():
            for parameter in (parameter for group in groups for parameter in group["params"]):
                parameter.mul_(2)

    if stage == 3:  # its groups hold the masters only while it steps
        groups = [{"params": list(engine.optimizer.fp32_partitioned_groups_flat)}]
    engine.optimizer  # noqa: B018
    check_written(ema, engine, write, tmp_path)


def one(model: nn.Module | None = None, **options: Any) -> tuple[nn.Module, ShardedEMA]:
    """A small model of one process, whose average is halfway to weights that have changed."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4)) if model is None else model
    ema = ShardedEMA(model, decay=0.5, **options)
    ema.update()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    ema.update()
    return model, ema


def test_what_the_body_raises_is_not_replaced() -> None:
    """Else a failed evaluation would be reported as something else. The average has changed all the same."""
    model, ema = one()
    live = [parameter.detach().clone() for parameter in model.parameters()]
    with warnings() as said, pytest.raises(KeyError, match="mine"), ema.average_parameters():
        write_some(ema, model)
        raise KeyError("mine")
    assert all(torch.equal(a, b) for a, b in zip(live, model.parameters(), strict=True))
    assert [text for text in said if "written inside" in text]
    with pytest.raises(EMAStateError, match="reset"):
        ema.full_state_dict()


def test_a_save_inside_does_not_write_what_was_written_inside(tmp_path: Path) -> None:
    """A trainer may save before the block ends, when nothing has been compared yet."""
    model, ema = one()
    with pytest.raises(EMAStateError), ema.average_parameters():
        write_some(ema, model)
        with pytest.raises(EMAStateError, match="written inside"):
            ema.save(tmp_path / "save")
    assert not list(tmp_path.iterdir())


def test_training_goes_on_after_a_write_and_load_mends_the_average(tmp_path: Path) -> None:
    """``update()`` is local: on one rank alone it must not raise, or the others wait for it in their next step."""
    model, ema = one()
    ema.save(tmp_path / "save")
    expected = ema.fingerprint()
    with pytest.raises(EMAStateError), ema.average_parameters():
        write_some(ema, model)
    assert ema.update()
    ema.load(tmp_path / "save")
    assert ema.fingerprint() == expected


def test_a_write_to_live_elements_kept_beside_leaves_the_average_whole() -> None:
    """With a shadow of another dtype the live weights are kept beside, so what is written is gone with the block."""
    model, ema = one(dtype=torch.float64)
    expected = ema.fingerprint(include_untracked=False)
    with pytest.raises(EMAStateError, match="average has not changed"), ema.average_parameters():
        write_some(ema, model)
    assert ema.fingerprint(include_untracked=False) == expected


@pytest.mark.world_size(2)
@pytest.mark.parametrize("case", ["ddp", "fsdp2"])
def test_a_write_on_one_rank_reaches_the_others_at_their_next_call(case: str, rank: int, tmp_path: Path) -> None:
    """Only one rank knows of it. The others would go on, and wait for a rank that refuses to save."""
    model = CASES[case].model()
    ema = ShardedEMA(model, decay=0.5)
    fit(model, ema, 2)
    try:
        with ema.average_parameters():
            if rank == 1:
                write_some(ema, model)
    except EMAStateError:
        assert rank == 1
    else:
        assert rank == 0
    with pytest.raises(EMAError, match=r"rank 1|written inside"):
        ema.save(tmp_path / "save")
    ema.close()


def test_forgotten_eval_mode_is_logged_and_no_error() -> None:
    """BatchNorm in training mode writes its statistics into the average's. torch counts only its number of batches."""
    model, ema = one()
    model.train()
    with warnings() as said, ema.average_parameters(), torch.no_grad():
        model(torch.randn(8, 6))
    assert [text for text in said if "model.eval() forgotten" in text and "1.num_batches_tracked" in text]
    ema.full_state_dict()


@pytest.mark.world_size(2)
def test_forgotten_eval_mode_under_ddp_is_logged() -> None:
    """DDP writes buffers at each forward pass too, with rank 0's values, which is nothing to talk about."""
    model = CASES["ddp"].model()
    ema = ShardedEMA(model, decay=0.5)
    fit(model, ema, 2)
    with warnings() as said, ema.average_parameters(), torch.no_grad():
        model(batch(0))
    assert [text for text in said if "model.eval() forgotten" in text]
    ema.close()


def test_update_bn_is_no_foreign_write() -> None:
    _, ema = one()
    with warnings() as said:
        update_bn(ema, [torch.randn(8, 6) for _ in range(3)])
    assert not said
    with warnings() as said, pytest.raises(ZeroDivisionError):
        update_bn(ema, [torch.randn(8, 6), 1 // 0])
    assert not said
    ema.full_state_dict()


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_an_embedding_with_a_largest_norm_does_not_change_the_average(kind: type[nn.Module]) -> None:
    """It writes in every forward pass, and a row of the average may be longer than its limit."""
    model, ema = one(kind(5, 3, max_norm=0.1))
    expected, live = ema.fingerprint(), model.weight.detach().clone()
    with ema.average_parameters(), torch.no_grad():
        model(torch.arange(5).view(1, 5))
        assert model.weight.norm(dim=1).max() < 0.1001
    assert ema.fingerprint() == expected
    assert torch.equal(model.weight, live)


class Normalised(nn.Linear):
    """Writes its weights in forward, in one of several ways."""

    def __init__(self, how: str) -> None:
        super().__init__(6, 4)
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            unit = self.weight / self.weight.norm()
            if self.how == "copy":
                self.weight.copy_(unit)
            elif self.how == "out":
                torch.mul(self.weight, 1 / self.weight.norm(), out=self.weight)
            elif self.how == "foreach":
                torch._foreach_mul_([self.weight], 0.5)
            elif self.how == "view":
                self.weight.view(-1)[:2].zero_()
            elif self.how == "detach":
                self.weight.detach().clamp_(-0.1, 0.1)
            else:
                self.weight[0] = 0
        return super().forward(x)


@pytest.mark.parametrize("how", ["copy", "out", "foreach", "view", "detach", "item"])
@pytest.mark.parametrize("inference", [False, True])
def test_a_layer_that_writes_its_weights_in_forward_is_an_error(how: str, inference: bool) -> None:
    model, ema = one(Normalised(how))
    live = model.weight.detach().clone()
    refused = pytest.raises(EMAStateError, match="'weight'")
    with refused, ema.average_parameters(), torch.inference_mode(inference), torch.no_grad():
        model(torch.ones(2, 6))
    assert torch.equal(model.weight, live)


def test_spectral_norm_in_eval_mode_is_no_write_and_in_training_mode_a_buffers() -> None:
    model, ema = one(nn.utils.parametrizations.spectral_norm(nn.Linear(6, 4)))
    model.eval()
    with warnings() as said, ema.average_parameters(), torch.no_grad():
        model(torch.ones(2, 6))
    assert not said
    model.train()
    with warnings() as said, ema.average_parameters(), torch.no_grad():
        model(torch.ones(2, 6))
    assert [text for text in said if "buffer" in text]


def test_weights_made_in_inference_mode_have_no_counter() -> None:
    with torch.inference_mode():
        model = nn.Linear(3, 3)
    ema = ShardedEMA(nn.Sequential(model, nn.Linear(3, 3)), decay=0.5)
    with torch.inference_mode():
        ema.update()
        with ema.average_parameters():
            model(torch.ones(1, 3))
