"""One file per attention backend of vLLM: its class with our builder and implementation."""
