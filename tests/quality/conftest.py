"""The quality lab's modules, imported as ``quality.*``."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
