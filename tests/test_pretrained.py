"""Folders as people have them: what ends an answer, ids that the model lacks, tokenizers that cannot be read."""

import builtins
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file
from transformers import AutoTokenizer

from rlhf_jax import pretrained
from rlhf_jax.adapters import split_trainable
from rlhf_jax.batches import Completions
from rlhf_jax.data.encode import encode
from rlhf_jax.data.formats import Prompt
from rlhf_jax.data.rejects import Place
from rlhf_jax.data.tokens import pad_prompts
from rlhf_jax.errors import UserError
from rlhf_jax.models import ScalarModel, save_hf, save_hf_reward_model
from rlhf_jax.models.tokenizer import read_tokenizer
from rlhf_jax.pretrained import load_policy, load_reward_model, load_tokenizer
from rlhf_jax.sampling.texts import answer_texts

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def stories(shared_data, tmp_path):
    """A copy of a published model's folder, to be changed."""
    return Path(shutil.copytree(shared_data / "model" / "stories260K-hf", tmp_path / "stories"))


def change(path, **values):
    found = json.loads(path.read_text()) if path.exists() else {}
    found |= values
    path.write_text(json.dumps({name: value for name, value in found.items() if value is not ...}))


def refused(load, folder, *words):
    """One line that names the folder and these words."""
    with pytest.raises(UserError) as error:
        load(str(folder))
    message = str(error.value)
    assert "\n" not in message and str(folder) in message, message
    for word in words:
        assert word in message, message


# What ends an answer.


@pytest.mark.parametrize(
    "generation, config, expected",
    [
        ([2, 426], 2, (2, 426)),
        ([426, 7], 2, (426, 7, 2)),  # the tokenizer's EOS too: what we train on ends in it
        (426, 2, (426, 2)),
        ([2], [2, 9], (2,)),
        (None, [426, 2], (426, 2)),
        (..., [426], (426, 2)),
        (..., ..., (2,)),
        ([], 5, (5, 2)),
        (-1, 5, (5, 2)),
    ],
)
def test_the_tokens_that_end_an_answer(stories, generation, config, expected):
    change(stories / "generation_config.json", eos_token_id=generation)
    change(stories / "config.json", eos_token_id=config)
    assert load_policy(str(stories)).eos_id == expected


def test_without_a_generation_config(stories):
    (stories / "generation_config.json").unlink()
    change(stories / "config.json", eos_token_id=[2, 426])
    assert load_policy(str(stories)).eos_id == (2, 426)


def test_texts_end_where_any_of_the_tokens_is_written(stories):
    ask = {"max_length": 128, "max_new_tokens": 24, "temperature": 0.0, "batch_size": 4}
    prompts = ["Who?", "Once upon a time there was a dog."]
    whole = answer_texts(load_policy(str(stories)), prompts, jax.random.key(0), **ask)
    assert not whole.ended.any()
    comma = load_tokenizer(str(stories)).convert_tokens_to_ids(",")
    change(stories / "generation_config.json", eos_token_id=[2, comma])
    found = answer_texts(load_policy(str(stories)), prompts, jax.random.key(0), **ask)
    assert found.ended.all()
    assert found.texts == [text[: text.index(",")] for text in whole.texts]


def test_what_ended_an_answer_is_none_of_its_words(stories):
    change(stories / "generation_config.json", eos_token_id=[2, 426])
    model = load_policy(str(stories))
    tokens = jnp.asarray([[403, 407, 426, 0], [403, 407, 2, 0], [403, 407, 261, 376]])
    mask = jnp.asarray([[1, 1, 1, 0], [1, 1, 1, 0], [1, 1, 1, 1]], bool)
    completions = Completions(tokens, mask, jnp.zeros(tokens.shape))
    texts = model.read_answers(completions)
    assert texts[0] == texts[1] == model.tokenizer.decode([403, 407])
    assert model.ended(completions).tolist() == [True, True, False]
    assert texts[2] == model.tokenizer.decode([403, 407, 261, 376])


# Ids that the model's table lacks.


def test_a_tokenizer_with_more_tokens_than_the_model(stories):
    tokenizer = AutoTokenizer.from_pretrained(stories)
    tokenizer.add_tokens(["<a>", "<b>", "<c>"])
    tokenizer.save_pretrained(stories)
    for load in (load_policy, load_reward_model):
        refused(load, stories, "tokenizer has 515 tokens", "the model has 512", "'<a>' is 512")


def test_a_reward_models_tokenizer_is_measured_by_its_own_table(stories, tmp_path):
    base = load_policy(str(stories))
    shapes = jax.eval_shape(ScalarModel(base.config).init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    save_hf_reward_model(tmp_path / "rm", base.config, params, tokenizer=base.tokenizer)
    assert load_reward_model(str(tmp_path / "rm")).eos_id == (2,)
    tokenizer = AutoTokenizer.from_pretrained(stories)
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tokenizer.save_pretrained(tmp_path / "rm")
    refused(load_reward_model, tmp_path / "rm", "tokenizer has 513 tokens", "the model has 512", "'<pad>' is 512")


def test_a_token_for_images_that_the_model_lacks_is_left_out(stories, tmp_path):
    """As Gemma 3 1B has it: 262,145 tokens and a table of 262,144."""
    before = load_policy(str(stories))
    tokenizer = AutoTokenizer.from_pretrained(stories)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<image_soft_token>"]})
    tokenizer.save_pretrained(stories)
    model = load_policy(str(stories))
    assert len(model.notes) == 1 and "left out: ['<image_soft_token>']" in model.notes[0]
    text = "A dog <image_soft_token> here"
    assert encode_prompt("A dog", model.tokenizer) == encode_prompt("A dog", before.tokenizer)
    ids = encode_prompt(text, model.tokenizer)
    assert max(ids) < 512 and "<image_soft_token>" in model.tokenizer.decode(ids)
    save_hf(tmp_path / "again", model.config, model.params, tokenizer=model.tokenizer)
    again = load_policy(str(tmp_path / "again"))
    assert encode_prompt(text, again.tokenizer) == ids
    tokenizer.add_tokens(["<a>"])
    tokenizer.save_pretrained(stories)
    refused(load_policy, stories, "tokenizer has 514 tokens", "the model has 512", "'<image_soft_token>' is 512")


def test_a_hole_in_the_ids_hides_nothing(stories):
    """513 tokens would fit into 600 rows; the last of them is 700."""
    added = json.loads((stories / "tokenizer.json").read_text())
    token = {"content": "<far>", "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added["added_tokens"].append({"id": 700, "special": True, **token})
    (stories / "tokenizer.json").write_text(json.dumps(added))
    if max(AutoTokenizer.from_pretrained(stories).get_vocab().values()) == 700:
        refused(load_policy, stories, "tokenizer has 701 tokens", "the model has 512")


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
@pytest.mark.parametrize(
    "rows, words",
    [
        ({"eos_token_id": 512}, ["eos_token_id is 512", "512 tokens"]),
        ({"eos_token_id": [2, 600]}, ["eos_token_id is 600", "512 tokens"]),
        ({"eos_token_id": [2, -7]}, ["eos_token_id is -7"]),
        ({"pad_token_id": 32000}, ["pad_token_id is 32000", "512 tokens"]),
        ({"bos_token_id": 512}, ["bos_token_id is 512"]),
        ({"eos_token_id": "</s>"}, ["eos_token_id '</s>' is no token's number"]),
        ({"eos_token_id": True}, ["eos_token_id True is no token's number"]),
        ({"eos_token_id": [[2]]}, ["eos_token_id [[2]] is no token's number"]),
    ],
)
def test_ids_in_the_configs_that_the_model_lacks(stories, file, rows, words):
    change(stories / file, **rows)
    refused(load_policy, stories, file, *words)


def test_a_padding_id_of_minus_one_is_none(stories):
    change(stories / "config.json", pad_token_id=-1)
    assert load_policy(str(stories)).pad_id == 2


# Tokenizers that others' loaders cannot read.


def future(folder):
    found = json.loads((folder / "tokenizer.json").read_text())
    found["model"]["type"] = "FutureBPE"
    (folder / "tokenizer.json").write_text(json.dumps(found))


def future_pre_tokenizer(folder):
    found = json.loads((folder / "tokenizer.json").read_text())
    found["pre_tokenizer"] = {"type": "Quantum"}
    (folder / "tokenizer.json").write_text(json.dumps(found))


def named_templates(folder):
    templates = [{"name": name, "template": "{{ messages }}"} for name in ("rag", "tool_use")]
    change(folder / "tokenizer_config.json", chat_template=templates)


def named_template_files(folder):
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "rag.jinja").write_text("{{ messages }}")


def write(name, text):
    return lambda folder: (folder / name).write_text(text)


def remove(*names):
    return lambda folder: [(folder / name).unlink() for name in names]


def no_eos(folder):
    change(folder / "tokenizer_config.json", eos_token=...)


BROKEN = {
    "a newer model": (future, ["tokenizer.json", "cannot read the tokenizer", "upgrade tokenizers"]),
    "a newer part": (future_pre_tokenizer, ["tokenizer.json", "cannot read the tokenizer", "upgrade tokenizers"]),
    "named templates": (named_templates, ["chat templates are rag, tool_use", "default"]),
    "named template files": (named_template_files, ["chat templates are rag", "default"]),
    "none at all": (remove("tokenizer.json", "tokenizer_config.json"), ["has no tokenizer", "save_pretrained"]),
    "settings alone": (remove("tokenizer.json"), ["has no tokenizer", "save_pretrained"]),
    "broken template": (write("chat_template.jinja", "a\n{% for m in %}"), ["template cannot be read, its line 2"]),
    "no JSON": (write("tokenizer.json", "{"), ["tokenizer.json is not JSON", "save_pretrained"]),
    "empty": (write("tokenizer.json", ""), ["tokenizer.json is not JSON"]),
    "empty object": (write("tokenizer.json", "{}"), ["tokenizer.json", "cannot read the tokenizer"]),
    "a list": (write("tokenizer.json", "[]"), ["tokenizer.json is not a JSON object"]),
    "settings that are no JSON": (write("tokenizer_config.json", "{,"), ["tokenizer_config.json is not JSON"]),
    "tokens that are no JSON": (write("added_tokens.json", "x"), ["added_tokens.json is not JSON"]),
    "broken special tokens": (write("special_tokens_map.json", "[1]"), ["special_tokens_map.json is not a JSON"]),
    "no EOS": (no_eos, ["no EOS token", "tokenizer_config.json"]),
    "broken generation": (write("generation_config.json", "{"), ["generation_config.json is not JSON"]),
    "deep": (write("generation_config.json", "[" * 100_000), ["generation_config.json is not JSON"]),
    "broken config": (write("config.json", "{"), ["config.json is not JSON"]),
    "not text": (lambda folder: (folder / "config.json").write_bytes(b"\xff\xfe{}"), ["config.json is not JSON"]),
    "cut weights": (lambda folder: os.truncate(folder / "model.safetensors", 4000), ["not a whole safetensors file"]),
}  # fmt: skip


@pytest.mark.parametrize("kind", BROKEN)
def test_what_cannot_be_read_is_one_line(stories, kind):
    damage, words = BROKEN[kind]
    damage(stories)
    refused(load_policy, stories, *words)


def test_a_file_for_a_folder_and_a_folder_that_is_not_there(stories):
    for load in (load_policy, load_reward_model, load_tokenizer):
        refused(load, stories / "model.safetensors", "is a file")
        refused(load, stories / "gone", "there is no folder")


def test_a_folder_for_a_file(stories):
    (stories / "config.json").unlink()
    (stories / "config.json").mkdir()
    refused(load_policy, stories, "config.json")


# Python that lies in the folder.

EVIL = """
open(r"{marker}", "w").write("ran")
from transformers import PreTrainedTokenizerFast
class Tok(PreTrainedTokenizerFast): pass
class Config: pass
class Model: pass
"""


def with_code(folder):
    marker = folder.parent / "ran"
    (folder / "tok.py").write_text(EVIL.format(marker=marker))
    return marker


@pytest.fixture
def never_asked(monkeypatch):
    def asked(*_):
        raise AssertionError("a question was asked")

    monkeypatch.setattr(builtins, "input", asked)


@pytest.mark.parametrize("named", [{"AutoTokenizer": ["tok.Tok", None]}, {"AutoTokenizer": [None, "tok.Tok"]},
                                   ["tok.Tok", None], {"AutoTokenizer": "tok.Tok"}])  # fmt: skip
@pytest.mark.parametrize("own_class", ["Tok", "PreTrainedTokenizerFast"])
def test_a_tokenizers_own_code_is_never_run(stories, never_asked, named, own_class):
    marker = with_code(stories)
    change(stories / "tokenizer_config.json", auto_map=named, tokenizer_class=own_class)
    for load in (load_policy, load_tokenizer):
        refused(load, stories, "tokenizer_config.json", "auto_map tok.Tok", "never run", "take auto_map out")
    assert not marker.exists()


def test_a_models_own_code_is_never_run_and_that_is_said(stories, never_asked):
    marker = with_code(stories)
    change(stories / "config.json", auto_map={"AutoConfig": "tok.Config", "AutoModelForCausalLM": "tok.Model"})
    change(stories / "tokenizer_config.json", auto_map={"AutoProcessor": "tok.Tok"})
    model = load_policy(str(stories))
    assert not marker.exists() and model.config.n_layers == 5
    assert [note for note in model.notes if "auto_map" in note and "is not run" in note]


def test_an_unknown_models_own_code_is_never_run(stories, never_asked):
    marker = with_code(stories)
    change(stories / "config.json", model_type="mine", auto_map={"AutoConfig": "tok.Config"})
    refused(load_policy, stories, "model_type 'mine' is not supported")
    with pytest.raises(ValueError, match=r"cannot read the tokenizer|never run"):
        change(stories / "tokenizer_config.json", tokenizer_class="Nothing", auto_map={"AutoTokenizer": "tok.Tok"})
        read_tokenizer(stories)
    assert not marker.exists()


def test_yes_at_the_question_runs_nothing(stories):
    """As a person has it: a program of ours, and "y" typed ahead."""
    marker = with_code(stories)
    change(stories / "tokenizer_config.json", auto_map={"AutoTokenizer": ["tok.Tok", None]}, tokenizer_class="Tok")
    rows = stories.parent / "rows.jsonl"
    rows.write_text('{"prompt": "Who?", "completion": "I."}\n')
    run = subprocess.run(
        [sys.executable, ROOT / "experiments" / "sft.py", "--model", stories, "--demonstrations", rows],
        input="y\ny\ny\n", capture_output=True, text=True, cwd=stories.parent,
    )  # fmt: skip
    assert run.returncode == 2 and not marker.exists(), run.stderr
    assert "auto_map tok.Tok" in run.stderr and "[y/N]" not in run.stdout + run.stderr


# What is not used is said.


def test_rows_that_nobody_knows_are_counted_and_said(stories):
    assert load_policy(str(stories)).notes == ()
    change(stories / "config.json", new_trick=3, newer_trick=True)
    change(stories / "generation_config.json", stop_strings=["\n"], temperature=0.3)
    config, generation = load_policy(str(stories)).notes
    assert "2 rows are not known and not read: new_trick, newer_trick" in config and str(stories) in config
    assert "not followed when sampling: stop_strings" in generation


def test_the_weights_are_those_of_the_file(stories):
    model = load_policy(str(stories))
    table = load_file(stories / "model.safetensors")["model.embed_tokens.weight"]
    np.testing.assert_array_equal(model.params["embedding"], table)
    assert pad_prompts([[1]], length=2, pad_id=model.pad_id).tokens.tolist() == [[2, 1]]


def test_sampling_rows_change_nothing(stories):
    ask = {"max_length": 128, "max_new_tokens": 6, "temperature": 1.0, "batch_size": 4}
    before = answer_texts(load_policy(str(stories)), ["Who?"], jax.random.key(0), **ask)
    change(stories / "generation_config.json", do_sample=False, temperature=0.1, top_k=1, repetition_penalty=3.0)
    model = load_policy(str(stories))
    assert answer_texts(model, ["Who?"], jax.random.key(0), **ask).texts == before.texts and model.notes == ()


def encode_prompt(text, tokenizer):
    return encode(Prompt(({"role": "user", "content": text},), Place("", 0)), tokenizer, 512)[0]


def test_rows_of_a_tokenizer_that_change_no_ids(stories):
    row = "Who was it? " * 30
    before = encode_prompt(row, load_tokenizer(str(stories)))
    change(
        stories / "tokenizer_config.json", padding_side="left", truncation_side="left", model_max_length=8,
        processor_class="Some",
    )  # fmt: skip
    assert encode_prompt(row, load_tokenizer(str(stories))) == before and len(before) > 8


def test_the_default_of_named_templates_is_read(stories):
    templates = [{"name": name, "template": f"{name}: {{{{ messages[0].content }}}}"} for name in ("default", "rag")]
    change(stories / "tokenizer_config.json", chat_template=templates)
    tokenizer = load_tokenizer(str(stories))
    assert tokenizer.decode(encode_prompt("Who?", tokenizer)).strip() == "default: Who?"


def test_a_deep_model_has_its_layers_scanned_and_targets_cannot_tell_them_apart(stories, monkeypatch):
    assert not load_policy(str(stories)).config.scan_layers
    monkeypatch.setattr(pretrained, "SCANNED_ABOVE", 1)
    deep = load_policy(str(stories))
    assert deep.config.scan_layers and deep.config.remat and "layers" in deep.params
    told = load_policy(str(stories), pretrained.Layout(scan_layers=False, remat=True))
    assert not told.config.scan_layers and told.config.remat and "layer_1" in told.params
    numbers = dict(rank=2, alpha=4.0, rank_stabilized=False, frozen_dtype=None)
    with pytest.raises(UserError, match=r"layer_1/query.* tells layers apart.*--scan-layers False"):
        split_trainable(deep.params, jax.random.key(0), targets="layer_1/query", **numbers)
    split_trainable(told.params, jax.random.key(0), targets="layer_1/query", **numbers)
