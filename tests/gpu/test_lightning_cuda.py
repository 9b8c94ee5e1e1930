"""Lightning's FSDPStrategy, which refuses CPUs."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from support.oracle import DenseAverage

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.utils.data import DataLoader

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
pl = pytest.importorskip("lightning.pytorch", reason="is in the extra 'lightning'")


class Module(pl.LightningModule):
    """Follows itself with a dense average, after each step."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1))
        self.dense = DenseAverage({name for name, _ in self.named_parameters()}, 0.5)
        self.losses: list[float] = []

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        return self.net(batch).square().mean()

    def on_train_batch_end(self, *_: Any) -> None:
        with FSDP.summon_full_params(self.trainer.strategy.model):
            self.dense.update({name: value.detach().cpu().clone() for name, value in self.named_parameters()})

    def validation_step(self, batch: Tensor, index: int) -> None:
        self.losses.append(float(self.training_step(batch, index)))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.01)


def test_fit_validates_on_the_average_and_resumes(tmp_path: Path) -> None:
    from dist_ema.integrations.lightning import EMACallback

    warnings.filterwarnings("ignore", module="lightning")
    torch.manual_seed(0)
    data = DataLoader(torch.randn(8, 3), batch_size=2)  # type: ignore[arg-type]

    def trainer(epochs: int) -> Any:
        from lightning.pytorch.strategies import FSDPStrategy

        options = {"accelerator": "gpu", "devices": 1, "logger": False, "num_sanity_val_steps": 0}
        strategy = FSDPStrategy(state_dict_type="sharded")
        return pl.Trainer(
            max_epochs=epochs,
            strategy=strategy,
            callbacks=[EMACallback(decay=0.5)],
            default_root_dir=tmp_path,
            **options,
        )

    module, run = Module(), trainer(1)
    run.fit(module, data, data)
    ema = run.callbacks[0].ema
    module.dense.check(ema.full_state_dict())
    plain = Module().net
    plain.load_state_dict({name.removeprefix("net."): value.float() for name, value in module.dense.average.items()})
    with torch.no_grad():
        expected = [float(plain(batch).square().mean()) for batch in data]
    torch.testing.assert_close(module.losses, expected, atol=1e-6, rtol=1e-4)
    (saved,) = tmp_path.rglob("*.ckpt")
    digest = ema.fingerprint()
    resumed = trainer(2)
    resumed.fit(Module(), data, data, ckpt_path=saved)
    assert resumed.callbacks[0].ema.num_updates == 8
    assert resumed.callbacks[0].ema.fingerprint() != digest
