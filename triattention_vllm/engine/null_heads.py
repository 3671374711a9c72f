"""Null heads of this step's rows as the host knows them, without asking the device.

The scheduler sends them with every step, so nothing is kept from one step to the next.
"""

from collections.abc import Callable, Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from vllm.v1.attention.backend import CommonAttentionMetadata

RequestsOfRows = Callable[[], list[str]]
"""The request id of each row of a batch that is about to run, in the order of its rows."""


class NullHeads:
    """Null blocks at the head of each row of one KV-cache group, for the step that runs.

    block_size: tokens of a block of the KV-cache manager; the attention backend's may be smaller.
    """

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self._of_request: Mapping[str, int] = {}
        self._requests_of_rows: RequestsOfRows = list

    def read_rows_with(self, requests_of_rows: RequestsOfRows) -> None:
        """Use the model runner's own order of rows."""
        self._requests_of_rows = requests_of_rows

    def begin_step(self, of_request: Mapping[str, int]) -> None:
        """of_request: request id -> null blocks; requests that are left out have none.

        Stays until the next step begins: a draft model runs behind the model, when tokens are
        sampled.
        """
        self._of_request = of_request

    def of_rows(self, metadata: CommonAttentionMetadata) -> NDArray[np.int32]:
        """Null blocks of each row [R]; rows behind the last request are padding and have none."""
        nulls = np.zeros(metadata.seq_lens.shape[0], dtype=np.int32)
        for row, request_id in enumerate(self._requests_of_rows()[: len(nulls)]):
            nulls[row] = self._of_request.get(request_id, 0)
        return nulls

    def shorten(self, metadata: CommonAttentionMetadata) -> tuple[int, torch.Tensor | None]:
        """(largest cached length, upper bound of each) on the host, for planning and splits.

        vLLM's own bounds stay where no row has a null head.
        """
        upper_bound = metadata.seq_lens_cpu_upper_bound
        if not self._of_request or upper_bound is None:
            return metadata.max_seq_len, upper_bound
        nulls = torch.from_numpy(self.of_rows(metadata))
        shortened = upper_bound - nulls[: len(upper_bound)] * self.block_size
        return min(metadata.max_seq_len, max(1, int(shortened.max()))), shortened
