"""2 and 4 processes train as one does, go on from each other's checkpoints, end together when one of them is told to,
and say so when one is killed.

They train by SFT, DPO, PPO, and GRPO with a reward in Python.
"""

import faulthandler
import gc
import importlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src import cache_key

from experiments import dpo, grpo, ppo, sft
from experiments.dpo import DPO
from experiments.flags import RunFlags
from experiments.grpo import GRPO
from experiments.ppo import PPO
from experiments.sft import SFT
from experiments.stages import group_defaults, train_preference
from rlhf_jax import checkpoint, hosts
from rlhf_jax.cli import on_mesh, run_main
from rlhf_jax.data import encoders
from rlhf_jax.data.encode import RankedAnswers, encode_rows
from rlhf_jax.data.formats import Text
from rlhf_jax.data.pairs import paired
from rlhf_jax.data.rejects import Place, Rejects
from rlhf_jax.data.rows import Read
from rlhf_jax.data.tokens import take
from rlhf_jax.errors import UserError
from rlhf_jax.group_loop import train_groups
from rlhf_jax.log import Run
from rlhf_jax.loop import set_data_state
from rlhf_jax.metrics import CLOCKS, read_metrics
from rlhf_jax.models import ScalarModel, Transformer
from rlhf_jax.pretrained import Pretrained
from rlhf_jax.rewards.model import model_reward
from rlhf_jax.rewards.python import Limits, parse, python_reward
from rlhf_jax.sharding import create, host_share, make_mesh, shard_host_rows, to_host
from rlhf_jax.signals import PREEMPTED
from rlhf_jax.simulation import make_tokenizer
from rlhf_jax.tasks import simulated
from rlhf_jax.tasks.task import Demonstrations, PromptSets
from rlhf_jax.trackers import torch_hidden

LIMIT = 240
"""Seconds after which a process that has not ended says where it is, and ends."""
ROWS = 4
STEPS = {"sft": [1, 6], "dpo": [1, 2], "ppo": [1, 2], "grpo": [1, 2]}
"""What is logged."""


@dataclass(frozen=True)
class Config(RunFlags):
    sft: SFT = field(default_factory=lambda: SFT(steps=6, batch_size=ROWS, save_every=2))
    ppo: PPO = field(default_factory=lambda: PPO(steps=2, responses=ROWS, minibatches=1, epochs=1, save_every=1))
    grpo: GRPO = field(default_factory=lambda: GRPO(steps=2, groups=4, group_size=ROWS, save_every=1))
    dpo: DPO = field(default_factory=lambda: DPO(steps=2, batch_size=ROWS, save_every=1, evaluations=1))
    stages: tuple[str, ...] = ("sft", "dpo", "ppo", "grpo")


class Batches:
    """Demonstrations in their order: of each batch this process's share."""

    def __init__(self, tokens):
        self.tokens, self.read, (self.number, self.count) = tokens, 0, host_share()

    def __next__(self):
        if os.environ.get("KILLED") == f"sft {self.read} {self.number}":
            time.sleep(2)  # until the last checkpoint is written, and the other one waits for this one's part of a sum
            os.kill(os.getpid(), int(os.environ["SIGNAL"]))
            time.sleep(2)  # until all have heard of a SIGTERM
        size = ROWS // self.count
        begin = self.read * ROWS + self.number * size
        self.read += 1
        return take(self.tokens, np.arange(begin, begin + size))

    def get_state(self):
        return [self.number, self.read]

    def set_state(self, saved):
        assert saved[0] == self.number
        self.read = saved[1]


class Tiny(NamedTuple):
    """Of the world its text; nothing that is sampled for measuring only."""

    base: Pretrained
    demonstrations: Demonstrations
    prompts: PromptSets


def tiny():
    world = simulated.World(0, sizes=simulated.Sizes(demonstrations=96, compared=1, heldout_pairs=1, heldout=1))
    shape = dict(n_layers=1, d_model=16, n_heads=2, n_kv_heads=2, head_dim=8, d_ff=32)
    demonstrations, prompts = world.demonstrations(), world.prompts()
    return Tiny(
        world.base._replace(config=replace(world.base.config, **shape)),
        demonstrations._replace(
            validation=take(demonstrations.validation, np.arange(8)),
            batches=lambda batch_size, seed: Batches(demonstrations.train),
        ),
        prompts._replace(train=take(prompts.train, np.arange(16))),
    )


def run_one(world):
    """A program as the experiments are, of SFT and PPO."""

    @on_mesh
    def main(cfg):
        with Run(cfg.run_dir, cfg, name="tiny", resume=cfg.resume) as run:
            if not cfg.resume and hosts.many():
                agree()
            base = world.base._replace(params=new(Transformer(world.base.config)))
            trained = sft.train(
                cfg.sft, base, world.demonstrations, run, cfg.seed, eval_batch_size=64, keep_epochs=True
            )
            metrics = {}
            if "dpo" in cfg.stages:
                by_pairs(cfg, base._replace(params=trained.params), base.params, world.prompts, run)
            if "ppo" in cfg.stages:
                scores = new(ScalarModel(base.config))
                _, metrics = ppo.train(
                    cfg.ppo, base._replace(params=trained.params), world.prompts,
                    [model_reward(base.config, scores, name="model", weight=1.0)], run, cfg.seed, max_new_tokens=8,
                    critic=(base.config, scores),
                )  # fmt: skip
            if "grpo" in cfg.stages:
                metrics |= by_groups(cfg, base._replace(params=trained.params), world.prompts, run)
            if metrics:
                run.summary(metrics)

    run_main(main, Config)


REWARD = """
import os
import signal
import time
def even(prompts, completions, **columns):
    if os.environ.get("KILLED") == "grpo " + os.environ["SCORED"][-1]:
        time.sleep(2)
        os.kill(os.getppid(), signal.SIGKILL)
    with open(os.environ["SCORED"], "a") as file:
        file.writelines(f"{os.getppid()}\\n" for _ in completions)
    return [len(text) % 2 for text in completions]
"""


def by_pairs(cfg, base, reference, prompts, run):
    """DPO on answers of a word and of two. Where it starts the policy is not its reference: no pair is a tie."""
    asked = [row[real].tolist() for row, real in zip(prompts.train.tokens, prompts.train.mask, strict=True)]
    eos = base.tokenizer.eos_token_id
    rankings = [RankedAnswers(prompt, [[5 + n, eos], [7, 6 + n, eos]], (0, 1), 0.0) for n, prompt in enumerate(asked)]
    return train_preference(
        cfg.dpo, partial(dpo.loss, cfg.dpo), partial(dpo.reward, cfg.dpo), base, paired(rankings, cfg.dpo.pairs), None,
        run, cfg.seed, stage="dpo", eval_batch_size=8, reference=reference,
    )  # fmt: skip


def by_groups(cfg, base, prompts, run):
    """GRPO, whose reward notes for each answer which process asked for its score."""
    path = Path(cfg.run_dir).with_suffix(".py")
    if run.first:
        path.write_text(REWARD, encoding="utf-8")
    hosts.from_first(lambda: None)
    os.environ["SCORED"] = str(path.with_suffix(f".scored{jax.process_index()}"))
    filled = group_defaults(cfg.grpo, base)
    numbers = filled.numbers(8)
    limits = Limits(seconds=10)
    with python_reward(
        parse(f"{path}:even"), limits, name="even", weight=1.0, failed_score=0.0, max_failed_share=0.0
    ) as reward:
        return train_groups(
            grpo.algorithm(cfg.grpo, numbers), numbers, base, prompts, [reward], filled.make_group_loop(run, "grpo"),
            cfg.seed, split=filled.split_trainable, adapters=False, optimizer=filled.make_group_optimizer(),
            evaluations=1,
        )[1]  # fmt: skip


def new(model):
    """Parameters, in one program also where there is no mesh."""
    return create(jax.jit(lambda: model.init(jax.random.key(1), jnp.zeros((1, 8), jnp.int32))["params"]))


def agree():
    """What processes tell each other; and arrays of which each has read its own rows."""
    whole = np.arange(16).reshape(2, 8)
    number, count = host_share()
    assert (number, count) == (jax.process_index(), jax.process_count())
    for axis in (0, 1):
        batch = whole if axis else whole.T
        placed = shard_host_rows(np.split(batch, count, axis=axis)[number], axis=axis)
        assert len(placed.addressable_shards) == len(jax.local_devices()) and not placed.is_fully_replicated
        np.testing.assert_array_equal(to_host(placed), batch)
    with jax.set_mesh(make_mesh("tensor=-1")):
        assert host_share() == (0, 1)
        np.testing.assert_array_equal(to_host(shard_host_rows(whole)), whole)
    assert hosts.gather({"of": number * "x"}) == [{"of": n * "x"} for n in range(count)]
    assert hosts.from_first(lambda: number) == 0
    assert hosts.gather_bytes(bytes(number)) == [bytes(n) for n in range(count)]
    with pytest.raises(UserError, match="of process 0"):
        hosts.from_first(lambda: mistake(number))
    encode_in_shares(number, count)


def encode_in_shares(number, count):
    """Each encodes a part of the rows, and has all of them."""
    tokenizer, begun = make_tokenizer(), []
    rows = [Read(n, Text(" ".join(["a"] * (n % 5 + 1)), Place("rows", n)), {}) for n in range(11)]
    own = encoders.outcome
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoders, "MANY", 2)
        patch.setattr(encoders, "CHUNK", 2)
        patch.setattr(encoders, "outcome", lambda row, *rest: (begun.append(row.place.line), own(row, *rest))[1])
        found = list(encoders.encode_many(iter(rows), tokenizer, 64, Rejects("skip"), processes=1))
    assert found == list(encode_rows(rows, tokenizer, 64, Rejects("skip")))
    assert begun == [n for n in range(2, 11) if (n - 2) // 2 % count == number]


def mistake(number):
    raise UserError(f"of process {number}")


def spread(world, folder, name, processes, *flags, devices=1, killed="", by=signal.SIGKILL):
    """Forks processes that run the program; (exit code, seconds until then) of each.

    `killed` says where one of them gets a signal: "sft BATCH PROCESS", or "grpo PROCESS", within a reward.

    Before JAX has a backend, so that no process costs imports.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    began, children, ended = time.monotonic(), {}, {}
    for number in range(processes):
        child = os.fork()
        if child == 0:
            for stream, kind in enumerate(("out", "err"), 1):
                os.dup2(os.open(folder / f"{name}.{kind}{number}", os.O_WRONLY | os.O_CREAT, 0o644), stream)
            faulthandler.dump_traceback_later(LIMIT, exit=True)
            cache_key._hash_accelerator_config = layout
            jax.config.update("jax_num_cpu_devices", devices)
            if processes > 1:
                values = (f"127.0.0.1:{port}", str(processes), str(number))
                os.environ.update(zip(hosts.VARIABLES, values, strict=True), KILLED=killed, SIGNAL=str(int(by)))
                jax.config.update("jax_share_binary_between_hosts", True)
                jax.config.update("jax_share_binary_between_hosts_timeout_ms", LIMIT * 1000)
            sys.argv = [name, "--run-dir", str(folder / name.split()[0]), *flags]
            run_one(world)
            sys.exit()
        children[child] = number
    while len(ended) < processes:
        for child, number in children.items():
            if number not in ended:
                found, status = os.waitpid(child, os.WNOHANG)
                if found:
                    ended[number] = os.waitstatus_to_exitcode(status), time.monotonic() - began
        time.sleep(0.02)
    for number, (code, _) in ended.items():
        assert killed or code == 0, "\n".join([f"process {number} of {name}:", *said(folder, name, number)])
    return [ended[number] for number in range(processes)]


def layout(key, devices):
    """In the key of a compiled program, in place of what JAX takes for this: on a CPU it differs by process, and all
    but process 0 would compile anew each time."""
    key.update(repr([device.process_index for device in devices.flat]).encode())


def lives(folder):
    """All of the processes, one group after the other; how the two ended of which one was killed or told to end."""
    with torch_hidden():
        for name in ("orbax.checkpoint", "tensorboardX"):  # which they would import themselves
            importlib.import_module(name)
    world = tiny()
    gc.freeze()
    spread(world, folder, "alone", 1)
    spread(world, folder, "two", 2, devices=2)
    shutil.copytree(folder / "two", folder / "back")
    spread(world, folder, "back", 1, "--resume")
    # Of what two did, PPO's first iteration stays, and GRPO.
    shutil.copytree(folder / "two", folder / "four")
    for gone in ("sft", "sft_epochs", "dpo", "ppo/2"):
        shutil.rmtree(folder / "four" / "checkpoints" / gone)
    spread(
        world, folder, "four", 4, "--resume", "--mesh", "fsdp=4", "--stages", "sft", "dpo", "ppo", "--accept-changes"
    )
    hosts.HEARTBEAT_SECONDS = 10
    ended = spread(world, folder, "killed", 2, "--stages", "sft", killed="sft 4 1")
    shutil.copytree(folder / "killed", folder / "killed before")
    spread(world, folder, "killed again", 2, "--resume")
    told = spread(world, folder, "told", 2, "--stages", "sft", killed="sft 1 1", by=signal.SIGTERM)
    shutil.copytree(folder / "told", folder / "told before")
    spread(world, folder, "told again", 2, "--resume")
    shutil.copytree(folder / "told", folder / "lost")  # SFT is done
    lost = spread(world, folder, "lost", 2, "--resume", "--stages", "sft", "grpo", "--accept-changes", killed="grpo 1")
    (folder / "ended.json").write_text(json.dumps([ended, told, lost]), encoding="utf-8")
    return ended


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder of all runs, and how the two ended of which one was killed, told to end, and killed in a reward."""
    folder = tmp_path_factory.mktemp("runs")
    environment = {"JAX_COMPILATION_CACHE_DIR": str(folder / "xla")} | os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        # Simulated devices of one process take their collectives in one order (experiments/results/sharding.md).
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", "") + " --xla_cpu_enable_concurrency_optimized_scheduler=false",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, __file__, folder], env=environment, capture_output=True, text=True, timeout=7 * LIMIT
    )
    assert done.returncode == 0, done.stderr
    return folder, json.loads((folder / "ended.json").read_text(encoding="utf-8"))


def said(folder, name, number, kind="err"):
    """Lines of a process, without those of its libraries: Gloo's threads print a text and its end of line apart."""
    text = (folder / f"{name}.{kind}{number}").read_text(encoding="utf-8")
    return [line for line in text.splitlines() if line and "peer ranks" not in line]


def arrays(one):
    """Those of a checkpoint, by name."""
    folder = one.path.resolve() / "arrays"
    with checkpoint._quiet_orbax() as checkpointer:
        names = checkpointer.metadata(folder).item_metadata.tree
    return {name: checkpoint._read_array(folder, name) for name in names}


def compared(run_dir, expected, stages):
    """(what, ours, theirs) of every metric but for clocks, and of each array in each checkpoint."""
    with open(run_dir / "metrics.jsonl", encoding="utf-8") as file:
        written = [(row["stage"], row["step"]) for row in map(json.loads, file)]
    assert sorted(written) == sorted((stage, step) for stage in stages for step in STEPS[stage])
    ours, theirs = read_metrics(run_dir), read_metrics(expected)
    for stage in stages:
        for our, their in zip(ours[stage], theirs[stage], strict=True):
            assert our.keys() == their.keys()
            for name in their.keys() - {"stage", *CLOCKS}:
                yield f"{stage} metrics: {name}", our[name], their[name]
    folders = (run_dir, expected)
    ours, theirs = ({(one.stage, one.step): one for one in checkpoint.checkpoints(folder)} for folder in folders)
    assert ours.keys() == {key for key in theirs if key[0].removesuffix("_epochs") in stages}
    for key, one in ours.items():
        assert one.damage is None
        mine, other = arrays(one), arrays(theirs[key])
        assert mine.keys() == other.keys()
        for name in mine:
            yield f"{key[0].removesuffix('_epochs')} checkpoints: {key[1]} {name}", mine[name], other[name]


def assert_same(*runs):
    for what, ours, theirs in compared(*runs):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5, err_msg=what)


@pytest.mark.parametrize("name, processes", [("two", 2), ("four", 4)])
def test_processes_do_what_one_does(runs, name, processes):
    """Four of them with each parameter cut in four; PPO's first iteration is that of two, and GRPO as a whole."""
    folder, _ = runs
    assert_same(folder / name, folder / "alone", set(STEPS))
    assert f"run: {folder / name}" in said(folder, name, 0, "out")
    assert [said(folder, name, number, "out") for number in range(1, processes)] == [[]] * (processes - 1)


def test_each_answer_is_scored_once_by_a_process_that_has_it(runs):
    """Two iterations of 4 · 4 answers, in queues of four copies; alone the one process scores all."""
    folder, _ = runs
    for name, processes in (("alone", 1), ("two", 2)):
        asked = [path.read_text(encoding="utf-8").split() for path in sorted(folder.glob(f"{name}.scored*"))]
        assert [len(some) for some in asked] == [2 * 16 // processes] * processes
        assert len({process for some in asked for process in some}) == processes


def test_one_goes_on_from_what_two_have_done(runs):
    folder, _ = runs
    summaries = [json.loads((folder / name / "summary.json").read_text(encoding="utf-8")) for name in ("two", "back")]
    assert summaries[0] == summaries[1]
    with pytest.raises(UserError, match=r"in 2 shares; .* read them in 1"):
        set_data_state(None, checkpoint.inspect(folder / "two", "sft", 4).data_state)


def test_one_is_killed_the_other_says_so_and_a_restart_goes_on(runs):
    folder, (ended, _, _) = runs
    (code, seconds), (killed, at) = ended
    assert killed == -signal.SIGKILL and code not in (0, 2)
    assert said(folder, "killed", 0)[-1] == hosts.LOST.format(0, 2)
    assert seconds - at < 40
    saved = [(one.stage, one.step, one.damage) for one in checkpoint.checkpoints(folder / "killed before")]
    assert saved == [("sft", 2, None), ("sft", 4, None)]
    first = [read_metrics(folder / name)["sft"][0] for name in ("killed before", "killed")]
    assert first[0] == first[1]  # with its time: it was not done again
    assert_same(folder / "killed", folder / "alone", {"sft"})


def test_one_is_told_to_end_and_all_save_the_same_step(runs):
    folder, (_, told, _) = runs
    assert [code for code, _ in told] == [PREEMPTED] * 2
    saved = [(one.stage, one.step, one.damage) for one in checkpoint.checkpoints(folder / "told before")]
    last = saved[-1][1]
    assert 2 <= last < 6 and saved[-1] == ("sft", last, None)
    (line,) = [line for line in said(folder, "told", 0, "out") if line.startswith("preempted")]
    assert f"saved at step {last} of sft" in line
    assert_same(folder / "told", folder / "alone", {"sft"})


def test_one_is_killed_inside_a_reward_and_the_other_says_so(runs):
    folder, (_, _, lost) = runs
    (code, seconds), (killed, at) = lost
    assert killed == -signal.SIGKILL and code not in (0, 2)
    assert said(folder, "lost", 0)[-1] == hosts.LOST.format(0, 2)
    assert seconds - at < 40


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    (_, ended), (_, killed) = lives(folder)
    print(f"after one was killed the other ended in {ended - killed:.1f} s")
    for name in ("two", "four"):
        largest = {}
        for what, ours, theirs in compared(folder / name, folder / "alone", set(STEPS)):
            what = what.partition(":")[0]
            largest[what] = max(largest.get(what, 0.0), float(np.abs(np.subtract(ours, theirs)).max()))
        print(name, {what: f"{difference:.1e}" for what, difference in largest.items()})
