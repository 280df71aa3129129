"""A module expert sees, through forward hooks, the calls of a module that is not a linear layer, such as a block."""

from typing import Any, ClassVar

from torch import nn

from modular_experts.experts.expert import Trained

Positional = tuple[Any, ...]
Named = dict[str, Any]
Arguments = tuple[Positional, Named]
"""Positional and named arguments of a call."""


def refer(expert: Trained, **others: nn.Module) -> None:
    """Keep modules that another expert owns, such as a router, as attributes, so that their tensors exist once."""
    # `nn.Module.__setattr__` would register them.
    for name, module in others.items():
        object.__setattr__(expert, name, module)


class ModuleExpert(Trained):
    """Owns trained state at a module, and may change its inputs and outputs; a subclass gives `before` or `after`.

    With gradient checkpointing, the hooks of modules inside of a block run again and the block's own do not, so what
    `before` of a block keeps for the layers inside must stay until the next pass.
    """

    mergeable: ClassVar[bool] = False
    not_mergeable_because: ClassVar[str] = "it changes what a whole module computes"

    @property
    def tokens_in_front(self) -> int:
        """How many tokens it puts in front of each row at most; they take places of the model's context."""
        return 0

    def before(self, args: Positional, kwargs: Named) -> Arguments | None:
        """Return the arguments that the module gets in place of these, or None to leave them as they are."""
        return None

    def after(self, args: Positional, kwargs: Named, output: Any) -> object:
        """Return a replacement of the module's output; `args` and `kwargs` are the module's arguments."""
        return output

    def attach(self, module: nn.Module, name: str = "expert") -> None:
        """Become a submodule of a module, `expert` if it is to be ejected, and see its calls from now on."""
        module.add_module(name, self)
        # Bound methods, which a copied or pickled model takes along.
        before = module.register_forward_pre_hook(self._before, with_kwargs=True)
        self._hooks = [before, module.register_forward_hook(self._after, with_kwargs=True)]

    def detach(self, module: nn.Module) -> None:
        """Leave the module as it was before `attach`."""
        for hook in self._hooks:
            hook.remove()
        del module.expert

    def _before(self, module: nn.Module, args: Positional, kwargs: Named) -> Arguments | None:
        return self.before(args, kwargs)

    def _after(self, module: nn.Module, args: Positional, kwargs: Named, output: object) -> object:
        return self.after(args, kwargs, output)
