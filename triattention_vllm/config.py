"""The settings: every name, default, unit and range, described once."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import NoneType
from typing import Any, Literal, Self, cast, get_args

from triattention_vllm.contradictions import contradictions
from triattention_vllm.description import Description
from triattention_vllm.errors import SettingsError
from triattention_vllm.method.policy import Policy, Protect, Window
from triattention_vllm.method.pressure import Pressure
from triattention_vllm.score_settings import (
    LAYERS,
    NORM_TERM,
    NORMALISE,
    OFFSETS,
    PRESET,
    PRESETS,
    PROTECT_VALUES,
    REDUNDANCY,
    USUAL_REDUNDANCY,
    LayersTogether,
    Normalise,
    NormTerm,
    Preset,
)

OFF = "off"
ADDITIONAL_CONFIG_KEY = "kv_compression"
ENVIRONMENT_PREFIX = "TRIATTENTION_"

Method = Literal[
    "triattention",
    "streamingllm",
    "knorm",
    "vnorm",
    "random",
    "snapkv",
    "rkv",
    "h2o",
    "tova",
]
# As in the kernels, whose import costs torch: a test holds the two together.
Selection = Literal["per_head", "per_layer_per_head", "union"]
Compaction = Literal["repack", "fill_holes"]
When = Literal["always", "pressure"]


def _described(default: Any, description: Description) -> Any:
    """A dataclass field that carries its description."""
    return field(default=default, metadata={"description": description})


@dataclass(frozen=True)
class Settings:
    """Validated settings of KV compression. An object that exists is free of contradictions
    that can be seen without an engine; ``check_engine`` and ``check_files`` see the rest.

    Raises SettingsError with one sentence that says what is allowed.
    """

    method: Method = _described(
        "triattention",
        Description(
            "How cached tokens are scored: by the model's mean queries, by age, by the length of "
            "the key (short ones are kept) or of the value (long ones are kept), at random, or by "
            "the attention of the request's last queries (the last four, slower, for comparisons).",
            (str,),
            choices=get_args(Method),
        ),
    )
    budget: int = _described(
        2048,
        Description(
            "Tokens of a request that stay in the KV cache after a round.",
            (int,),
            unit="tokens",
            minimum=1,
        ),
    )
    interval: int = _described(
        128, Description("New tokens between two rounds.", (int,), unit="tokens", minimum=1)
    )
    window: Window | int = _described(
        "quarter",
        Description(
            "Most recent tokens, which a round never evicts. quarter: of the tokens that a request "
            "keeps, at most half of the budget; or a number.",
            (str, int),
            unit="tokens",
            choices=get_args(Window),
        ),
    )
    protect: Protect | int = _described(
        "prompt",
        Description(
            "First tokens that are never evicted. prompt: the whole prompt if it is at most half "
            "of the budget, else sink_tokens only; all_prompt: the whole prompt, on top of the "
            "budget; sinks: sink_tokens; or a number.",
            (str, int),
            unit="tokens",
            choices=get_args(Protect),
        ),
    )
    sink_tokens: int = _described(
        16, Description("First tokens that are always protected.", (int,), unit="tokens")
    )
    selection: Selection = _described(
        "per_head",
        Description(
            "Which heads keep the same tokens: a KV head in all layers, none, or all heads of all "
            "layers.",
            (str,),
            choices=get_args(Selection),
        ),
    )
    compaction: Compaction = _described(
        "repack",
        Description(
            "How survivors are moved: all in order, or only those behind the kept blocks, into "
            "the holes of the evicted. The second moves far fewer bytes and loses the order, and "
            "with it score_redundancy.",
            (str,),
            choices=get_args(Compaction),
        ),
    )
    score_normalise: Normalise = _described("heads", NORMALISE)
    score_layers: LayersTogether = _described("mean", LAYERS)
    score_norm_term: NormTerm = _described("full", NORM_TERM)
    score_offsets: str = _described("geometric", OFFSETS)
    score_redundancy: int | None = _described(None, REDUNDANCY)
    score_protect_values: int = _described(0, PROTECT_VALUES)
    when: When = _described(
        "always",
        Description(
            "When rounds run: whenever one is due, or only while the block pool is full.",
            (str,),
            choices=get_args(When),
        ),
    )
    pressure_start: int = _described(
        90,
        Description(
            "With when=pressure: rounds begin when more of the block pool than this is needed.",
            (int,),
            unit="percent",
            minimum=1,
            maximum=100,
        ),
    )
    pressure_stop: int = _described(
        80,
        Description(
            "With when=pressure: rounds end when no more of the block pool than this is needed.",
            (int,),
            unit="percent",
            maximum=100,
        ),
    )
    max_request_budget: int | None = _described(
        None,
        Description(
            "Most tokens that a request may keep by its own kv_budget or with kv_compression "
            "off; without one, half of the block pool. The server's own budget is always allowed.",
            (int, NoneType),
            unit="tokens",
            minimum=1,
        ),
    )
    preset: Preset | None = _described(None, PRESET)
    statistics: str | None = _described(
        None,
        Description(
            "Statistics file of the model; without one, the file in the cache folder, which is "
            "made at the first start.",
            (str, NoneType),
        ),
    )
    calibration_text: str | None = _described(
        None,
        Description(
            "Text file for making the statistics; without one, the text that is shipped.",
            (str, NoneType),
        ),
    )
    trace: str | None = _described(
        None,
        Description(
            "File to which rounds are recorded, for `triattention trace`; slows them down.",
            (str, NoneType),
        ),
    )

    def __post_init__(self) -> None:
        for name, description in descriptions().items():
            description.refuse(name, vars(self)[name])
        for sentence in contradictions(self):
            raise SettingsError(sentence)

    @property
    def needs_statistics(self) -> bool:
        """Whether the method scores with statistics of the model's queries."""
        return self.method == "triattention"

    @property
    def redundancy(self) -> int:
        """``score_redundancy`` in percent; where none is given, the usual one if the method is
        ours to change, tokens stay in order and scores have a scale, else 0."""
        if self.score_redundancy is not None:
            return self.score_redundancy
        can_be_had = (
            self.method == "triattention"
            and self.compaction == "repack"
            and self.score_normalise == "heads"
        )
        return USUAL_REDUNDANCY if can_be_had else 0

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, object]) -> Self:
        """Settings from names and values; names that are not given have the preset's value, or
        their default."""
        known = descriptions()
        unknown = sorted(str(name) for name in mapping if name not in known)
        if unknown:
            raise SettingsError(
                f"Unknown setting {', '.join(unknown)}; known are {', '.join(known)}."
            )
        preset = cast(Preset | None, mapping.get("preset"))
        expanded = PRESETS[preset] if preset in get_args(Preset) else {}
        return cls(**cast(dict[str, Any], {**expanded, **mapping}))

    def to_mapping(self) -> dict[str, str | int | None]:
        """All settings as JSON values; ``from_mapping`` gives the same settings back."""
        return asdict(self)

    def policy(self, block_size: int) -> Policy:
        """The rounds that these settings ask for, in blocks of ``block_size`` tokens."""
        return Policy(
            budget=self.budget,
            interval=self.interval,
            window=self.window,
            sink_tokens=self.sink_tokens,
            protect=self.protect,
            block_size=block_size,
        )

    @property
    def min_window(self) -> int:
        """Smallest window of any request without a budget of its own, in tokens."""
        return self.policy(block_size=1).min_window()

    @property
    def pressure(self) -> Pressure | None:
        """The thresholds under which rounds run, or None where they always do."""
        thresholds = Pressure(start=self.pressure_start, stop=self.pressure_stop)
        return thresholds if self.when == "pressure" else None

    def check_engine(self, max_model_len: int, block_size: int) -> None:
        """Raise SettingsError where the settings contradict the engine's lengths, in tokens."""
        if self.budget > max_model_len:
            raise SettingsError(
                f"budget {self.budget} is above max_model_len {max_model_len}, so nothing would "
                f"ever be evicted; set it below {max_model_len} or raise --max-model-len."
            )
        self.check_block_size(block_size)

    def check_block_size(self, block_size: int) -> None:
        """Raise SettingsError where rounds in blocks of ``block_size`` leave no candidate."""
        policy = self.policy(block_size)
        if policy.min_survivors() <= 0:
            raise SettingsError(
                f"budget {self.budget} leaves no candidate beside window {policy.max_window()} "
                f"and up to {policy.max_protected_prefix()} protected tokens "
                f"(protect={self.protect!r}) in blocks of {block_size}; set budget to "
                f"{policy.enough_budget()} or more, or protect fewer tokens."
            )

    def check_files(self) -> None:
        """Raise SettingsError where a file that is named does not exist."""
        for name, path in (
            ("statistics", self.statistics_path),
            ("calibration_text", self.calibration_text_path),
        ):
            if path is not None and not path.is_file():
                raise SettingsError(
                    f"{name} names {path}, which is not a file; give the path of one, or leave "
                    f"{name} out."
                )
        if self.trace_path is not None and not self.trace_path.parent.is_dir():
            raise SettingsError(
                f"trace names {self.trace_path}, whose folder does not exist; make the folder, or "
                "leave trace out."
            )

    @property
    def statistics_path(self) -> Path | None:
        """``statistics`` with ``~`` resolved."""
        return None if self.statistics is None else Path(self.statistics).expanduser()

    @property
    def trace_path(self) -> Path | None:
        """``trace`` with ``~`` resolved."""
        return None if self.trace is None else Path(self.trace).expanduser()

    @property
    def calibration_text_path(self) -> Path | None:
        """``calibration_text`` with ``~`` resolved."""
        text = self.calibration_text
        return None if text is None else Path(text).expanduser()


def descriptions() -> dict[str, Description]:
    """Description of each setting by name, in the order of the class."""
    return {entry.name: entry.metadata["description"] for entry in fields(Settings)}


def environment_name(name: str) -> str:
    """The environment variable of a setting."""
    return f"{ENVIRONMENT_PREFIX}{name.upper()}"
