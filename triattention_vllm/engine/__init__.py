"""The roles that this package plays inside vLLM; the only place that imports vLLM."""
