"""Names of the samples that a scrape returns."""

from triattention_vllm.metrics import Metric


def sample_names(metric: Metric) -> tuple[str, ...]:
    """As Prometheus makes them from the name and the kind."""
    if metric.kind == "histogram":
        return tuple(f"{metric.name}_{part}" for part in ("bucket", "sum", "count"))
    return (metric.shown_name,)
