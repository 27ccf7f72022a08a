"""The global batch as a pure function of the step: small at first, doubling to its full size.

    tokens of a step
      full ┤              ╭────────────      K doublings; each of the K smaller sizes has as many
           │       ╭──────╯                  steps as the others, so that the size follows the
           │   ╭───╯                         tokens trained so far, in a straight line
     start ┤───╯                             (GPT-3, arXiv:2005.14165, appendix B)
           └───┴───┴──────┴──── tokens

Neither ranks nor micro-batches enter, and the order of the samples is the same: only how many of
them a step takes changes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class BatchWarmupConfig:
    """From which size on, and for how long, the batch grows."""

    start_tokens: int | None = None
    """tokens of the first step: global_batch_tokens halved some times; null: no warm-up"""
    tokens: int = 0
    """the full size is reached within so many tokens"""

    def problems(self, full: int, seq_len: int) -> list[str]:
        """What does not fit to steps of `full` tokens, one sentence each."""
        start = self.start_tokens
        if start is None:
            return ["batch_warmup.tokens needs batch_warmup.start_tokens"] if self.tokens else []
        sizes = [full]
        while sizes[-1] % (2 * seq_len) == 0:
            sizes.append(sizes[-1] // 2)
        if start not in sizes[1:]:
            allowed = ", ".join(map(str, reversed(sizes[1:]))) or "none: it cannot be halved"
            return [
                f"batch_warmup.start_tokens = {start}: must be global_batch_tokens = {full} halved "
                f"some times, in whole rows of data.seq_len = {seq_len}: {allowed}"
            ]
        least = full - start  # one step of each smaller size
        if self.tokens < least:
            return [
                f"batch_warmup.tokens = {self.tokens}: one step of each size under the full one "
                f"takes {least}; give at least these"
            ]
        return []


@dataclass(frozen=True)
class BatchSizes:
    """What each step trains on; steps are counted from 0. `full` and `start` in tokens."""

    full: int
    start: int
    steps_each: int
    """steps of every size under the full one; 0: all steps have the full size"""

    @classmethod
    def of(cls, full: int, warmup: BatchWarmupConfig) -> BatchSizes:
        """Without a warm-up where `warmup` is impossible: `problems` tells of it."""
        start = warmup.start_tokens
        if start is None or not 0 < start < full:
            return cls(full, full, 0)
        return cls(full, start, warmup.tokens // (full - start))

    @property
    def warmup_steps(self) -> int:
        """Steps that are smaller than the full one."""
        return self.steps_each * (self.full // self.start).bit_length() - self.steps_each

    def at(self, step: int) -> int:
        """Tokens of a step."""
        return self.full if step >= self.warmup_steps else self.start << (step // self.steps_each)

    def before(self, step: int) -> int:
        """Tokens trained before a step: those of all the steps before it."""
        if step >= self.warmup_steps:
            return self.steps_each * (self.full - self.start) + self.full * (
                step - self.warmup_steps
            )
        doublings, rest = divmod(step, self.steps_each)
        now = self.start << doublings
        return self.steps_each * (now - self.start) + rest * now

    def steps_for(self, tokens: int) -> int:
        """The most steps that train on no more than `tokens`."""
        low, high = 0, tokens // self.start
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.before(middle) <= tokens else (low, middle - 1)
        return low

    def stages(self, steps: int) -> Iterator[tuple[int, int]]:
        """(steps, tokens of each) of one size after the other, for the first `steps`."""
        done = 0
        while done < steps:
            in_warmup = done < self.warmup_steps
            n = min(self.steps_each, steps - done) if in_warmup else steps - done
            yield n, self.at(done)
            done += n
