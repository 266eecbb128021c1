"""Groups of decoder layers that pictures and pages draw as one."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LayerGroup:
    """Consecutive decoder layers that are drawn together.

    Attributes:
        name: What the picture calls them.
        first: First layer, 0-based.
        stop: One past the last layer.
    """

    name: str
    first: int
    stop: int

    @property
    def label(self) -> str:
        """The name with its layers: `early layers 0-3`."""
        last = self.stop - 1
        return f"{self.name} layers {self.first}-{last}" if last > self.first else self.name


def layer_groups(num_layers: int) -> tuple[LayerGroup, ...]:
    """Early, middle and late layers, cut where the schedule "safe" cuts: ceil(L/3), ceil(2L/3)."""
    cuts = (0, -(-num_layers // 3), -(-2 * num_layers // 3), num_layers)
    parts = zip(("early", "middle", "late"), cuts, cuts[1:], strict=False)
    return tuple(LayerGroup(*part) for part in parts if part[1] < part[2])
