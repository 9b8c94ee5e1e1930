"""What is added to a model after its average was made is in no average: it is noticed, and nothing else is."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from pathlib import Path

from support.models import CASES, Uneven, batch, build
from support.zero_models import make_engine

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.nn.utils import parametrize
from transformers import LlamaConfig, LlamaForCausalLM

from dist_ema import ShardedEMA
from dist_ema.errors import EMAEngineError, EMAStateError

DECAY = 0.5


class _Adapted(nn.Module):
    """A layer with low-rank adapters by name, as PEFT's: a second one comes while the first is trained."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base
        self.down = nn.ModuleDict()

    def add_adapter(self, name: str) -> None:
        self.down[name] = nn.Linear(self.base_layer.in_features, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x)


def _unwrapped(model: nn.Module) -> nn.Module:
    """The plain model inside of its wrappers."""
    return next(module for module in model.modules() if isinstance(module, Uneven))


def _add_module(model: nn.Module) -> None:
    model.extra = nn.Linear(2, 2)


def _add_frozen_module(model: nn.Module) -> None:
    model.extra = nn.Linear(2, 2).requires_grad_(False)


def _add_parameter(model: nn.Module) -> None:
    model.module.extra = nn.Parameter(torch.ones(2))  # into a list that had none


def _fill_in_parameter(model: nn.Module) -> None:
    model.one.bias = nn.Parameter(torch.zeros(1))  # was None


def _add_buffer(model: nn.Module) -> None:
    model.one.register_buffer("extra", torch.ones(2))


def _fill_in_buffer(model: nn.Module) -> None:
    model.late = torch.ones(2)  # was None


def _untie(model: nn.Module) -> None:
    model.head.weight = nn.Parameter(model.embed.weight.detach().clone())


def _tie(model: nn.Module) -> None:
    model.lone.bias = model.norm.bias


def _replace_module(model: nn.Module) -> None:
    model.frozen = nn.Linear(15, 15).requires_grad_(False)


def _adapt(model: nn.Module) -> None:
    model.lone = _Adapted(model.lone)
    model.lone.add_adapter("default")


def _second_adapter(model: nn.Module) -> None:
    model.adapted.add_adapter("second")


def _parametrize(model: nn.Module) -> None:
    parametrize.register_parametrization(model.lone, "weight", nn.Identity())


def _rename(model: nn.Module) -> None:
    model.later = model.lone
    del model.lone


CHANGES: list[tuple[Callable[[nn.Module], None], str]] = [
    (_add_module, r"'extra.bias', 'extra.weight' were added"),
    (_add_frozen_module, r"'extra.bias', 'extra.weight' were added"),
    (_add_parameter, r"'module.extra' was added"),
    (_fill_in_parameter, r"'one.bias' was added"),
    (_add_buffer, r"'one.extra' was added"),
    (_fill_in_buffer, r"'late' was added"),
    (_untie, r"weight tying of 'embed.weight', 'head.weight' changed"),
    (_tie, r"('lone.bias'.*replaced|weight tying of .*'lone.bias')"),
    (_replace_module, r"'frozen.(weight|bias)' was replaced after"),
    (_adapt, r"'lone.base_layer.bias'.* were added; 'lone.bias', 'lone.weight' were removed"),
    (_second_adapter, r"'adapted.down.second.weight' was added"),
    (
        _parametrize,
        r"'lone.parametrizations.weight.original' was added; 'lone.weight' was removed|'lone.weight' was replaced",
    ),
    (_rename, r"'later.bias', 'later.weight' were added; 'lone.bias', 'lone.weight' were removed"),
]


def _model(scalar: bool = True, hidden: int = 7) -> nn.Module:
    model = build(scalar=scalar, frozen=False, hidden=hidden)
    model.register_buffer("late", None)
    model.lone = nn.Linear(15, 15)
    model.adapted = _Adapted(nn.Linear(15, 15))
    model.adapted.add_adapter("default")
    return model


@pytest.mark.parametrize(("change", "message"), CHANGES)
@pytest.mark.parametrize("started", [False, True])
def test_what_is_added_is_noticed_by_every_call_and_reset_takes_it_up(
    change: Callable[[nn.Module], None], message: str, started: bool, tmp_path: Path
) -> None:
    """A second adapter was trained for a whole run, and its average was not in the export."""
    model = _model()
    ema = ShardedEMA(model, decay=DECAY)
    ema.metrics()
    if started:
        ema.update()
    change(model)
    for call in (
        ema.update,
        ema.update,
        ema.full_state_dict,
        ema.metrics,
        lambda: ema.save(tmp_path / "saved"),
        lambda: ema.export(tmp_path / "export"),
        lambda: ema.average_parameters().__enter__(),
    ):
        with pytest.raises(EMAStateError, match=message) as caught:
            call()
        assert "Call reset()" in str(caught.value)
    assert not list(tmp_path.iterdir()) and ema.num_updates == int(started)
    ema.reset()
    assert ema.update() and ema.update()
    state, expected = ema.full_state_dict(), model.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], value) for name, value in expected.items())


def test_what_is_taken_away_again_is_no_reason_to_stop() -> None:
    """A metric's network that an evaluation brings along: the average goes on once it is gone."""
    model = _model()
    ema = ShardedEMA(model, decay=DECAY)
    ema.update()
    _add_frozen_module(model)
    with pytest.raises(EMAStateError, match=r"were added"):
        ema.update()
    del model.extra
    assert ema.update() and ema.num_updates == 2


WRAPPED = ["ddp-compiled", "fsdp1-full", "fsdp1-grad-op-orig", "fsdp1-full-orig-compiled", "fsdp1-full-checkpointed"]
WRAPPED += ["fsdp2-compiled", "fsdp2-keep", "tp"]


@pytest.mark.world_size(2)
@pytest.mark.parametrize("case", [*WRAPPED, "zero0", "zero2", "zero3"])
def test_what_is_added_is_noticed_under_every_engine(case: str, rank: int) -> None:
    """Also after evaluation and training, which move FSDP1's and DeepSpeed's parameters in and out of modules."""
    if case.startswith("zero"):
        target = run = make_engine(int(case[-1]))
        model = target.module
    else:
        target = run = CASES[case].model()
        model = _unwrapped(target)
        optimizer = torch.optim.SGD(target.parameters(), 0.1)
    ema = ShardedEMA(target, decay=DECAY)
    looked = _count_closer_looks(ema)
    for step in range(3):
        loss = run(batch(step)).float().square().mean()
        if case.startswith("zero"):
            run.backward(loss)
            run.step()
        else:
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        if step == 1:
            run.eval()
            with torch.no_grad():
                run(batch(step))
            run.train()
        assert ema.update()
    assert len(looked) <= 1, f"the model was walked anew at {len(looked)} of 3 updates"
    with ema.average_parameters():
        pass
    ema._average.engine.stepped = lambda: True  # type: ignore[method-assign]
    model.extra = nn.Linear(2, 2)
    with pytest.raises(EMAStateError, match=r"'extra.bias', 'extra.weight' were added"):
        ema.update()
    del model.extra
    assert ema.update()
    model.one.register_buffer("extra", torch.ones(2))
    with pytest.raises(EMAStateError, match=r"'one.extra' was added"):
        ema.full_state_dict()
    del model.one.extra
    assert ema.update()
    model.one.register_buffer("passing", torch.ones(2), persistent=False)
    model.one.activation = nn.Tanh()
    assert ema.update() and ema.update()
    if not isinstance(target, FSDP):
        model.frozen = nn.Linear(model.frozen.in_features, model.frozen.out_features).requires_grad_(False)
        with pytest.raises(EMAStateError, match=r"frozen|has .* now"):
            ema.update()


def _count_closer_looks(ema: ShardedEMA) -> list[None]:
    binding, looks = ema._average.engine._binding, []  # type: ignore[attr-defined]
    closer = binding._find_slots_again

    def count() -> None:
        looks.append(None)
        closer()

    binding._find_slots_again = count
    return looks


def _add_activation(model: nn.Module) -> None:
    model.module.append(nn.Dropout(0.0))


def _fill_cache(model: nn.Module) -> None:
    model.cache = torch.ones(9)
    model.one.register_buffer("mask", torch.ones(2), persistent=False)


def _empty_cache(model: nn.Module) -> None:
    model.cache = None


def _compile(model: nn.Module) -> None:
    model.module[0] = torch.compile(model.module[0], backend="eager")
    model.compile(backend="eager")


def _replace_buffers(model: nn.Module) -> None:
    model.steps = model.steps + 1
    model.norm.running_mean = model.norm.running_mean.clone()


def _set_aside(model: nn.Module) -> None:
    """The order in the module's dict is another."""
    weight = model.lone.weight
    del model.lone.weight
    model.lone.weight = weight


def _hang_elsewhere(model: nn.Module) -> None:
    """Another module with the same parameter under the same name."""
    lone = nn.Linear(15, 15)
    lone.weight, lone.bias = model.lone.weight, model.lone.bias
    model.lone = lone


def _move_tensors(model: nn.Module) -> None:
    model.view = model.embed.weight[:2]
    model.double().float()


HARMLESS = [_add_activation, _fill_cache, _empty_cache, _compile, _replace_buffers, _set_aside, _hang_elsewhere]
HARMLESS += [_move_tensors]


@pytest.mark.parametrize("change", HARMLESS)
@pytest.mark.parametrize("started", [False, True])
def test_what_leaves_the_tensors_as_they_are_is_no_reason_to_stop(
    change: Callable[[nn.Module], None], started: bool
) -> None:
    model = _model()
    ema = ShardedEMA(model, decay=DECAY)
    if started:
        ema.update()
    change(model)
    with torch.no_grad():
        model.lone.weight.fill_(2)
    ema.reset() if not started else None
    assert ema.update() and ema.update()
    state = ema.full_state_dict()
    expected = build(frozen=False).state_dict()
    assert torch.equal(state["module.0.up.weight"], expected["module.0.up.weight"])
    assert state["lone.weight"].min() > 1.2 if started else (state["lone.weight"] == 2).all()


def test_a_meta_model_that_is_materialized_is_bound_and_then_watched() -> None:
    """``to_empty()`` puts other parameters everywhere, and unties them: tied anew they are the model that was named."""
    with torch.device("meta"):
        model = build()
    ema = ShardedEMA(model, decay=DECAY)
    model.to_empty(device="cpu")
    with pytest.raises(EMAStateError, match=r"weight tying of 'embed.weight', 'head.weight' changed"):
        ema.update()
    model.head.weight = model.embed.weight
    model.load_state_dict(build().state_dict())
    assert ema.update()
    with pytest.raises(EMAStateError, match=r"'extra.bias', 'extra.weight' were added"):
        _add_module(model) or ema.update()


def test_a_scripted_part_is_refused_by_name() -> None:
    """Its parameters are not where modules keep theirs; a TypeError from inside of torch said nothing of that."""
    model = _model()
    model.scripted = torch.jit.script(nn.Tanh())
    with pytest.raises(EMAEngineError, match="scripted is a scripted module"):
        ShardedEMA(model, decay=DECAY)


def test_a_transformers_model_is_watched_through_training_and_generation() -> None:
    """Rotary caches, key-value caches, gradient checkpointing and tied embeddings change nothing that is averaged."""
    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=32,
        max_position_embeddings=16,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    ema = ShardedEMA(model, decay=DECAY)
    looked = _count_closer_looks(ema)
    model.activation_checkpointing_enable()
    tokens = torch.randint(0, 32, (2, 12))
    for _ in range(2):
        model(input_ids=tokens, labels=tokens).loss.backward()
        assert ema.update()
        model.eval().generate(tokens[:1, :4], max_new_tokens=6, do_sample=False, pad_token_id=0)
        model.train()
    assert ema.update() and not looked
    model.resize_token_embeddings(40)
    with pytest.raises(EMAStateError, match="embed_tokens"):
        ema.update()


def test_a_thousand_tensors_are_watched_in_milliseconds() -> None:
    """Of the calling thread, at every update: in the time that the update itself may take in Python."""
    model = nn.Sequential(*(nn.Sequential(nn.Linear(1, 1), nn.Tanh()) for _ in range(500)))
    engine = ShardedEMA(model, decay=DECAY)._average.engine
    engine.sources()
    gc.collect()
    times = []
    for _ in range(100):
        start = time.thread_time()
        engine.sources()
        times.append(time.thread_time() - start)
    assert min(times) < 5e-3  # 0.4 ms on a quiet machine
