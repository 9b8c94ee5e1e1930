"""``evaluate="both"``, ``should_update=`` and ``average_at_end=`` where the model is sharded over two processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers", reason="is in the extra 'test'")

from test_both import average, check, same, some_steps
from test_transformers import EVAL, full_weights, make, strategy
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback

from dist_ema.integrations.transformers import EMACallback

CONFIG = {"vocab_size": 37, "hidden_size": 16, "intermediate_size": 22, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 16}


class Steps(TrainerCallback):
    """The full weights after each step."""

    def __init__(self) -> None:
        self.trainer: Any = None
        self.found: list[dict[str, Tensor]] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.found.append(full_weights(self.trainer))


def fit(folder: Path, arguments: dict[str, Any], **options: Any) -> tuple[Any, EMACallback, list[dict[str, Tensor]]]:
    """Trains six steps in two epochs, with dropout and an evaluation after each epoch."""
    torch.manual_seed(3)
    model = LlamaForCausalLM(LlamaConfig(**CONFIG, **HEADS, attention_dropout=0.3))
    own, steps = EMACallback(decay=0.5, **options), Steps()
    trainer = make(folder, own, steps, model=model, eval_strategy="epoch", eval_dataset=EVAL["a"], **arguments)
    steps.trainer = trainer
    trainer.train()
    return trainer, own, steps.found


@pytest.mark.world_size(2)
@pytest.mark.parametrize("name", ["ddp", "fsdp2", "zero3"])
def test_a_second_evaluation_of_a_sharded_model_changes_no_training(name: str, tmp_path: Path) -> None:
    """Two evaluations gather weights twice, and draw from the generators of both ranks."""
    runs = {}
    for evaluate in (False, True, "both"):
        with strategy(name) as arguments:
            runs[evaluate] = fit(tmp_path / str(evaluate), arguments, evaluate=evaluate)
    losses = {
        evaluate: {
            key: [log[key] for log in trainer.state.log_history if key in log]
            for key in ("eval_loss", "live_eval_loss")
        }
        for evaluate, (trainer, _, _) in runs.items()
    }
    assert losses["both"]["eval_loss"] == losses[True]["eval_loss"]
    assert losses["both"]["live_eval_loss"] == losses[False]["eval_loss"]
    assert len(losses["both"]["eval_loss"]) == 2
    for both, alone in zip(runs["both"][2], runs[True][2], strict=True):
        assert same(both, alone)


@pytest.mark.world_size(2)
@pytest.mark.parametrize("name", ["ddp", "fsdp2", "zero3"])
def test_the_chosen_steps_are_averaged_into_the_sharded_model_at_the_end(name: str, tmp_path: Path) -> None:
    """The average has to reach the shards, and under ZeRO-3 the fp32 masters."""
    with strategy(name) as arguments:
        trainer, own, steps = fit(tmp_path, arguments, should_update=some_steps, average_at_end=True)
        assert own.ema is not None
        assert (own.ema.num_updates, own.ema.clock.batches) == (3, 6)
        check(full_weights(trainer), average(steps, 0.5))
