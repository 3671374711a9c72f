"""An implementation that is asked for is kept or refused, never replaced."""

import pytest
import torch
from triattention_kernels import ArgumentError
from triattention_kernels.implementation import choose

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


def test_each_device_has_its_own(monkeypatch):
    for interpreted in ("0", "1"):
        monkeypatch.setenv("TRITON_INTERPRET", interpreted)
        assert choose(None, CPU) == "torch"
        assert choose(None, CUDA) == "triton"


def test_a_choice_is_kept_where_it_can_run(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    for device in (CPU, CUDA):
        assert choose("torch", device) == "torch"
        assert choose("triton", device) == "triton"


def test_triton_on_the_cpu_needs_its_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert choose("triton", CUDA) == "triton"
    with pytest.raises(ArgumentError, match='tensors on cpu; .* choose implementation="torch"'):
        choose("triton", CPU)


def test_an_unknown_implementation_is_refused():
    with pytest.raises(ArgumentError, match="'cuda' is unknown; known are torch, triton"):
        choose("cuda", CUDA)
