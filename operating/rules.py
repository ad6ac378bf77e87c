"""The panels and the alerts, in terms of the metrics that the library exports."""

from __future__ import annotations

from dataclasses import dataclass

P = "prefetch_embeddings_"
BY = "by (name, kind)"


@dataclass(frozen=True)
class Panel:
    """One panel of the dashboard.

    Attributes:
        title: What it shows.
        query: In PromQL; a series for each name and kind.
        unit: Grafana's name of the unit.
        means: What its reader can take from it.
    """

    title: str
    query: str
    unit: str
    means: str


@dataclass(frozen=True)
class Alert:
    """One alert.

    Attributes:
        name: Its name.
        query: In PromQL; it fires where this has a value.
        after: For how long, as Prometheus writes it.
        summary: What has happened.
        do: What to do.
        staged: Series of counters that make it fire, each with what it grows by in a minute.
    """

    name: str
    query: str
    after: str
    summary: str
    do: str
    staged: dict[str, float]


def _rate(counter: str, window: str = "5m") -> str:
    return f"sum {BY} (rate({P}{counter}_total[{window}]))"


def _share(part: str, *whole: str) -> str:
    return f"{_rate(part)} / ({' + '.join(map(_rate, whole))})"


PANELS = (
    Panel(
        "What queries wait, 95th percentile",
        f"histogram_quantile(0.95, sum by (name, kind, le) "
        f"(rate({P}query_duration_seconds_bucket[5m])))",
        "s",
        "The retrieval's part of your time to first audio.",
    ),
    Panel(
        "Share of the work that nobody waited for",
        _share("hidden_seconds", "hidden_seconds", "exposed_seconds"),
        "percentunit",
        "1 is retrieval for nothing.",
    ),
    Panel(
        "Queries by what they met",
        f"sum by (name, kind, outcome) (rate({P}query_duration_seconds_count[5m]))",
        "reqps",
        "Mostly ready is right; missed means that another text is asked for than was prefetched.",
    ),
    Panel(
        "Prefetches paid for in vain",
        _share("prefetch_wasted", "prefetch_succeeded"),
        "percentunit",
        "What guesses cost; counted when their time is up.",
    ),
    Panel("Prefetches dropped", _rate("prefetch_dropped"), "reqps", "0 is right."),
    Panel(
        "Second calls, beside overdue ones",
        _rate("overdue_calls"),
        "reqps",
        "The provider is slow where this moves.",
    ),
)

ALERTS = (
    Alert(
        "PrefetchQueriesFail",
        f"{_share('query_failed', 'query_ready', 'query_joined', 'query_claimed', 'query_missed')}"
        " > 0.05",
        "5m",
        "More than one query in twenty ends in an error of the model.",
        "Look at the provider, and at the client's own retries.",
        {"query_failed": 10, "query_missed": 60},
    ),
    Alert(
        "PrefetchMisses",
        f"{_share('query_missed', 'query_ready', 'query_joined', 'query_claimed', 'query_missed')}"
        f" > 0.5 and {_rate('prefetch_started')} > 0",
        "15m",
        "Most queries find no prefetch, although there are some.",
        "explain_miss(text) says why: another text, or another config.",
        {"query_missed": 60, "query_ready": 10, "prefetch_started": 60},
    ),
    Alert(
        "PrefetchDropped",
        f"{_rate('prefetch_dropped')} > 0.1",
        "5m",
        "Prefetches are dropped: the queue is full, or calls keep failing.",
        "A WARNING in the log says whether prefetching pauses; else more max_workers.",
        {"prefetch_dropped": 30},
    ),
    Alert(
        "PrefetchWasted",
        f"{_share('prefetch_wasted', 'prefetch_succeeded')} > 0.7",
        "30m",
        "Most prefetches serve no query.",
        "Tell the speech signals; another preset (python -m prefetch_embeddings.replay).",
        {"prefetch_wasted": 50, "prefetch_succeeded": 60},
    ),
    Alert(
        "PrefetchProviderSlow",
        f"{_share('overdue_calls', 'query_joined', 'query_claimed', 'query_missed')} > 0.05",
        "5m",
        "One call in twenty takes so long that another is made beside it.",
        "Look at the provider; a time-out in the model's client.",
        {"overdue_calls": 10, "query_joined": 60},
    ),
    Alert(
        "PrefetchRedisAway",
        f"{_rate('redis_skipped')} > {_rate('redis_hits')}",
        "5m",
        "More texts go past Redis than are found in it.",
        "Look at Redis; queries go on without it.",
        {"redis_skipped": 60, "redis_hits": 1},
    ),
)
