"""What a saved model says of where it came from, and to whom it says nothing."""

import json

import pytest
import yaml

from rlhf_jax.models.card import ModelCard, card_text, hub_name, license_of


def folder(path, *, name=None, readme=None):
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps({} if name is None else {"_name_or_path": name}))
    if readme is not None:
        (path / "README.md").write_text(readme)
    return path


def head(text):
    return yaml.safe_load(text.split("---")[1])


@pytest.mark.parametrize(
    ("name", "base", "expected"),
    [
        ("owner/model", None, "owner/model"),
        (None, "owner/base", "owner/base"),
        ("/home/someone/model", "owner/base", "owner/base"),
        ("../model", None, None),
        ("./model", None, None),
        ("runs/sft-1/policy", None, None),
        ("here/model", None, None),
        (None, None, None),
    ],
)
def test_the_base_model_is_a_name_or_left_out(tmp_path, monkeypatch, name, base, expected):
    monkeypatch.chdir(tmp_path)
    folder(tmp_path / "here" / "model")
    readme = None if base is None else f'---\nbase_model: "{base}"\nlicense: mit\n---\n\nText.\n'
    path = folder(tmp_path / "secret", name=name, readme=readme)
    assert hub_name(path) == expected
    for given in (str(path), "secret"):
        text = card_text("LlamaForCausalLM", 10, ModelCard("SFT", base_model=given))
        assert head(text).get("base_model") == expected
        assert "secret" not in text and str(tmp_path) not in text and "someone" not in text


def test_a_name_on_the_hub_is_one_and_a_folder_that_is_gone_is_none():
    assert hub_name("owner/model-1.5") == "owner/model-1.5"
    assert hub_name("/gone/model") is None and hub_name("~/gone") is None and hub_name(None) is None


@pytest.mark.parametrize(
    ("readme", "expected"),
    [
        ("---\nlanguage: en\nlicense: apache-2.0\n---\ntext", "apache-2.0"),
        ("---\r\nlicense: 'mit'\r\n---\r\n", "mit"),
        ("license: mit", None),
        ("---\ntags:\n- a\n---\nlicense: mit", None),
        (None, None),
    ],
)
def test_the_licence_is_that_of_the_base(tmp_path, readme, expected):
    path = tmp_path / "model"
    folder(path)
    if readme is not None:
        (path / "README.md").write_bytes(readme.encode())
    assert license_of(path) == expected
    assert head(card_text("X", 1, ModelCard(base_model=str(path)))).get("license") == expected


def test_a_card_says_what_it_is_given_and_nothing_else():
    facts = {"Commit": "c0ffee", "Versions": "jax 0.10", "Devices": ""}
    card = ModelCard("DPO, β = 0.1", "pairs.jsonl", "some/base", {"accuracy": 0.71}, facts)
    text = card_text("LlamaForCausalLM", 1234, card)
    assert head(text) == {"library_name": "transformers", "base_model": "some/base"}
    for words in (
        "1,234 parameters",
        "Algorithm: DPO, β = 0.1",
        "Commit: c0ffee",
        "Versions: jax 0.10",
        "| accuracy | 0.71 |",
    ):
        assert words in text
    assert "Devices" not in text
    assert card_text("X", 1, ModelCard()).count(":") == 1
