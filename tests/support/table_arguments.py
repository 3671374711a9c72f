"""Arguments of vLLM's block tables that only some release lines take."""

from typing import Any

from triattention_vllm.engine.differences import BLOCKS_ARE_SPLIT_IN_GROUPS


def kernel_block_sizes(sizes: list[int]) -> dict[str, Any]:
    """The block size of each group's attention kernel, where the tables want to know it."""
    return {} if BLOCKS_ARE_SPLIT_IN_GROUPS else {"kernel_block_sizes": sizes}
