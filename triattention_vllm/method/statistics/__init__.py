"""Statistics of a model's queries: what they hold, which model they fit, where they come from."""

from triattention_vllm.method.statistics.accumulator import StatisticsAccumulator
from triattention_vllm.method.statistics.file import SCHEMA_VERSION
from triattention_vllm.method.statistics.fingerprint import Fingerprint
from triattention_vllm.method.statistics.published import import_published
from triattention_vllm.method.statistics.statistics import Statistics

__all__ = [
    "SCHEMA_VERSION",
    "Fingerprint",
    "Statistics",
    "StatisticsAccumulator",
    "import_published",
]
