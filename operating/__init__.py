"""What an operator takes along: a Grafana dashboard and alert rules for Prometheus, as files."""
