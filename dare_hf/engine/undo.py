"""The one place that sets attributes on a user's model; everything it does can be undone."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from dare_hf.engine.methods import Bound

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn
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
        children: (module, name) of child modules that were added.
        frozen: Parameters that were trainable before.
    """

    changes: list[tuple[Any, str, Any, Any]] = field(default_factory=list)
    handles: list[RemovableHandle] = field(default_factory=list)
    children: list[tuple[nn.Module, str]] = field(default_factory=list)
    frozen: list[nn.Parameter] = field(default_factory=list)

    def set(self, owner: Any, name: str, value: Any) -> None:
        """Set an instance attribute, remembering what the instance itself had."""
        before = vars(owner).get(name, _Missing)
        object.__setattr__(owner, name, value)
        self.changes.append((owner, name, before, value))

    def put(self, owner: Any, name: str, function: Callable[..., Any]) -> None:
        """Put a function, called with the instance first, in the place of a method."""
        self.set(owner, name, Bound(owner, name, function))

    def hook(self, handle: RemovableHandle) -> None:
        """Remember a hook."""
        self.handles.append(handle)

    def child(self, owner: nn.Module, name: str, module: nn.Module) -> None:
        """Add a child module."""
        owner.add_module(name, module)
        self.children.append((owner, name))

    def freeze(self, parameter: nn.Parameter) -> None:
        """Make a parameter untrainable, remembering whether it was."""
        if parameter.requires_grad:
            parameter.requires_grad_(False)
            self.frozen.append(parameter)

    def thaw(self) -> None:
        """Make trainable what `freeze` made untrainable."""
        for parameter in self.frozen:
            parameter.requires_grad_(True)
        self.frozen.clear()

    def undo(self) -> None:
        """Put everything back; `thaw` is a step of its own, since other adapters may need it not.

        A forward that somebody has wrapped since stays wrapped. Out of an accelerate hook ours is
        taken; any other wrapper goes on calling it, and it calls the class's.
        """
        for handle in reversed(self.handles):
            handle.remove()
        for owner, name in reversed(self.children):
            owner._modules.pop(name, None)
        for owner, name, before, value in reversed(self.changes):
            current = vars(owner).get(name, _Missing)
            wrapped = vars(owner).get("_old_forward") if name == "forward" else None
            if name == "forward" and current is not value:
                if wrapped is value:
                    original = getattr(type(owner), name).__get__(owner)
                    vars(owner)["_old_forward"] = original if before is _Missing else before
            elif before is _Missing:
                vars(owner).pop(name, None)
            else:
                object.__setattr__(owner, name, before)
        for record in (self.changes, self.handles, self.children):
            record.clear()
