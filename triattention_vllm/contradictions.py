"""Which settings contradict each other, as far as that can be seen without an engine."""

from collections.abc import Iterator
from dataclasses import fields
from typing import TYPE_CHECKING

from triattention_vllm.score_settings import PRESETS

if TYPE_CHECKING:
    from triattention_vllm.config import Settings

NEED_ORDER = ("streamingllm", "snapkv", "rkv", "h2o")
"""Methods that rank by place, pool over neighbours, or follow survivors from round to round."""

OF_STATISTICS = ("statistics", "calibration_text", "score_norm_term", "score_offsets")
"""Settings that only a method with statistics of the model's queries reads."""


def contradictions(settings: "Settings") -> Iterator[str]:
    """Sentences, each with what is found and what to do; none where nothing contradicts."""
    yield from _of_budgets(settings)
    yield from _of_order(settings)
    if settings.score_redundancy and settings.score_normalise != "heads":
        yield (
            f"score_redundancy {settings.score_redundancy} is taken off normalised scores, and "
            'score_normalise is "none"; leave one of them out.'
        )
    for name, value in PRESETS[settings.preset].items() if settings.preset else ():
        if vars(settings)[name] != value:
            yield (
                f'preset "{settings.preset}" has {name} {value!r}, and {name} is '
                f"{vars(settings)[name]!r}; leave one of them out."
            )
    yield from _of_statistics(settings)
    if settings.pressure_stop > settings.pressure_start:
        yield (
            f"pressure_stop {settings.pressure_stop} is above pressure_start "
            f"{settings.pressure_start}; set it to at most {settings.pressure_start} percent."
        )


def _of_budgets(settings: "Settings") -> Iterator[str]:
    budget, policy = settings.budget, settings.policy(block_size=1)
    if budget < policy.least_budget():
        yield (
            f"budget {budget} is below window {policy.window_of(budget)} + interval "
            f"{settings.interval}; set it to at least {policy.enough_budget()} tokens."
        )
    if settings.max_request_budget is not None and settings.max_request_budget < budget:
        yield (
            f"max_request_budget {settings.max_request_budget} is below budget {budget}, "
            "which every request may have; raise it, or leave it out."
        )


def _of_order(settings: "Settings") -> Iterator[str]:
    if settings.compaction == "repack":
        return
    needing = [f'method "{settings.method}"'] if settings.method in NEED_ORDER else []
    if settings.score_redundancy:
        needing.append(f"score_redundancy {settings.score_redundancy}")
    for needs in needing:
        yield (
            f'compaction "{settings.compaction}" does not keep the order of tokens, which {needs} '
            'needs; leave compaction at "repack".'
        )


def _of_statistics(settings: "Settings") -> Iterator[str]:
    defaults = {entry.name: entry.default for entry in fields(settings)}
    for name in () if settings.needs_statistics else OF_STATISTICS:
        if vars(settings)[name] != defaults[name]:
            yield (
                f'{name} is set, but method "{settings.method}" uses no statistics; leave it out.'
            )
    if settings.statistics is not None and settings.calibration_text is not None:
        yield (
            "statistics and calibration_text are both set, but a text is only read where "
            "no statistics file is given; leave one of them out."
        )
