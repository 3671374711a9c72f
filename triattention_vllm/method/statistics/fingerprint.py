"""Which model a set of statistics belongs to."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from reprlib import Repr

from triattention_vllm.errors import StatisticsError

_NUM_LISTED = 8

_REPR = Repr()
_REPR.maxlist = _NUM_LISTED
_REPR.maxstring = _REPR.maxother = 64


@dataclass(frozen=True)
class Fingerprint:
    """A model as the method sees it: the whole model, the same on every parallel rank.

    architecture: the model class that its configuration names, such as ``Qwen3ForCausalLM``.
    layer_indices: decoder layer index of each attention layer that has statistics, ascending
        (a hybrid model lists its full-attention layers only).
    rotary_dims: rotated dims of each of these layers; 0 for a NoPE layer.
    inv_freq_hash: ``Rotary.inv_freq_hash()``. weights_hash: a hash of some of the weights.

    None in a field means not known (files of the public reference): it is not compared.
    """

    architecture: str | None
    layer_indices: tuple[int, ...]
    num_heads: int
    num_kv_heads: int | None
    head_dim: int
    rotary_dims: tuple[int, ...]
    interleaved: bool
    inv_freq_hash: str | None
    weights_hash: str | None

    def __post_init__(self) -> None:
        indices = self.layer_indices
        if not indices or list(indices) != sorted(set(indices)) or indices[0] < 0:
            raise StatisticsError(
                f"layer indices are {shown(list(indices))}; they must be ascending, each once, at "
                "least one: list the decoder layer index of every attention layer"
            )
        if len(self.rotary_dims) != len(indices):
            raise StatisticsError(
                f"{len(self.rotary_dims)} rotary dims for {len(indices)} layers; "
                "there must be one per layer"
            )
        if len(set(self.rotary_dims) - {0}) > 1:
            raise StatisticsError(
                f"rotary dims are {shown(sorted(set(self.rotary_dims)))}; layers must agree (or "
                "be 0)"
            )
        if self.num_heads < 1 or self.head_dim < 1 or not self._rotary_dims_fit():
            raise StatisticsError(
                f"num_heads {self.num_heads}, head_dim {self.head_dim} and rotary dims "
                f"{shown(sorted(set(self.rotary_dims)))} describe no model: counts must be "
                "positive and rotary dims even, at most head_dim"
            )
        if self.num_kv_heads is not None and (
            self.num_kv_heads < 1 or self.num_heads % self.num_kv_heads
        ):
            raise StatisticsError(
                f"{self.num_heads} query heads cannot be grouped over {self.num_kv_heads} KV "
                "heads; the first must be a multiple of the second"
            )

    def _rotary_dims_fit(self) -> bool:
        return all(dim % 2 == 0 and 0 <= dim <= self.head_dim for dim in self.rotary_dims)

    @property
    def num_layers(self) -> int:
        """``L``."""
        return len(self.layer_indices)

    @property
    def num_frequencies(self) -> int:
        """``F``."""
        return max(self.rotary_dims) // 2

    def mismatches(self, running: "Fingerprint") -> list[str]:
        """One sentence, naming both sides, per field that differs; empty when both fit.

        ``self`` is the side of the file, ``running`` the model that is being served.
        """
        sentences = []
        if self.layer_indices != running.layer_indices:
            sentences.append(_layers_sentence(self.layer_indices, running.layer_indices))
        for field in fields(self):
            mine: object = getattr(self, field.name)
            theirs: object = getattr(running, field.name)
            if field.name == "layer_indices" or mine is None or theirs is None:
                continue
            if field.name == "rotary_dims" and self.layer_indices != running.layer_indices:
                mine, theirs = set(self.rotary_dims), set(running.rotary_dims)
            if mine != theirs:
                sentences.append(
                    f"{field.name}: the file has {_short(mine)}, "
                    f"the running model has {_short(theirs)}"
                )
        return sentences

    def to_json(self) -> str:
        """A JSON object with one member per field."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Fingerprint":
        """The inverse of to_json. Raises StatisticsError where fields or types differ."""
        try:
            members = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise StatisticsError(f"the model fingerprint is not JSON ({error})") from error
        names = [field.name for field in fields(cls)]
        if not isinstance(members, dict) or sorted(members) != sorted(names):
            is_object = isinstance(members, dict)
            found = shown(sorted(members)) if is_object else type(members).__name__
            raise StatisticsError(
                f"the model fingerprint has members {found}; it must have {sorted(names)}"
            )
        for field in fields(cls):
            value = members[field.name]
            allowed, fits = _IN_JSON[field.type]
            if not fits(value):
                raise StatisticsError(
                    f"fingerprint member {field.name} is {shown(value)}; it must be {allowed}"
                )
            if isinstance(value, list):
                members[field.name] = tuple(value)
        return cls(**members)


def shown(value: object) -> str:
    """A foreign file's own words as an error message repeats them: shortly."""
    return _REPR.repr(value)


def _layers_sentence(mine: tuple[int, ...], theirs: tuple[int, ...]) -> str:
    sentence = f"layers: the file has {len(mine)}, the running model has {len(theirs)}"
    missing = [idx for idx in theirs if idx not in set(mine)]
    extra = [idx for idx in mine if idx not in set(theirs)]
    if missing:
        sentence += f"; missing from the file: {_short(missing)}"
    if extra:
        sentence += f"; not in the running model: {_short(extra)}"
    return sentence


def _short(value: object) -> str:
    """The value as an error message shows it; long lists are cut."""
    if not isinstance(value, (tuple, list, set)):
        return shown(value)
    items = [str(item) for item in (sorted(value) if isinstance(value, set) else value)]
    if len(items) > _NUM_LISTED:
        return f"[{', '.join(items[:_NUM_LISTED])}, ... {len(items)} in all]"
    return f"[{', '.join(items)}]"


def _is_integer(value: object) -> bool:
    return type(value) is int  # which true and false are not


def _are_integers(value: object) -> bool:
    return isinstance(value, list) and all(map(_is_integer, value))


_IN_JSON: dict[object, tuple[str, Callable[[object], bool]]] = {
    int: ("an integer", _is_integer),
    int | None: ("an integer or null", lambda value: value is None or _is_integer(value)),
    tuple[int, ...]: ("a list of integers", _are_integers),
    bool: ("true or false", lambda value: isinstance(value, bool)),
    str | None: ("a string or null", lambda value: value is None or isinstance(value, str)),
}
"""Type of a field -> what its member in JSON must be, and whether a value is that."""
