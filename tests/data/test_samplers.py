"""Shares of ranks and orders of epochs."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from vpl_lightning.data.samplers import TrainingSampler, UnpaddedDistributedSampler


@given(st.integers(0, 200), st.integers(1, 9))
def test_ranks_share_every_row_once(length, world_size):
    shares = [
        UnpaddedDistributedSampler(length, rank=rank, world_size=world_size) for rank in range(world_size)
    ]
    rows = [row for share in shares for row in share]
    assert sorted(rows) == list(range(length))
    assert [len(share) for share in shares] == [len(list(share)) for share in shares]
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@given(st.integers(1, 60), st.integers(1, 5), st.integers(0, 9), st.integers(0, 5))
def test_training_ranks_get_equally_many_and_share_none(length, world_size, seed, epoch):
    shares = []
    for rank in range(world_size):
        sampler = TrainingSampler(length, seed=seed, rank=rank, world_size=world_size)
        sampler.set_epoch(epoch)
        shares.append(list(sampler))
        assert len(shares[-1]) == len(sampler) == length // world_size
    counts = Counter(key % length for share in shares for key in share)
    assert set(counts.values()) <= {1}
    assert {key // length for share in shares for key in share} <= {epoch}


def test_orders_depend_on_seed_and_epoch():
    def order(seed, epoch):
        sampler = TrainingSampler(50, seed=seed)
        sampler.set_epoch(epoch)
        return [key % 50 for key in sampler]

    assert order(1, 2) == order(1, 2)
    assert len({tuple(order(*place)) for place in [(1, 2), (1, 3), (2, 2), (2, 1)]}) == 4
    assert order(1, 2) != sorted(order(1, 2))


def test_an_interrupted_epoch_goes_on_where_it_stopped():
    whole = TrainingSampler(31, seed=4, rank=1, world_size=2)
    whole.set_epoch(3)
    expected = list(whole)
    resumed = TrainingSampler(31, seed=4, rank=1, world_size=2)
    resumed.seek(3, start=6)
    resumed.set_epoch(3)
    assert list(resumed) == expected[6:]
    assert list(resumed) == expected
