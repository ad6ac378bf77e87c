"""What an operator watches, for the backend at hand: one module and one call for each.

* `prefetch_embeddings.instrumentation.prometheus.instrument(embeddings)`: counters and histograms.
* `prefetch_embeddings.instrumentation.opentelemetry.instrument(embeddings)`: the same, and spans.

Each module needs its backend's library, which the extra of the same name installs.
"""

__all__: list[str] = []  # nothing: a backend is imported by whoever has it
