"""A judge at the URL of transformers' own server, against the same model in one of ours."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from rlhf_jax.data.encode import encode
from rlhf_jax.data.formats import Prompt
from rlhf_jax.data.rejects import Place
from rlhf_jax.data.tokens import pad_sequences
from rlhf_jax.errors import UserError
from rlhf_jax.models import Transformer
from rlhf_jax.pretrained import load_policy
from rlhf_jax.rewards.judge import comparison, letters
from rlhf_jax.rewards.server import ServerLimits, open_server
from rlhf_jax.sampling.texts import answer_texts
from rlhf_jax.scoring import hidden_states

TEMPLATE = (
    "{% for turn in messages %}{{ turn['role'] }}:\n{{ turn['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:\n' }}{% endif %}"
)
TEXTS = ["Lily ran.", "The dog was sad and then it rained all day.", "No.", "They had a big red ball and a boat."]
QUESTIONS = [comparison("Tell me a story.", a, b) for a in TEXTS for b in TEXTS if a != b]


@pytest.fixture(scope="module")
def chatty(stories, tmp_path_factory):
    """stories260K with a chat template."""
    folder = tmp_path_factory.mktemp("chatty") / "model"
    shutil.copytree(stories, folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    return folder


def prompt_ids(model, question):
    return encode(Prompt(({"role": "user", "content": question},), Place("", 0)), model.tokenizer, 512)[0]


@pytest.fixture(scope="module")
def lettered(chatty, tmp_path_factory):
    """The same with a head that knows "A" and "B" only, and says "A" to some questions and "B" to others."""
    folder = tmp_path_factory.mktemp("lettered") / "model"
    shutil.copytree(chatty, folder)
    model = load_policy(str(chatty))
    prompts = [prompt_ids(model, question) for question in QUESTIONS[:2]]
    tokens = jax.tree.map(jnp.asarray, pad_sequences([(prompt, [0]) for prompt in prompts], length=512, pad_id=0))
    states = np.asarray(hidden_states(Transformer(model.config), model.params, tokens))
    first, second = (states[row, len(prompt) - 1] for row, prompt in enumerate(prompts))
    direction = first / np.linalg.norm(first) - second / np.linalg.norm(second)
    head = np.zeros((512, 64), np.float32)
    for letter, sign in (("A", 1), ("B", -1)):
        head[model.tokenizer.convert_tokens_to_ids(letter)] = sign * direction
    weights = load_file(folder / "model.safetensors")
    save_file(weights | {"lm_head.weight": head}, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    """The address of a running `transformers serve`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable, "-m", "transformers.cli.transformers", "serve", "--host", "127.0.0.1", "--port", str(port),
        "--device", "cpu",
    ]  # fmt: skip
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    log = tmp_path_factory.mktemp("server") / "log"
    with open(log, "wb") as file, subprocess.Popen(command, stdout=file, stderr=file, env=environment) as server:
        try:
            for _ in range(1200):
                assert server.poll() is None, log.read_text()
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                    break
                except OSError:
                    time.sleep(0.1)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            server.kill()


def test_a_server_gives_the_letters_of_the_model_that_it_serves(url, lettered, tmp_path):
    model = load_policy(str(lettered))
    ours = letters(model, batch_size=12, max_length=512)(QUESTIONS)
    assert 0 < (ours > 0.5).sum() < len(ours)
    limits = ServerLimits(answer_tokens=1, at_once=2)
    with open_server(url, str(lettered), tmp_path / "cache", limits=limits, key_variable="NO_KEY") as server:
        theirs, paid = server.ask(QUESTIONS), server.metrics("")
        again = server.ask(QUESTIONS)
    np.testing.assert_array_equal(theirs, ours > 0.5)  # it gives no log-probabilities
    np.testing.assert_array_equal(again, theirs)
    assert paid["requests"] == paid["completion_tokens"] == len(QUESTIONS) and paid["failures"] == 0
    assert paid["prompt_tokens"] == sum(len(prompt_ids(model, question)) for question in QUESTIONS)
    assert server.metrics("")["requests"] == len(QUESTIONS)


def test_a_model_that_says_something_else_is_no_judge(url, chatty, tmp_path):
    said = answer_texts(
        load_policy(str(chatty)), QUESTIONS[:1], jax.random.key(0), max_length=512, temperature=0.0,
        max_new_tokens=8, batch_size=1,
    ).texts[0]  # fmt: skip
    limits = ServerLimits(wait=0.01, retries=1)
    with open_server(url, str(chatty), tmp_path / "cache", limits=limits) as server:
        with pytest.raises(UserError, match="and not A or B") as caught:
            server.ask(QUESTIONS[:1])
    assert repr(said.strip()) in str(caught.value)
