"""How long the endpoint takes to answer: one reproducible delay for each text."""

import hashlib
import math
import random
from dataclasses import dataclass

_Z95 = 1.6448536269514722  # 95th percentile of the standard normal distribution


@dataclass(frozen=True, kw_only=True)
class Delays:
    """A seeded distribution of delays, lognormal between two percentiles.

    The delay depends on the seed and the text alone, not on the order of the requests: two runs
    over the same questions wait the same time for each of them, and a client that knows the
    `Delays` can compute what the server will do.

    Args:
        p5: Seconds; one delay in twenty is shorter. 0.0 for no delay at all.
        p95: Seconds; one delay in twenty is longer. Equal to `p5` for a constant delay.
        seed: Another seed, other delays.
        stragglers: Probability from 0 to 1 that a delay is drawn out.
        straggler_extra: Shortest and longest extra delay of a straggler, in seconds.
        redraw: Draw anew each time the same text is asked for, so that a second attempt may be
            luckier than the first.
        time_scale: Factor on every delay; 0.1 makes the endpoint ten times as fast.
    """

    p5: float = 0.0
    p95: float = 0.0
    seed: int = 0
    stragglers: float = 0.0
    straggler_extra: tuple[float, float] = (2.0, 6.0)
    redraw: bool = False
    time_scale: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.p5 <= self.p95 or (self.p5 == 0 < self.p95):
            raise ValueError("delays need 0 < p5 <= p95, or both 0 for none")

    @classmethod
    def constant(cls, seconds: float) -> "Delays":
        """The same delay for every text, in seconds."""
        return cls(p5=seconds, p95=seconds)

    def seconds_for(self, text: str, *, asked_before: int = 0) -> float:
        """The delay for one text.

        Args:
            text: The text to embed.
            asked_before: How often the endpoint was asked for this text already. Matters with
                `redraw` only.

        Returns:
            Seconds, `time_scale` applied.
        """
        if self.p5 == 0:
            return 0.0
        draw = asked_before if self.redraw else 0
        digest = hashlib.sha256(f"{self.seed}\0{draw}\0{text}".encode()).digest()
        rng = random.Random(digest)
        low, high = math.log(self.p5), math.log(self.p95)
        seconds = rng.lognormvariate((low + high) / 2, (high - low) / (2 * _Z95))
        if rng.random() < self.stragglers:
            seconds += rng.uniform(*self.straggler_extra)
        return seconds * self.time_scale
