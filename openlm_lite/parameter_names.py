"""Parameters are known by one name, whatever is wrapped around the modules that hold them."""

from __future__ import annotations

# what torch's checkpoint_wrapper and torch.compile put into names
_WRAPPERS = ("_checkpoint_wrapped_module.", "_orig_mod.")


def plain_name(name: str) -> str:
    """The name that the parameter `name` has in a model without activation checkpointing and
    torch.compile."""
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name
