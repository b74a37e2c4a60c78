"""The lines that tables of config.json are made of: each reads some fields of ModelConfig, and writes them."""

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.rope import LinearScaling, Llama3Scaling, LongRope, RopeScaling

Json = dict[str, Any]


class Entry(NamedTuple):
    """A line of a config's table: some fields of ModelConfig from config.json, and back."""

    rows: tuple[str, ...]
    """The rows of config.json that `read` looks at."""
    read: Callable[[Json], Json]
    write: Callable[[ModelConfig], Json] = lambda config: {}


def size(ours: str, theirs: str, default: Callable[[Json], int] | None = None) -> Entry:
    """A whole number of at least 1; its `read` raises ValueError for any other, and for none without a `default`."""

    def read(hf: Json) -> Json:
        value = hf.get(theirs)
        if value is None and default is not None:
            value = default(hf)
        if value is None:
            raise ValueError(f"{theirs} is missing")
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{theirs} must be a whole number of at least 1, not {value!r}")
        return {ours: value}

    return Entry((theirs,), read, lambda config: {theirs: getattr(config, ours)})


def number(ours: str, theirs: str, default: float | None) -> Entry:
    """A float, or None where that has a meaning: not for an epsilon. Raises ValueError for what is no number."""

    def read(hf: Json) -> Json:
        value = hf.get(theirs, default)
        if value is None and not theirs.endswith(("_eps", "_epsilon")):
            return {ours: None}
        return {ours: real(theirs, value)}

    return Entry((theirs,), read, lambda config: {theirs: getattr(config, ours)})


def real(name: str, value: Any) -> float:
    """A row's number. Raises ValueError for what is none."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{name} must be a number, not {value!r}")
    return float(value)


def flag(theirs: str, default: bool, *ours: str) -> Entry:
    """A truth value, which is that of each field in `ours`. Its `read` raises ValueError for what is none."""

    def read(hf: Json) -> Json:
        value = hf.get(theirs, default)
        if not isinstance(value, bool):
            raise ValueError(f"{theirs} must be true or false, not {value!r}")
        return dict.fromkeys(ours, value)

    return Entry((theirs,), read, lambda config: {theirs: getattr(config, ours[0])})


def fixed(**values: Any) -> Entry:
    """Fields that have one value in all models of a family, and that no config.json names."""
    return Entry((), lambda hf: values)


def only(theirs: str, value: Any) -> Entry:
    """A field that may have one value."""

    def read(hf: Json) -> Json:
        if hf.get(theirs, value) not in (value, None):
            raise ValueError(f"{theirs} {hf[theirs]!r} is not supported, only {value!r}")
        return {}

    return Entry((theirs,), read, lambda config: {theirs: value})


ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}


def activation(theirs: str, default: str) -> Entry:
    """The activation, by the name that transformers has for it; its `read` raises ValueError for an unknown one."""

    def read(hf: Json) -> Json:
        name = hf.get(theirs) or default
        if name not in ACTIVATIONS:
            raise ValueError(f"{theirs} {name!r} is not supported, only {', '.join(ACTIVATIONS)}")
        return {"activation": ACTIVATIONS[name]}

    def write(config: ModelConfig) -> Json:
        names = [default, "silu", "gelu", "gelu_pytorch_tanh"]
        return {theirs: next(name for name in names if ACTIVATIONS[name] == config.activation)}

    return Entry((theirs,), read, write)


def query_scale() -> Entry:
    """The factor of q·k, which Gemma gives as the width that it is 1/√ of."""
    return Entry(
        ("query_pre_attn_scalar",),
        lambda hf: {"attention_scale": real("query_pre_attn_scalar", hf.get("query_pre_attn_scalar", 256)) ** -0.5},
        lambda config: {"query_pre_attn_scalar": round((config.attention_scale or config.head_dim**-0.5) ** -2)},
    )


def embedding_scale() -> Entry:
    """Embeddings times √d_model, as in Gemma."""
    return Entry(("hidden_size",), lambda hf: {"embedding_scale": math.sqrt(hf["hidden_size"])})


def read_scaling(rope: Json, hf: Json) -> RopeScaling | None:
    """The scaling of rotary positions that config.json asks for; None for none.

    Raises ValueError for a kind that is not known, and where a number is missing.
    """
    kind = rope.get("rope_type") or rope.get("type") or "default"
    original = hf.get("original_max_position_embeddings") or rope.get("original_max_position_embeddings")
    original = int(original or hf.get("max_position_embeddings") or 0)
    try:
        if kind == "default":
            return None
        if kind == "linear":
            return LinearScaling(real("factor", rope["factor"]))
        if kind == "llama3":
            factor, low, high = (real(n, rope[n]) for n in ("factor", "low_freq_factor", "high_freq_factor"))
            return Llama3Scaling(factor, low, high, original)
        if kind == "longrope":
            factor = rope.get("factor") or hf["max_position_embeddings"] / original
            usual = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
            short, long = ([float(f) for f in rope[f"{length}_factor"]] for length in ("short", "long"))
            return LongRope(tuple(short), tuple(long), float(rope.get("attention_factor") or usual), original)
    except KeyError as error:
        raise ValueError(f"rope scaling {kind!r} lacks {error.args[0]}") from None
    raise ValueError(f"rope scaling {kind!r} is not supported, only default, linear, llama3 and longrope")


def write_scaling(scaling: RopeScaling | None) -> Json:
    """The fields that `read_scaling` reads."""
    match scaling:
        case None:
            return {"rope_type": "default"}
        case LinearScaling(factor):
            return {"rope_type": "linear", "factor": factor}
        case Llama3Scaling(factor, low, high, length):
            bounds = {"low_freq_factor": low, "high_freq_factor": high, "original_max_position_embeddings": length}
            return {"rope_type": "llama3", "factor": factor, **bounds}
        case LongRope(short, long, magnitude, length):
            factors = {"short_factor": list(short), "long_factor": list(long), "attention_factor": magnitude}
            return {"rope_type": "longrope", "original_max_position_embeddings": length, **factors}


ROPE_ROWS = ("rope_parameters", "rope_scaling", "original_max_position_embeddings")
IN_ROPE = {
    "rope_type", "type", "rope_theta", "factor", "low_freq_factor", "high_freq_factor", "short_factor", "long_factor",
    "original_max_position_embeddings", "attention_factor", "partial_rotary_factor", "short_mscale", "long_mscale",
}  # fmt: skip
"""Fields of rope parameters that are read, or that transformers passes over (the mscales)."""


def rope_dict(value: Any, known: Iterable[str] = IN_ROPE) -> Json:
    """A copy of the rope parameters in config.json; empty for None.

    Raises ValueError for anything but an object, and for a field that is not `known` here.
    """
    if not isinstance(value or {}, dict):
        raise ValueError(f"rope scaling {value!r} is not supported")
    found = {name: field for name, field in (value or {}).items() if field is not None}
    if unknown := sorted(found.keys() - set(known)):
        raise ValueError(f"rope scaling with {', '.join(unknown)} is not supported")
    return found


def rope(
    theta: float,
    *,
    theta_name: str = "rope_theta",
    part: tuple[str, float] | None = None,
    longrope_names: tuple[str, ...] = (),
) -> Entry:
    """Rotary positions: theta, scaling, and the share of a head that turns.

    `part` is config.json's name of that share, and its default; None for a family whose heads turn whole.
    """

    def read(hf: Json) -> Json:
        given = rope_dict(hf.get("rope_scaling") or hf.get("rope_parameters"))
        part_name, fraction = part or ("partial_rotary_factor", 1.0)
        fraction = real(part_name, given.get("partial_rotary_factor") or hf.get(part_name) or fraction)
        if part is None and fraction != 1:
            raise ValueError(f"{part_name} {fraction} is not supported")
        if given.get("rope_type", given.get("type")) in longrope_names:
            given["rope_type"] = "longrope"
        return {
            "rope_theta": real(theta_name, given.get("rope_theta") or hf.get(theta_name) or theta),
            "rotary_fraction": fraction,
            "rope_scaling": read_scaling(given, hf),
        }

    def write(config: ModelConfig) -> Json:
        parameters = {"rope_theta": config.rope_theta, **write_scaling(config.rope_scaling)}
        written: Json = {"rope_parameters": parameters, theta_name: config.rope_theta}
        if part is not None:
            written[part[0]] = parameters["partial_rotary_factor"] = config.rotary_fraction
        if isinstance(config.rope_scaling, LongRope):
            written["original_max_position_embeddings"] = config.rope_scaling.original_length
        return written

    rows = (theta_name, (part or ("partial_rotary_factor",))[0], *ROPE_ROWS)
    return Entry(rows, read, write)


def two_ropes() -> Entry:
    """Layers with a window turn by an own theta, and are never scaled."""

    def read(hf: Json) -> Json:
        given = rope_dict(hf.get("rope_parameters"), ("full_attention", "sliding_attention"))
        whole = rope_dict(given.get("full_attention")) | rope_dict(hf.get("rope_scaling"))
        local = rope_dict(given.get("sliding_attention"))
        if read_scaling(local, hf) is not None:
            raise ValueError(f"rope scaling {local} of layers with a window is not supported")
        return {
            "rope_theta": real("rope_theta", whole.get("rope_theta") or hf.get("rope_theta") or 1_000_000.0),
            "local_rope_theta": real(
                "rope_local_base_freq", local.get("rope_theta") or hf.get("rope_local_base_freq") or 10_000.0
            ),
            "rope_scaling": read_scaling(whole, hf),
        }

    def write(config: ModelConfig) -> Json:
        whole = {"rope_theta": config.rope_theta, **write_scaling(config.rope_scaling)}
        local = {"rope_theta": config.local_rope_theta, "rope_type": "default"}
        return {"rope_parameters": {"full_attention": whole, "sliding_attention": local}}

    return Entry(("rope_theta", "rope_local_base_freq", *ROPE_ROWS), read, write)


def one_window(usual: int | None) -> Entry:
    """The same for every layer, or none; `usual` where config.json is silent."""

    def read(hf: Json) -> Json:
        window = hf.get("sliding_window", usual)
        return {"windows": (window,) * hf["num_hidden_layers"] if window else ()}

    return Entry(
        ("sliding_window",), read, lambda config: {"sliding_window": config.windows[0] if config.windows else None}
    )


def some_windows(
    has_window: Callable[[Json, int], bool], *rows: str, switch: str | None = None, usual: int | None = 4096
) -> Entry:
    """One size for those layers that `layer_types`, or else `has_window`, names; `switch` turns all on.

    `rows` are those that `has_window` looks at.
    """

    def read(hf: Json) -> Json:
        if switch is not None and not hf.get(switch, False):
            return {"windows": ()}
        kinds = hf.get("layer_types") or [
            "sliding_attention" if has_window(hf, i) else "full_attention" for i in range(hf["num_hidden_layers"])
        ]
        if other := set(kinds) - {"sliding_attention", "full_attention"}:
            raise ValueError(f"layer_types {sorted(other)} are not supported")
        window = hf.get("sliding_window", usual)
        windows = tuple(window if kind == "sliding_attention" else None for kind in kinds)
        return {"windows": windows if any(windows) else ()}

    def write(config: ModelConfig) -> Json:
        windows = config.windows or (None,) * config.n_layers
        kinds = ["full_attention" if window is None else "sliding_attention" for window in windows]
        size = next((window for window in windows if window is not None), None if switch else 4096)
        return {"layer_types": kinds, "sliding_window": size} | ({switch: any(windows)} if switch else {})

    return Entry(("layer_types", "sliding_window", *([switch] if switch else []), *rows), read, write)


def rope_layers(hf: Json) -> list[int]:
    """1 for each layer that has positions, 0 for each that has none."""
    every = hf.get("no_rope_layer_interval") or 4
    return hf.get("no_rope_layers") or [int((i + 1) % every != 0) for i in range(hf["num_hidden_layers"])]


def no_positions() -> Entry:
    """The layers without positions (SmolLM3)."""
    return Entry(
        ("no_rope_layers", "no_rope_layer_interval"),
        lambda hf: {"nope_layers": tuple(i for i, turns in enumerate(rope_layers(hf)) if not turns)},
        lambda config: {"no_rope_layers": [int(i not in config.nope_layers) for i in range(config.n_layers)]},
    )
