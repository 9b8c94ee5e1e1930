"""Writes the files beside it: each with the real library, from the same few steps of training.

``python make.py NAME...`` writes those; README.md says which versions wrote what is here. Beside each file goes what
the library itself says the average is, as ``NAME.expected.safetensors``.
"""

from __future__ import annotations

import argparse
import importlib.machinery
import importlib.util
import os
import shutil
import sys
import tempfile
import types
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import ClassVar

import torch
import torch.amp.grad_scaler
import torch.cuda.amp.grad_scaler
from safetensors.torch import save_file
from torch import Tensor, nn

HERE = Path(__file__).parent


def build(module: nn.Module, tied: bool = True) -> nn.Module:
    """Gives a module its layers: two alike, a tied pair, BatchNorm's buffers, a frozen part; 4 wide."""
    torch.manual_seed(0)
    module.embed = nn.Embedding(7, 4)
    module.up = nn.Linear(4, 4)
    module.norm = nn.BatchNorm1d(4)
    module.down = nn.Linear(4, 4)
    module.frozen = nn.Linear(4, 4).requires_grad_(False)
    module.head = nn.Linear(4, 7, bias=False)
    if tied:
        module.head.weight = module.embed.weight
    return module


def logits(module: nn.Module, tokens: Tensor) -> Tensor:
    """The forward pass of what ``build`` makes."""
    x = module.norm(module.up(module.embed(tokens)))
    return module.head(module.frozen(module.down(torch.tanh(x))))


class Net(nn.Module):
    """The plain model."""

    def __init__(self) -> None:
        super().__init__()
        build(self)

    def forward(self, tokens: Tensor) -> Tensor:
        return logits(self, tokens)


def batches() -> list[Tensor]:
    """Six batches of tokens; the model is to say what it is told."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 7, (8,), generator=generator) for _ in range(6)]


def train(net: nn.Module, after_step: Callable[[], object]) -> torch.optim.Optimizer:
    """A step for each batch, large enough that averages are far from the weights."""
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.5)
    for tokens in batches():
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(tokens), tokens).backward()
        optimizer.step()
        after_step()
    return optimizer


def expect(name: str, state: dict[str, Tensor]) -> None:
    """Notes what the library says that the average is, tied names once each."""
    tensors = {key: value.detach().clone().contiguous() for key, value in state.items()}
    save_file(tensors, HERE / f"{name}.expected.safetensors")


class Nothing(types.ModuleType):
    """A package that is imported for its types alone: any name in it is an empty class."""

    __path__: ClassVar[list[str]] = []
    __version__ = "0"

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        made = type("Any", (type,), {"__getattr__": lambda _, key: key})(name, (), {})
        setattr(self, name, made)
        return made


class StandIns:
    """Finds packages that these libraries import and that their averages do not need."""

    packages = ("torchvision", "mcli", "wandb", "lazy_importer", "yahp")

    def find_spec(self, name: str, path: object = None, target: object = None) -> importlib.machinery.ModuleSpec | None:
        wanted = name.split(".")[0] in self.packages
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if wanted else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> Nothing:
        return Nothing(spec.name)

    def exec_module(self, module: types.ModuleType) -> None: ...


def composer() -> None:
    """A checkpoint of Composer's trainer, as its CheckpointSaver writes it: the average lies in the model's place."""
    # Where versions before torch 2.3 kept it.
    torch.cuda.amp.grad_scaler._refresh_per_optimizer_state = torch.amp.grad_scaler._refresh_per_optimizer_state
    import composer as library
    import composer.algorithms

    class ComposerNet(library.ComposerModel):
        def __init__(self) -> None:
            super().__init__()
            build(self)

        def forward(self, batch: tuple[Tensor, Tensor]) -> Tensor:
            return logits(self, batch[0])

        def loss(self, outputs: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
            return nn.functional.cross_entropy(outputs, batch[1])

    net = ComposerNet()
    folder = Path(tempfile.mkdtemp())
    trainer = library.Trainer(
        model=net,
        optimizers=torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.5),
        train_dataloader=torch.utils.data.DataLoader([(t, t) for ts in batches() for t in ts], batch_size=8),
        max_duration="6ba",
        algorithms=[library.algorithms.EMA(half_life="4ba")],
        save_folder=str(folder),
        save_interval="6ba",
        save_filename="composer.pt",
        save_latest_filename=None,
        progress_bar=False,
        device="cpu",
    )
    trainer.fit()
    algorithm = trainer.state.algorithms[0]
    file = f"composer-{library.__version__.replace('.', '_')}.pt"
    shutil.copy(folder / "composer.pt", HERE / file)
    if not algorithm.ema_weights_active:
        raise RuntimeError("the average is expected in the model's place, where saving puts it")
    expect(Path(file).stem, net.state_dict())


def diffusers() -> None:
    """EMAModel's state dict, which has no names; the model's own; and what ``save_pretrained`` writes."""
    from diffusers import ConfigMixin, ModelMixin
    from diffusers.configuration_utils import register_to_config
    from diffusers.training_utils import EMAModel

    class DiffusersNet(ModelMixin, ConfigMixin):
        @register_to_config
        def __init__(self) -> None:
            super().__init__()
            build(self, tied=False)  # which save_pretrained refuses

        def forward(self, tokens: Tensor) -> Tensor:
            return logits(self, tokens)

    net = DiffusersNet()
    ema = EMAModel(
        net.parameters(), decay=0.7, update_after_step=1, use_ema_warmup=True, power=0.75, inv_gamma=2.0,
        model_cls=DiffusersNet, model_config=net.config,
    )  # fmt: skip
    train(net, lambda: ema.step(net.parameters()))
    torch.save(ema.state_dict(), HERE / "diffusers.pt")
    torch.save(net.state_dict(), HERE / "model.pt")
    shutil.rmtree(HERE / "diffusers", ignore_errors=True)
    ema.save_pretrained(HERE / "diffusers")
    buffers = dict(net.named_buffers())
    ema.copy_to(net.parameters())
    expect("diffusers", {name: net.state_dict()[name] for name in net.state_dict() if name not in buffers})


def timm() -> None:
    """What timm's training script saves with ``--model-ema``."""
    from timm.utils import CheckpointSaver, ModelEmaV3

    net = Net()
    ema = ModelEmaV3(net, decay=0.8)
    optimizer = train(net, lambda: ema.update(net))
    folder = tempfile.mkdtemp()
    arguments = argparse.Namespace(model="net", model_ema=True, model_ema_decay=0.8)
    saver = CheckpointSaver(net, optimizer, args=arguments, model_ema=ema, checkpoint_dir=folder, recovery_dir=folder)
    saver.save_checkpoint(2, metric=0.5)
    shutil.copy(Path(folder) / "checkpoint-2.pth.tar", HERE / "timm.pth.tar")
    expect("timm", ema.module.state_dict())


def ema_pytorch() -> None:
    """The state dict of the module ``ema_pytorch.EMA``, with the online model in it."""
    from ema_pytorch import EMA

    net = Net()
    ema = EMA(net, beta=0.8, update_after_step=1, update_every=1)
    train(net, ema.update)
    torch.save(ema.state_dict(), HERE / "ema_pytorch.pt")
    expect("ema_pytorch", ema.ema_model.state_dict())


def lightning_module() -> tuple[nn.Module, Iterable[tuple[Tensor, Tensor]]]:
    """The model for Lightning's trainer, and its batches."""
    import lightning.pytorch as pl

    class LightningNet(pl.LightningModule):
        def __init__(self, rate: float = 0.5) -> None:
            super().__init__()
            self.save_hyperparameters()
            build(self)

        def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
            return nn.functional.cross_entropy(logits(self, batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.5)

    return LightningNet(), torch.utils.data.DataLoader([(t, t) for ts in batches() for t in ts], batch_size=8)


def lightning() -> None:
    """A checkpoint of Lightning's trainer with EMAWeightAveraging."""
    import lightning.pytorch as pl
    from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint

    net, loader = lightning_module()
    average, folder = EMAWeightAveraging(decay=0.8, update_starting_at_step=1), tempfile.mkdtemp()
    saver = ModelCheckpoint(folder, "lightning", every_n_train_steps=6)
    trainer = pl.Trainer(
        max_steps=6, accelerator="cpu", callbacks=[average, saver], logger=False, enable_progress_bar=False
    )
    trainer.fit(net, loader)
    shutil.copy(Path(folder) / "lightning.ckpt", HERE / "lightning.ckpt")
    expect("lightning", average._average_model.module.state_dict())


def nemo() -> None:
    """What NeMoModelCheckpoint writes to ``-EMA.ckpt``, by the same calls; NEMO_EMA is the path of NeMo's ema.py."""
    import lightning.pytorch as pl

    spec = importlib.util.spec_from_file_location("nemo_ema", os.environ["NEMO_EMA"])
    library = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(library)
    net, loader = lightning_module()
    average = library.EMA(decay=0.8, every_n_steps=2)

    class Saver(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: object) -> None:
            if trainer.global_step == 6:
                with average.save_original_optimizer_state(trainer):
                    trainer.save_checkpoint(HERE / "nemo.ckpt")
                with average.save_ema_model(trainer):
                    trainer.save_checkpoint(HERE / "nemo-EMA.ckpt")
                    expect("nemo", net.state_dict())

    trainer = pl.Trainer(
        max_steps=6, accelerator="cpu", callbacks=[average, Saver()], logger=False, enable_progress_bar=False
    )
    trainer.fit(net, loader)


if __name__ == "__main__":
    sys.meta_path.insert(0, StandIns())
    for wanted in sys.argv[1:]:
        globals()[wanted]()
