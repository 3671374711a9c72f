"""When the block pool is full enough for rounds, with hysteresis: integers only."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Pressure:
    """Thresholds in percent of the block pool, ``stop <= start``.

    Rounds begin above ``start`` and go on until no more than ``stop`` is needed, so that a pool
    whose need moves around one of them does not switch at every step.
    """

    start: int
    stop: int

    def is_on(self, was_on: bool, num_needed: int, num_blocks: int) -> bool:
        """Whether rounds run while ``num_needed`` of ``num_blocks`` blocks are needed.

        was_on: the answer before. num_needed: blocks that requests hold and those that they take
        in this step; may exceed the pool.
        """
        threshold = self.stop if was_on else self.start
        return num_needed * 100 > threshold * num_blocks
