"""What the endpoint does wrong on demand, and to which requests."""

import enum
import re
from collections.abc import Sequence
from dataclasses import dataclass, field


class Fault(enum.StrEnum):
    """What can happen to a request instead of an answer."""

    RATE_LIMIT = "rate_limit"
    """Status 429, as over the provider's limit."""

    SERVER_ERROR = "server_error"
    """Status 500."""

    DISCONNECT = "disconnect"
    """The connection is reset and no byte is sent."""

    HANG = "hang"
    """No byte is sent until the endpoint is told to release the request, which is then answered."""


@dataclass
class FaultRule:
    """One order to fail.

    Args:
        fault: What happens.
        times: For how many requests; None for every one, until the faults are cleared.
        matching: Regular expression, searched in each of the request's texts; None matches all.
        retry_after: Seconds that a 429 or 500 asks the client to wait before it retries.
    """

    fault: Fault
    times: int | None = 1
    matching: str | None = None
    retry_after: float | None = None

    def applies_to(self, texts: Sequence[str]) -> bool:
        """Whether a request for these texts is to fail by this rule."""
        if self.times == 0:
            return False
        return self.matching is None or any(re.search(self.matching, text) for text in texts)


@dataclass
class FaultPlan:
    """The rules in force, oldest first."""

    rules: list[FaultRule] = field(default_factory=list)

    def take(self, texts: Sequence[str]) -> FaultRule | None:
        """The rule that a request for these texts falls under, used up by one request."""
        for rule in self.rules:
            if rule.applies_to(texts):
                if rule.times is not None:
                    rule.times -= 1
                return rule
        return None
