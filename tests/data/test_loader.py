"""Documents to packed batches: every one once an epoch, shared among hosts, mixed by weight, resumed exactly."""

import json
import time
from itertools import islice

import numpy as np
import pytest

from rlhf_jax.data.loader import document_batches, mix_once, streamed_batches
from rlhf_jax.data.rejects import Rejects
from rlhf_jax.data.rows import read_rows
from rlhf_jax.data.tokens import bucket
from rlhf_jax.errors import UserError

LENGTH, ROWS = 16, 3


def documents(count, first=10):
    """Documents that are known by their first token, of 2 to 8 tokens."""
    return [([first + n], [1] * (1 + n % 7)) for n in range(count)]


def numbers(batch, first=10):
    """Which documents a batch holds, in order."""
    found = []
    for row, segments in zip(batch.inputs, batch.segment_ids, strict=True):
        found += [int(row[segments == s][0]) - first for s in range(1, segments.max() + 1)]
    return found


def drawn(batches, count, first=10):
    found = []
    while len(found) < count:
        found += numbers(next(batches), first)
    return found


def opener(docs, rows=1):
    """A streamed source: every `rows`-th row can be used."""

    def open_source(start, one):
        index, count = one.shard
        numbered = zip(range(0, rows * len(docs), rows), docs, strict=True)
        return iter([(n, doc) for n, doc in numbered if n >= start and n % count == index])

    return open_source


def memory(docs, seed=0, batch_size=ROWS, **options):
    return document_batches([docs], batch_size=batch_size, length=LENGTH, pad_id=0, seed=seed, **options)


def streamed(docs, seed=0, batch_size=ROWS, shard=(0, 1)):
    return streamed_batches(
        [opener(docs, 3)], batch_size=batch_size, length=LENGTH, pad_id=0, seed=seed, shard=shard, window=32
    )


def mixture(docs, seed=0):
    return document_batches(
        [docs, documents(11, first=200)], batch_size=ROWS, length=LENGTH, pad_id=0, seed=seed, weights=(2.0, 1.0)
    )


def streamed_mixture(docs, seed=0):
    sources = [opener(docs), opener(documents(11, first=200))]
    return streamed_batches(
        sources, batch_size=ROWS, length=LENGTH, pad_id=0, seed=seed, weights=(2.0, 1.0), window=32
    )


MAKERS = [memory, streamed, mixture, streamed_mixture]


def same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("make", [memory, streamed])
def test_every_document_once_an_epoch_in_another_order_each_time(make):
    # Batches of one row hold documents in the order in which they were drawn.
    whole = drawn(make(documents(40), batch_size=1), 120)
    epochs = [whole[n : n + 40] for n in (0, 40, 80)]
    if make is memory:
        assert [sorted(epoch) for epoch in epochs] == [list(range(40))] * 3
        assert epochs[0] != epochs[1] != epochs[2]
    else:  # shuffled in a window, which does not end with an epoch
        counts = np.bincount(drawn(make(documents(40)), 2000), minlength=40)
        assert counts.min() >= 47 and epochs[0] != sorted(epochs[0])
    assert drawn(make(documents(40), batch_size=1), 120) == whole != drawn(make(documents(40), 1, 1), 120)


@pytest.mark.parametrize("make", MAKERS)
def test_rows_are_packed_with_positions_and_segments_and_well_filled(make):
    docs = documents(40)
    share = []
    for batch in islice(make(docs), 30):
        assert batch.inputs.shape == (ROWS, LENGTH)
        share.append((batch.segment_ids > 0).mean())
        for segments, positions, mask in zip(batch.segment_ids, batch.positions, batch.mask, strict=True):
            for segment in range(1, segments.max() + 1):
                of = segments == segment
                assert positions[of].tolist() == list(range(of.sum()))
                # Here one token is given; the mask is aligned with targets, and so one short at the front.
                assert mask[of].sum() == of.sum() - 1
    assert np.mean(share) > 0.75


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("at", [0, 1, 7, 23])
def test_resumed_at_the_exact_example(make, at):
    docs = documents(40)
    straight = list(islice(make(docs), at + 12))
    batches = make(docs)
    for _ in range(at):
        next(batches)
    state = json.dumps(batches.get_state())
    resumed = make(docs)
    resumed.set_state(json.loads(state))
    assert all(map(same, islice(resumed, 12), straight[at:]))
    # Going on after the state was taken is not disturbed by it, and the same iterator can be set back.
    assert all(map(same, islice(batches, 12), straight[at:]))
    batches.set_state(json.loads(state))
    assert same(next(batches), straight[at])
    # Taken again at once after a resume, the state is the same place.
    again = make(docs)
    again.set_state(json.loads(state))
    third = make(docs)
    third.set_state(json.loads(json.dumps(again.get_state())))
    assert same(next(third), straight[at])


@pytest.mark.parametrize("hosts", [2, 4])
def test_hosts_share_an_epoch(hosts):
    docs = documents(36)
    shares = [drawn(memory(docs, batch_size=1, shard=(host, hosts)), 36)[: 36 // hosts] for host in range(hosts)]
    assert sorted(n for share in shares for n in share) == list(range(36))
    # Of a stream each host keeps its own documents in every pass.
    shares = [set(drawn(streamed(docs, shard=(host, hosts)), 400)) for host in range(hosts)]
    assert sorted(n for share in shares for n in share) == list(range(36))
    with pytest.raises(UserError, match="2 documents are too few for 3 hosts"):
        memory(documents(2), shard=(0, 3))


@pytest.mark.parametrize("make", [mixture, streamed_mixture])
def test_sources_are_mixed_by_weight(make):
    found = np.array(drawn(make(documents(40)), 1200))
    np.testing.assert_allclose((found < 100).mean(), 2 / 3, atol=0.03)
    # The small source comes round more often, each of its documents as often as the others.
    counts = np.bincount(found[found >= 100] - 190)
    assert len(counts) == 11 and counts.max() - counts.min() <= 8


def test_without_weights_sources_count_by_size():
    batches = document_batches(
        [documents(40), documents(10, first=200)], batch_size=ROWS, length=LENGTH, pad_id=0, seed=0
    )
    found = np.array(drawn(batches, 1000))
    np.testing.assert_allclose((found < 100).mean(), 0.8, atol=0.03)


def test_mix_once_repeats_nothing():
    mixed = mix_once([list(range(100)), list(range(200, 220))], (1.0, 1.0), seed=0)
    assert len(set(mixed)) == len(mixed) and sum(n < 100 for n in mixed) == sum(n >= 200 for n in mixed) == 20


@pytest.mark.parametrize("weights", [(1.0,), (1.0, 0.0), (1.0, -1.0), (1.0, float("nan")), (1.0, float("inf"))])
def test_wrong_weights(weights):
    with pytest.raises(UserError, match="weight"):
        document_batches([documents(4)] * 2, batch_size=1, length=LENGTH, pad_id=0, seed=0, weights=weights)
    with pytest.raises(UserError, match="weight"):
        memory(documents(4), weights=(*weights, 1.0))
    with pytest.raises(UserError, match="weight"):
        streamed_batches([opener([])] * 2, batch_size=1, length=LENGTH, pad_id=0, seed=0, weights=weights)


def test_a_streamed_source_without_rows_is_an_error_and_no_endless_search():
    with pytest.raises(UserError, match="no row that can be used"):
        next(streamed([]))


@pytest.fixture
def folder(tmp_path):
    """Six files of five texts; text n is in file n // 5."""
    for file in range(6):
        rows = [json.dumps({"text": str(5 * file + n)}) + "\n" for n in range(5)]
        (tmp_path / f"part-{file}.jsonl").write_text("".join(rows))
    return tmp_path


def of_folder(folder, seed, shard=(0, 1)):
    """The folder's texts as a stream, with no window that would shuffle them."""

    def open_source(start, one):
        assert one.shard == shard
        for row in read_rows(str(folder), "text", Rejects(), start=start, order=one.order, shard=one.shard):
            yield row.number, ([], [int(row.row.text) + 10, 2])

    return streamed_batches([open_source], batch_size=1, length=2, pad_id=0, seed=seed, window=1, shard=shard)


def test_each_pass_of_a_stream_has_an_order_of_files_of_its_own(folder):
    batches = of_folder(folder, 0)
    found = np.array([numbers(next(batches), 10) for _ in range(90)]).reshape(3, 6, 5)
    orders = [tuple(one[:, 0] // 5) for one in found]
    assert all(sorted(order) == list(range(6)) for order in orders) and len({*orders, tuple(range(6))}) == 4
    assert all((one == one[:, :1] + np.arange(5)).all() for one in found)  # a file's rows stay in their order
    other = of_folder(folder, 1)
    assert [numbers(next(other), 10) for _ in range(30)] != found[0].reshape(30, 1).tolist()
    # In the middle of the second pass another process goes on in the same order.
    batches = of_folder(folder, 0)
    for _ in range(43):
        next(batches)
    again = of_folder(folder, 0)
    again.set_state(json.loads(json.dumps(batches.get_state())))
    assert np.array([numbers(next(again), 10) for _ in range(47)]).tolist() == found.reshape(90, 1)[43:].tolist()


def test_hosts_read_their_shares_of_one_order_of_files(folder):
    shares = [of_folder(folder, 0, (host, 2)) for host in range(2)]
    first = [numbers(next(share), 10) for _ in range(15) for share in shares]
    batches = of_folder(folder, 0)
    assert first == [numbers(next(batches), 10) for _ in range(30)]


def test_a_stream_reads_one_window_ahead_and_no_further(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps({"text": str(n)}) + "\n" for n in range(10_000)))
    read = []

    def open_source(start, one):
        for row in read_rows(str(path), "text", Rejects(), start=start):
            read.append(row.number)
            yield row.number, ([], [5, 6])

    batches = streamed_batches([open_source], batch_size=2, length=8, pad_id=0, seed=0, window=32)
    next(batches)
    deadline = time.monotonic() + 20
    while len(read) < 64 and time.monotonic() < deadline:  # a thread reads while nobody asks
        time.sleep(0.01)
    time.sleep(0.1)
    assert 64 <= len(read) <= 72


def test_lengths_fall_into_few_buckets():
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 1000, 500).tolist()
    sizes = {bucket(n, longest=1000) for n in lengths}
    assert sizes == {32, 64, 128, 256, 512, 1000}
    assert all(n <= bucket(n, longest=1000) <= max(32, 2 * n) for n in lengths)
    assert bucket(3, smallest=1) == 4
    with pytest.raises(ValueError, match="1001 are more than 1000"):
        bucket(1001, longest=1000)
