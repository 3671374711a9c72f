"""What older release lines of vLLM cannot do by themselves, with compression or without."""

from triattention_vllm.engine.differences import LINE

CPU_SINKS_MAY_BE_FLOAT32 = LINE >= (0, 31)
"""Whether vLLM's CPU attention takes learned sinks in another dtype than bfloat16; before, such a
model ends in vLLM's own RuntimeError at its first step."""
