"""Decisions and scores of the method: knows the kernels, never vLLM."""
