"""The one place that sets attributes on a user's model; everything it does can be undone."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle


class _Missing:
    """Says that an instance had no such attribute; the class itself survives a deepcopy."""


@dataclass
class UndoRecord:
    """What was changed on foreign objects, undone in reverse order.

    Attributes:
        changes: (object, attribute, value before, value set); a missing value before is recorded
            as such, so that undoing deletes the attribute.
        handles: Hooks that were registered.
    """

    changes: list[tuple[Any, str, Any, Any]] = field(default_factory=list)
    handles: list[RemovableHandle] = field(default_factory=list)

    def set(self, owner: Any, name: str, value: Any) -> None:
        """Set an instance attribute, remembering what the instance itself had."""
        before = vars(owner).get(name, _Missing)
        object.__setattr__(owner, name, value)
        self.changes.append((owner, name, before, value))

    def hook(self, handle: RemovableHandle) -> None:
        """Remember a hook."""
        self.handles.append(handle)

    def undo(self) -> None:
        """Put everything back.

        A forward that somebody (an accelerate hook) has wrapped since is taken out of the middle:
        their wrapper stays and calls what was there before.
        """
        for handle in reversed(self.handles):
            handle.remove()
        for owner, name, before, value in reversed(self.changes):
            current = vars(owner).get(name, _Missing)
            wrapped = vars(owner).get("_old_forward") if name == "forward" else None
            if name == "forward" and current is not value and wrapped is not None:
                original = getattr(type(owner), name).__get__(owner)
                vars(owner)["_old_forward"] = original if before is _Missing else before
            elif before is _Missing:
                vars(owner).pop(name, None)
            else:
                object.__setattr__(owner, name, before)
        self.changes.clear()
        self.handles.clear()
