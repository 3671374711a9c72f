"""Models, references and a calibration text that the engine tests share."""

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
import torch
from dense_reference import DenseReference
from engine_runs import ModelFolder
from tiny_model import write_tiny_model
from tiny_models import write_model


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> ModelFolder:
    """Folder of a random-weight model: "qwen3", or a family of ``tiny_models``."""

    @cache
    def folder(family: str) -> Path:
        path = tmp_path_factory.mktemp("models") / family
        return write_tiny_model(path) if family == "qwen3" else write_model(path, family)

    return folder


@pytest.fixture(scope="session")
def reference() -> Callable[[Path], DenseReference]:
    """The float64 reference of a model folder."""
    return cache(DenseReference)


@pytest.fixture(scope="session", autouse=True)
def statistics_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Statistics that these tests make stay out of other tests' folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRIATTENTION_CACHE", str(tmp_path_factory.mktemp("statistics")))
        yield


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A short calibration text: quick, and good enough to be any statistics at all."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    generator = torch.Generator().manual_seed(5)
    words = ["block", "token", "round", "score", "window", "budget", "prefix", "survivor", "row"]
    chosen = torch.randint(0, len(words), (400,), generator=generator).tolist()
    path.write_text(" ".join(words[i] for i in chosen), encoding="utf-8")
    return str(path)
