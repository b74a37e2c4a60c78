"""What config.json says is read, refused or known to change nothing: no row is passed over without looking."""

import json
from pathlib import Path

import pytest
from checkpoint_rows import ALL, missing_tests, page
from parity import MODELS, RICHEST, torch_model
from test_families import PUBLISHED
from test_families import SIZES as PUBLISHED_SIZES
from transformers import GenerationConfig
from transformers.utils.quantization_config import QuantizationMethod

from rlhf_jax.models import load_hf, load_hf_config, load_hf_reward_model
from rlhf_jax.models.families import FAMILIES
from rlhf_jax.models.rows import PASSED_OVER, QUANTIZED, READ, REFUSED, check_rows, quantized_by, unknown_rows


class Watched(dict):
    """A config.json that remembers which of its rows were looked at."""

    def __init__(self, values):
        super().__init__(values)
        self.seen = set()

    def __getitem__(self, name):
        self.seen.add(name)
        return super().__getitem__(name)

    def get(self, name, default=None):
        self.seen.add(name)
        return super().get(name, default)


@pytest.mark.parametrize("name", MODELS)
def test_a_familys_table_names_the_rows_that_it_looks_at(name):
    family = FAMILIES[MODELS[name][0]]
    written = torch_model(name).config.to_dict()
    fewer = {key: value for key, value in written.items() if key not in ("layer_types", "no_rope_layers")}
    scaled = written | {"rope_parameters": None, "rope_scaling": None}
    seen = set()
    windowed = fewer | {"use_sliding_window": True, "sliding_window": 4, "layer_types": None}
    for given in (written, fewer, scaled, windowed):
        watched = Watched(given)
        family.read(watched)
        seen |= watched.seen
    assert seen <= family.rows, "looked at and not named"
    never = family.rows - seen - {"original_max_position_embeddings"}  # of scaled positions only
    assert name not in RICHEST.values() or not never, "named and not looked at"


def test_no_row_stands_in_two_lists():
    lists = [READ, set(REFUSED), set(PASSED_OVER), set(QUANTIZED)]
    assert len(set().union(*lists)) == sum(map(len, lists))


@pytest.mark.parametrize("name", [*MODELS, *PUBLISHED])
def test_every_row_of_the_supported_models_is_known_and_none_of_them_is_refused(name):
    if name in MODELS:
        given, family = torch_model(name).config.to_dict(), FAMILIES[MODELS[name][0]]
    else:
        sizes = {} if PUBLISHED[name]["model_type"] == "gpt2" else PUBLISHED_SIZES
        given, family = sizes | PUBLISHED[name], FAMILIES[PUBLISHED[name]["model_type"]]
    check_rows(given, family, family.read(given))
    assert unknown_rows(given, family) == []


def test_what_transformers_takes_out_of_config_json_for_sampling_is_known():
    assert set(GenerationConfig._get_default_generation_params()) <= {*PASSED_OVER, *READ}


def test_unknown_rows_are_named():
    given = torch_model(RICHEST["llama"]).config.to_dict()
    assert unknown_rows(given | {"new_trick": 3, "newer": None, "a_trick": False}, FAMILIES["llama"]) == [
        "a_trick",
        "new_trick",
    ]


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    torch_model("llama: linear rope, tied").save_pretrained(folder)
    return folder


@pytest.fixture
def changed(llama, tmp_path):
    """changed(**rows) -> a folder with another config.json, and without weights: what is refused is so before them."""

    def change(**rows):
        values = json.loads((llama / "config.json").read_text()) | rows
        (tmp_path / "config.json").write_text(json.dumps(values))
        return tmp_path

    return change


VALUES = {"position_embedding_type": "alibi", "is_causal": False, "causal": False, "scale_attn_weights": False}
USUAL = {
    "sliding_window": 64, "layer_types": ["full_attention"] * 2, "no_rope_layers": [1, 1], "head_dim": 8,
    "num_key_value_heads": 2, "is_causal": True, "position_embedding_type": "rope", "attn_logit_softcapping": None,
    "num_local_experts": 1, "logit_scale": 1.0, "use_qk_norm": False, "alibi": False, "pruned_heads": {},
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(set(REFUSED) - FAMILIES["llama"].rows))
def test_rows_that_change_the_arithmetic_are_refused_by_name(changed, name):
    value = VALUES.get(name, {"a": 1} if name.endswith("_config") else True)
    with pytest.raises(ValueError, match=rf"config.json: {name} .* is not supported in a llama: {REFUSED[name].why}"):
        load_hf(changed(**{name: value}))
    with pytest.raises(ValueError, match=name):
        load_hf_reward_model(changed(**{name: value}))


@pytest.mark.parametrize("name", USUAL)
def test_rows_that_say_what_is_so_anyway_are_not_refused(changed, name):
    assert load_hf_config(changed(**{name: USUAL[name]})).n_layers == 2


@pytest.mark.parametrize(
    "rows, words",
    [
        ({"sliding_window": 4}, "sliding_window 4"),
        ({"layer_types": ["sliding_attention", "full_attention"]}, "layer_types"),
        ({"num_experts": 8}, "num_experts 8"),
        ({"logit_scale": 0.0625}, "logit_scale 0.0625"),
        ({"final_logit_softcapping": 1.0}, "final_logit_softcapping 1.0"),
        ({"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]}}, "mrope_section"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "full_attention"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "rope scaling 'yarn'"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rope scaling 'dynamic'"),
        ({"rope_parameters": {"rope_type": "linear", "factor": "2"}}, "factor must be a number, not '2'"),
        ({"rope_parameters": {"rope_theta": "1e4"}}, "rope_theta must be a number, not '1e4'"),
        ({"rms_norm_eps": None}, "rms_norm_eps must be a number, not None"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps must be a number"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings must be true or false, not 'false'"),
        ({"attention_bias": 1}, "attention_bias must be true or false"),
        ({"num_hidden_layers": True}, "num_hidden_layers must be a whole number"),
        ({"vocab_size": 64.0}, "vocab_size must be a whole number"),
        ({"model_type": ["llama"]}, r"model_type \['llama'\] is not supported"),
        ({"model_type": "qwen2", "layer_types": ["sliding_attention"] * 2}, "layer_types has sliding_attention"),
        ({"model_type": "gemma3_text", "head_dim": 8, "rope_parameters": {"rope_theta": 9.0}}, "with rope_theta"),
    ],
)
def test_what_cannot_be_read_is_one_line_with_the_row(changed, rows, words):
    with pytest.raises(ValueError, match=words) as error:
        load_hf(changed(**rows))
    assert "\n" not in str(error.value) and "config.json" in str(error.value)


@pytest.mark.parametrize("method", sorted(method.value for method in QuantizationMethod))
def test_quantised_checkpoints_are_refused_by_the_methods_name(changed, method):
    with pytest.raises(ValueError, match=f"quantised by {method}: not supported"):
        load_hf(changed(quantization_config={"quant_method": method, "bits": 4}))
    with pytest.raises(ValueError, match=f"quantised by {method}: not supported"):
        load_hf_reward_model(changed(quantization_config={"quant_method": method, "bits": 4}))


@pytest.mark.parametrize(
    "rows, method",
    [
        ({"quantization_config": {"load_in_4bit": True}}, "bitsandbytes"),
        ({"quantization_config": {"load_in_8bit": True}}, "bitsandbytes"),
        ({"quantization_config": {"bits": 3}}, "quantization_config"),
        ({"quantization_config": "int4"}, "quantization_config"),
        ({"compression_config": {"quant_method": "compressed-tensors"}}, "compressed-tensors"),
        ({"quantization": {"group_size": 64, "bits": 4}}, "mlx"),
        ({"quantization_config": {"quant_algo": "NVFP4"}}, "NVFP4"),
    ],
)
def test_quantised_checkpoints_of_older_forms(changed, rows, method):
    with pytest.raises(ValueError, match=f"quantised by {method}: not supported"):
        load_hf(changed(**rows))


def test_a_model_that_is_not_quantised_is_none(llama, tmp_path):
    for value in (None, {}):
        assert quantized_by(tmp_path, {"quantization_config": value}) is None


@pytest.mark.parametrize("file, method", [("quantize_config.json", "gptq"), ("quant_config.json", "awq")])
def test_quantised_checkpoints_whose_config_is_beside(changed, tmp_path, file, method):
    folder = changed()
    (folder / file).write_text("{}")
    with pytest.raises(ValueError, match=f"quantised by {method}"):
        load_hf(folder)


def test_the_page_of_all_rows_is_that_of_the_code_and_names_tests_that_are_there():
    path = Path(__file__).resolve().parents[2] / "experiments" / "results" / "checkpoint_rows.md"
    assert path.read_text(encoding="utf-8") == page()
    assert missing_tests(page()) == [] and set(ALL) == READ
    assert missing_tests("models/test_config_rows.py::test_nothing of it") == [
        "models/test_config_rows.py::test_nothing"
    ]
