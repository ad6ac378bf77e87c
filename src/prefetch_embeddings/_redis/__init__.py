"""The parts of `RedisCachedEmbeddings`: connections, deadline, breaker, writer, lease, counters."""
