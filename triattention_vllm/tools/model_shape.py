"""What a model's configuration says about memory: its layers, and its parameters by pipeline stage.

The configuration is read by transformers, whose classes know the defaults of each model type, and
the parameters are counted on the model that transformers builds from it without any memory.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from triattention_vllm.errors import UnsupportedError

ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_FULL, _LINEAR = "full_attention", "linear_attention"
_WINDOW_FIELDS = {
    "sliding_attention": "sliding_window",
    "chunked_attention": "attention_chunk_size",
}
_LINEAR_FIELDS = (
    "linear_num_key_heads",
    "linear_num_value_heads",
    "linear_key_head_dim",
    "linear_value_head_dim",
    "linear_conv_kernel_dim",
)
_NOT_COUNTED = {
    "kv_lora_rank": "multi-head latent attention",
    "layers_block_type": "recurrent layers",
    "mamba_d_state": "state-space layers",
    "is_encoder_decoder": "an encoder",
}
_LAYER_IN_NAME = re.compile(r"\.(?:layers|h)\.(\d+)\.")


@dataclass(frozen=True)
class Parameters:
    """Parameters of one part of a model. linear: in the matrices that checkpoints quantise (linear
    layers, not the output head). experts: in the experts of MoE layers. other: all else."""

    linear: int = 0
    experts: int = 0
    other: int = 0

    @property
    def total(self) -> int:
        """All of them."""
        return self.linear + self.experts + self.other

    def __add__(self, more: "Parameters") -> "Parameters":
        return Parameters(
            self.linear + more.linear, self.experts + more.experts, self.other + more.other
        )


@dataclass(frozen=True)
class LinearState:
    """Gated linear attention of one layer: a state of fixed size in the place of keys and values.

    conv_elements, recurrent_elements: numbers in the state of one request, over all heads.
    recurrent_dtype: of the latter, or None for the model's own.
    """

    conv_elements: int
    recurrent_elements: int
    recurrent_dtype: str | None


@dataclass(frozen=True)
class ModelShape:
    """A decoder as the block pool sees it.

    windows: one entry per layer: None for full attention, the window or chunk in tokens, or the
    LinearState. layer_parameters: one entry per layer. embedding: what the first pipeline stage
    holds on top; head: what the last one does; tied_head: numbers in an output head that is the
    embedding itself, of which a last stage of its own holds a copy. dtype, quantisation: what the
    configuration says about the weights, or None.
    """

    name: str
    windows: tuple[int | LinearState | None, ...]
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    layer_parameters: tuple[Parameters, ...]
    embedding: Parameters
    head: Parameters
    tied_head: int
    dtype: str | None
    quantisation: str | None

    @property
    def num_layers(self) -> int:
        """Decoder layers."""
        return len(self.windows)

    @property
    def num_full_layers(self) -> int:
        """Layers whose cache compression bounds."""
        return sum(window is None for window in self.windows)

    @property
    def num_parameters(self) -> int:
        """Of the whole model; tied embeddings count once."""
        return sum(self.layer_parameters, self.embedding + self.head).total


def read_model(source: str) -> ModelShape:
    """The shape of the model that ``source`` describes: a config.json, a folder with one, or a
    name that transformers can resolve.

    Raises UnsupportedError, naming ``source``, where it is none of these or lacks a field.
    """
    config = read_config(source)
    text = config.get_text_config()
    _refuse_not_counted(source, text)
    num_layers = _number(source, text, "num_hidden_layers")
    windows = _windows(source, text, num_layers)
    if None not in windows:
        raise UnsupportedError(
            f"{source}: the model has no full-attention layer, so there is nothing to compress."
        )
    model = _empty_model(source, config)
    layers, first, last = _count_parameters(model, num_layers)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    is_tied = head is not None and head.weight is embedding.weight
    quantisation = _field(config, "quantization_config") or {}
    return ModelShape(
        name=(config.architectures or [config.model_type])[0],
        windows=windows,
        num_kv_heads=_number(source, text, "num_key_value_heads"),
        head_dim=_head_dim(source, text),
        max_position_embeddings=_number(source, text, "max_position_embeddings"),
        layer_parameters=tuple(layers),
        embedding=first,
        head=last,
        tied_head=embedding.weight.numel() if is_tied else 0,
        dtype=None if config.dtype is None else str(config.dtype).removeprefix("torch."),
        quantisation=quantisation.get("quant_method"),
    )


def weight_files_bytes(source: str) -> int:
    """Bytes of the safetensors files beside the configuration; 0 where there are none."""
    folder = Path(source) if Path(source).is_dir() else Path(source).parent
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def stages(num_layers: int, num_stages: int) -> list[range]:
    """Layers of each pipeline stage, as vLLM's ``get_pp_indices`` deals them out: evenly, what
    remains to the stages before the last.

    Raises UnsupportedError where there are more stages than layers.
    """
    if num_stages > num_layers:
        raise UnsupportedError(
            f"{num_stages} pipeline stages for {num_layers} layers; use at most {num_layers}."
        )
    sizes = [num_layers // num_stages] * num_stages
    for stage_idx in range(2, num_layers % num_stages + 2):
        sizes[-stage_idx] += 1
    starts = [sum(sizes[:stage_idx]) for stage_idx in range(num_stages)]
    return [range(start, start + size) for start, size in zip(starts, sizes, strict=True)]


def read_config(source: str) -> Any:
    """transformers' configuration object; fetched from the model hub where ``source`` is a name
    that no cache knows. Code that a model brings along is not run."""
    from transformers import AutoConfig

    path = Path(source)
    looks_local = path.suffix == ".json" or source.startswith((".", "/", "~")) or path.is_dir()
    if looks_local and not path.exists():
        raise UnsupportedError(
            f"{source} does not exist; give a config.json, a model folder, or a model's name."
        )
    if path.is_dir() and not (path / "config.json").is_file():
        raise UnsupportedError(f"The folder {source} has no config.json; give a model's folder.")
    try:
        return AutoConfig.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UnsupportedError(
            f"{source} is not a model that transformers can read ({reason}); give a config.json "
            "with a model_type, a model folder, or a model's name."
        ) from error


def _refuse_not_counted(source: str, text: Any) -> None:
    """Raise UnsupportedError for layers that are not counted here."""
    found = [
        f"{reason} ({field})"
        for field, reason in _NOT_COUNTED.items()
        if _field(text, field) not in (None, False)
    ]
    # transformers 5.19 and later: layers with fields of their own, such as Gemma 4's head dims.
    if _field(text, "is_heterogeneous"):
        found.append("layers whose shapes differ from each other")
    if found:
        raise UnsupportedError(
            f"{source}: the model has {'; '.join(found)}; plan counts models of full, "
            "sliding-window, chunked and gated linear attention with heads of one size."
        )


def _field(config: Any, name: str) -> Any:
    """A field of the configuration, or None where it has none of that name: the classes of models
    differ in which fields they have. Their ``attribute_map`` knows older spellings."""
    return getattr(config, name) if hasattr(config, name) else None


def _number(source: str, text: Any, field: str) -> int:
    """A positive whole number of the configuration."""
    value = _field(text, field)
    if type(value) is not int or value < 1:
        raise UnsupportedError(
            f"{source}: {field} is {value!r} in the configuration of {type(text).__name__}; it "
            "must be a positive whole number: add it to a copy of the file and plan that."
        )
    return value


def _head_dim(source: str, text: Any) -> int:
    if _field(text, "head_dim") is not None:
        return _number(source, text, "head_dim")
    hidden = _number(source, text, "hidden_size")
    return hidden // _number(source, text, "num_attention_heads")


def _windows(source: str, text: Any, num_layers: int) -> tuple[int | LinearState | None, ...]:
    """What each layer caches; ``layer_types`` says so, or one window for all layers."""
    default = _FULL if _field(text, "sliding_window") is None else "sliding_attention"
    types: Sequence[str] | None = _field(text, "layer_types")
    kinds = [default] * num_layers if types is None else types
    known: dict[str, int | LinearState | None] = {_FULL: None}
    for kind in sorted(set(kinds) - {_FULL}):
        if kind in _WINDOW_FIELDS:
            known[kind] = _number(source, text, _WINDOW_FIELDS[kind])
        elif kind == _LINEAR and all(_field(text, name) is not None for name in _LINEAR_FIELDS):
            known[kind] = _linear_state(source, text)
        else:
            raise UnsupportedError(
                f"{source}: layers of type {kind!r} are not counted here; plan counts "
                f"{', '.join([_FULL, *_WINDOW_FIELDS, _LINEAR])} with fields {_LINEAR_FIELDS[0]} "
                "and so on."
            )
    return tuple(known[kind] for kind in kinds)


def _linear_state(source: str, text: Any) -> LinearState:
    """A gated delta net: the last ``kernel - 1`` inputs of its convolution, and per value head
    a matrix (vLLM: ``MambaStateShapeCalculator.gated_delta_net_state_shape``)."""
    key_heads, value_heads, key_dim, value_dim, kernel = (
        _number(source, text, field) for field in _LINEAR_FIELDS
    )
    return LinearState(
        conv_elements=(2 * key_heads * key_dim + value_heads * value_dim) * (kernel - 1),
        recurrent_elements=value_heads * value_dim * key_dim,
        recurrent_dtype=_field(text, "mamba_ssm_dtype"),
    )


def _count_parameters(
    model: Any, num_layers: int
) -> tuple[list[Parameters], Parameters, Parameters]:
    """Parameters of every layer, of the first stage's extra and of the last stage's.

    What lies outside the decoder layers (embedding, a vision tower) belongs to the first stage;
    output head and final norm to the last.
    """
    import torch

    layers = [Parameters() for _ in range(num_layers)]
    first = last = Parameters()
    modules = model.named_modules()
    linear = {f"{name}.weight" for name, part in modules if isinstance(part, torch.nn.Linear)}
    for name, parameter in model.named_parameters():
        found = None if "vision" in name else _LAYER_IN_NAME.search(name)
        size = parameter.numel()
        if found is not None and ".experts." in name:
            layers[int(found[1])] += Parameters(experts=size)
        elif found is not None and name in linear:
            layers[int(found[1])] += Parameters(linear=size)
        elif found is not None:
            layers[int(found[1])] += Parameters(other=size)
        elif name.startswith("lm_head") or name.endswith("model.norm.weight"):
            last += Parameters(other=size)
        else:
            first += Parameters(other=size)
    return layers, first, last


def _empty_model(source: str, config: Any) -> Any:
    """The model on torch's meta device: shapes without memory."""
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    auto_classes: tuple[Any, ...] = (AutoModelForCausalLM, AutoModelForImageTextToText)
    for auto_class in auto_classes:
        if type(config) in auto_class._model_mapping:
            try:
                with torch.device("meta"):
                    return auto_class.from_config(config)
            except ImportError as error:
                reason = str(error).strip().splitlines()[0]
                raise UnsupportedError(
                    f"{source}: the model cannot be built to count its parameters ({reason}); "
                    "install what it asks for."
                ) from error
    raise UnsupportedError(
        f"{source}: transformers has no text-generating model for {type(config).__name__}; plan "
        "counts models that generate text."
    )
