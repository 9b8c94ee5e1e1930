"""The slow and obvious reference: a dense float64 average, fed with full weights after each step."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor


class DenseAverage:
    """The contract in a few lines: the first weights are copied, later ones blended in; only trained names move."""

    def __init__(self, trained: set[str], decay: float) -> None:
        self.trained = trained
        self.decay = decay
        self.average: dict[str, Tensor] = {}

    def update(self, weights: Mapping[str, Tensor]) -> None:
        for name, value in weights.items():
            if name not in self.trained or name not in self.average:
                self.average[name] = value.double() if value.is_floating_point() else value.clone()
            else:
                self.average[name] = self.decay * self.average[name] + (1 - self.decay) * value.double()

    def check(self, state: Mapping[str, Tensor]) -> None:
        """Raises AssertionError unless ``state`` is the average, to the rounding of its dtype, and nothing else."""
        assert state.keys() == self.average.keys(), state.keys() ^ self.average.keys()
        for name, expected in self.average.items():
            found = state[name]
            assert found.shape == expected.shape, (name, found.shape, expected.shape)
            different = (found.double() - expected.double()).abs() > 1e-7 + 4e-6 * expected.double().abs()
            assert not different.any(), f"{name} differs in {int(different.sum())} elements"
