"""Faults inside the loop of a rank, for `TrainServer.train(faults=[…])`.

    fault("hang", 1, "step", 5)            rank 1 never comes out of its fifth step
    fault("sleep", 1, "journal", 2)        … comes late to what is kept of its second task
    fault("SIGTERM", 0, "after load")      … a signal after its first load of a checkpoint
    fault("error", 1, "step", 3)           … an error at its third step
    fault("refuse", 1, "attention")        … cannot have the attention kernel that was asked for
    fault("nan gradient", 1, "batch", 25)  … in the global batch 25, as often as it is trained on

Places count the calls in one process; a resumed run counts anew. A batch is the same one always.
"""

from __future__ import annotations

import functools
import os
import signal
import time
from collections.abc import Callable
from typing import Any

from openlm_lite.errors import InputError

Fault = dict[str, Any]


def fault(do: str, rank: int, at: str, n: int = 1) -> Fault:
    """One fault: a kind of `BATCH_FAULTS` at "batch", else one of `_ACTS` or signals: "SIGINT"."""
    return {"do": do, "rank": rank, "at": at, "n": n}


def inject(faults: list[Fault], rank: int) -> None:
    """Put the faults of this rank into place."""
    import torch

    from openlm_lite import checkpoint, saver, step, train
    from openlm_lite.data.stream import TokenStream
    from openlm_lite.eval.journal import FolderJournal

    places: dict[str, tuple[Any, str]] = {
        "attention": (step, "choose_attention"),
        "read": (TokenStream, "read"),  # by the thread that reads ahead
        "agree": (train, "agree_on"),
        "step": (train, "forward_backward"),
        "update": (torch.optim.AdamW, "step"),
        "validation": (train, "validation_loss"),
        "save": (saver, "write_checkpoint"),  # in a thread of its own
        "load": (checkpoint, "load_checkpoint"),
        "journal": (FolderJournal, "load"),
    }
    for each in faults:
        if each["rank"] != rank:
            continue
        if each["at"] == "batch":
            _around(train, "forward_backward", BATCH_FAULTS[each["do"]](each["n"]))
        else:
            place = each["at"].removeprefix("after ")
            after = place != each["at"]
            _around(*places[place], _call(each["n"], after, _ACTS.get(each["do"], _signals), each))


def _around(owner: Any, name: str, wrap: Callable[[Any], Any]) -> None:
    inner = getattr(owner, name)
    setattr(owner, name, functools.wraps(inner)(wrap(inner)))


def _call(n: int, after: bool, act: Callable[[Fault], None], each: Fault) -> Callable[[Any], Any]:
    """Act before (or after) the n-th call."""

    def wrap(inner: Any) -> Any:
        count = 0

        def counted(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            if count == n and not after:
                act(each)
            result = inner(*args, **kwargs)
            if count == n and after:
                act(each)
            return result

        return counted

    return wrap


def _hang(_: Fault) -> None:
    os.write(1, f"hangs at {time.time()}\n".encode())
    time.sleep(1000)


def _error(_: Fault) -> None:
    raise ValueError("broken on purpose")


def _signals(each: Fault) -> None:
    """Signals to this process, 0.7 s apart: of two Ctrl-C in less, the second one is no other."""
    for i, name in enumerate(each["do"].split()):
        time.sleep(0.7 * (i > 0))
        os.kill(os.getpid(), signal.Signals[name])


def _refuse(each: Fault) -> None:
    raise InputError(f"{each['at']}: not on this rank")


def _sleep(_: Fault) -> None:
    time.sleep(1.5)


_ACTS: dict[str, Callable[[Fault], None]] = {
    "hang": _hang,
    "sleep": _sleep,
    "error": _error,
    "refuse": _refuse,
}


def _scaled_gradient(factor: float) -> Callable[[int], Callable[[Any], Any]]:
    """This rank's share of the gradient is multiplied, that of the other ranks is not."""

    def at(batch: int) -> Callable[[Any], Any]:
        def wrap(inner: Any) -> Any:
            def trained(model: Any, its: Any, *args: Any, **kwargs: Any) -> Any:
                losses = inner(model, its, *args, **kwargs)
                if its.first_index == batch * _ROWS:
                    for p in model.parameters():
                        getattr(p.grad, "_local_tensor", p.grad).mul_(factor)
                return losses

            return trained

        return wrap

    return at


def _nan_loss(batch: int) -> Callable[[Any], Any]:
    """The loss of this rank's rows is NaN, and so is all that the backward pass makes of it."""

    def wrap(inner: Any) -> Any:
        def trained(model: Any, its: Any, *args: Any, **kwargs: Any) -> Any:
            if its.first_index != batch * _ROWS:
                return inner(model, its, *args, **kwargs)
            nan = float("nan")
            hook = model.register_forward_hook(
                lambda _, __, sums: sums._replace(total=sums.total * nan, ce=sums.ce * nan)
            )
            try:
                return inner(model, its, *args, **kwargs)
            finally:
                hook.remove()

        return trained

    return wrap


_ROWS = 8
"""of a global batch of the toy recipe"""

BATCH_FAULTS: dict[str, Callable[[int], Callable[[Any], Any]]] = {
    "nan gradient": _scaled_gradient(float("nan")),
    "large gradient": _scaled_gradient(1e4),
    "nan loss": _nan_loss,
}
