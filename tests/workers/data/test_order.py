"""The order against its promises, for any counts: every sample once per epoch, the same batches on any ranks."""

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from sigray.workers.data.order import LaneSlice, SampleRef, StreamOrder
from tests.helpers.reference import samples_of

orders = st.builds(
    lambda sizes, **settings_of_order: StreamOrder([sizes], **settings_of_order),
    st.lists(st.integers(0, 25), min_size=1, max_size=8),
    seed=st.integers(0, 2**31),
    num_lanes=st.integers(1, 9),
    shuffle_window=st.integers(1, 20),
)


def sample_at(order, position):
    lane, index = position % order.num_lanes, position // order.num_lanes
    (ref,) = samples_of(order, LaneSlice(lane, index, index + 1))
    return ref


@settings(max_examples=80)
@given(order=orders)
def test_every_sample_once_per_epoch(order):
    assume(order.num_samples)
    every = {(shard, index): 1 for shard, size in enumerate(order.datasets[0].shard_sizes) for index in range(size)}
    for epoch in range(3):
        refs = [sample_at(order, epoch * order.num_samples + i) for i in range(order.num_samples)]
        assert {ref.epoch for ref in refs} == {epoch}
        assert Counter((ref.shard, ref.index) for ref in refs) == every


@settings(max_examples=80)
@given(order=orders, batch=st.sampled_from([12, 24]), step=st.integers(0, 20))
def test_ranks_cut_the_same_global_batch(order, batch, step):
    assume(order.num_samples)
    whole = [ref for piece in order.rank_part(step, batch, 0, 1) for ref in samples_of(order, piece)]
    positions = [sample_at(order, position) for position in range(step * batch, (step + 1) * batch)]
    assert Counter(whole) == Counter(positions)
    for world_size in (1, 2, 3, 4, 6):
        parts = [order.rank_part(step, batch, rank, world_size) for rank in range(world_size)]
        refs = [[ref for piece in part for ref in samples_of(order, piece)] for part in parts]
        assert {len(part) for part in refs} == {batch // world_size}
        assert [ref for part in refs for ref in part] == whole


def test_lane_asked_out_of_turn_gives_the_same_answer():
    sizes, settings_of_order = [[5, 9, 4]], {"seed": 3, "num_lanes": 2, "shuffle_window": 4}
    straight = [sample_at(StreamOrder(sizes, **settings_of_order), position) for position in range(60)]
    order = StreamOrder(sizes, **settings_of_order)
    jumping = {position: sample_at(order, position) for position in reversed(range(60))}
    assert [jumping[position] for position in range(60)] == straight


def test_seed_and_epoch_change_the_order():
    sizes = [[50, 50]]
    first, other_seed = (StreamOrder(sizes, seed=seed, num_lanes=1, shuffle_window=100) for seed in (0, 1))
    order = [[(ref.shard, ref.index) for ref in samples_of(o, LaneSlice(0, 0, 100))] for o in (first, other_seed)]
    next_epoch = [(ref.shard, ref.index) for ref in samples_of(first, LaneSlice(0, 100, 200))]
    assert len({tuple(refs) for refs in (*order, next_epoch)}) == 3


def test_order_of_a_release_is_pinned():
    """A resumed run computes its order again: should these numbers change, old runs no longer resume."""
    order = StreamOrder([[4, 3, 5]], seed=7, num_lanes=2, shuffle_window=4)
    refs = [sample_at(order, position) for position in range(12)]
    assert [(ref.shard, ref.index) for ref in refs] == [
        (1, 2),
        (2, 3),
        (1, 0),
        (2, 4),
        (1, 1),
        (0, 0),
        (2, 2),
        (0, 2),
        (2, 0),
        (0, 3),
        (2, 1),
        (0, 1),
    ]


def test_batch_that_does_not_divide_is_refused():
    order = StreamOrder([[30]], seed=0, num_lanes=2, shuffle_window=4)
    with pytest.raises(ValueError, match="10 does not divide by 3"):
        order.rank_part(0, 10, 0, 3)


mixes = st.builds(
    lambda parts, starts, **settings_of_order: StreamOrder(
        [sizes for sizes, _, _ in parts],
        [weight for _, weight, _ in parts],
        [(start, [weights[number] for _, _, weights in parts]) for number, start in enumerate(sorted(starts))],
        **settings_of_order,
    ),
    st.lists(
        st.tuples(
            st.lists(st.integers(1, 25), min_size=1, max_size=4),
            st.floats(0.01, 100),
            st.tuples(st.floats(0.01, 100), st.floats(0.01, 100)),
        ),
        min_size=2,
        max_size=4,
    ),
    st.lists(st.integers(1, 300), max_size=2, unique=True),
    seed=st.integers(0, 2**31),
    num_lanes=st.integers(1, 5),
    shuffle_window=st.integers(1, 20),
)


@settings(max_examples=100)
@given(order=st.one_of(orders, mixes), lane=st.integers(0, 19), start=st.integers(0, 100), length=st.integers(0, 150))
def test_places_are_those_of_the_samples_one_by_one(order, lane, start, length):
    assume(order.num_samples)
    piece = LaneSlice(lane % (order.num_lanes * len(order.datasets)), start, start + length)
    places = order.places(piece)
    assert (places.dtype, places.shape) == (np.int64, (length, 3))
    assert [SampleRef(*place) for place in places.tolist()] == list(samples_of(order, piece))


@settings(max_examples=60)
@given(order=mixes, batch=st.sampled_from([6, 12, 60]))
def test_mixed_datasets_keep_their_own_epochs(order, batch):
    """Slow twin: count the samples of the steps one by one."""
    seen: list[list] = [[] for _ in order.datasets]
    for step in range(12):
        refs = [
            (piece.lane // order.num_lanes, ref)
            for piece in order.rank_part(step, batch, 0, 1)
            for ref in samples_of(order, piece)
        ]
        assert len(refs) == batch
        parts = [order.rank_part(step, batch, rank, 3) for rank in range(3)]
        assert [
            (p.lane // order.num_lanes, ref) for part in parts for p in part for ref in samples_of(order, p)
        ] == refs
        for dataset, ref in refs:
            seen[dataset].append(ref)
    for number, (dataset, refs) in enumerate(zip(order.datasets, seen, strict=True)):
        assert len(refs) == order.num_of_dataset(number, 12 * batch)
        size, whole = dataset.num_samples, len(refs) // dataset.num_samples
        by_epoch = Counter(ref.epoch for ref in refs)
        # Lanes run through the epoch's end at their own positions of one step, so epochs are counted, not sliced.
        assert all(by_epoch[epoch] == size for epoch in range(whole))
        times = Counter((ref.epoch, ref.in_manifest) for ref in refs)
        assert set(times.values()) <= {1}
        first = sum(len(before.shard_sizes) for before in order.datasets[:number])
        assert {ref.shard for ref in refs} <= set(range(first, first + len(dataset.shard_sizes)))


@settings(max_examples=60)
@given(
    weights=st.lists(st.floats(0.05, 20), min_size=2, max_size=5),
    first=st.integers(0, 20_000),
    length=st.integers(1, 5000),
)
def test_every_stretch_has_its_shares(weights, first, length):
    order = StreamOrder([[10]] * len(weights), weights, seed=0, num_lanes=2, shuffle_window=4)
    for number, weight in enumerate(weights):
        count = order.num_of_dataset(number, first + length) - order.num_of_dataset(number, first)
        # Shares are rounded to 1/4096, and the round robin is at most one sample per dataset off.
        assert abs(count - length * weight / sum(weights)) <= len(weights) + length * len(weights) / 4096
    assert sum(order.num_of_dataset(n, first) for n in range(len(weights))) == first


@settings(max_examples=60)
@given(
    mixes=st.lists(st.tuples(st.integers(1, 5000), st.floats(0.05, 20), st.floats(0, 20)), max_size=3),
    first=st.integers(0, 6000),
    length=st.integers(0, 3000),
)
def test_changed_weights_hold_from_their_start(mixes, first, length):
    """Slow twin: each stretch between two changes is one of an order of those weights alone, from its beginning."""
    options = {"seed": 0, "num_lanes": 2, "shuffle_window": 4}
    mixes = sorted({start: (start, (a, b)) for start, a, b in mixes}.values())
    order = StreamOrder([[10], [7]], (1.0, 2.0), mixes, **options)
    bounds = [(0, (1.0, 2.0)), *mixes, (10**9, (1.0, 1.0))]
    for number in (0, 1):
        expected = 0
        for (start, weights), (end, _) in itertools.pairwise(bounds):
            alone = StreamOrder([[10], [7]], weights, **options)
            low, high = (min(max(place, start), end) - start for place in (first, first + length))
            expected += alone.num_of_dataset(number, high) - alone.num_of_dataset(number, low)
        assert order.num_of_dataset(number, first + length) - order.num_of_dataset(number, first) == expected


def test_a_weight_of_zero_leaves_a_dataset_out():
    order = StreamOrder([[10], [7], [5]], (1, 1, 1), [(30, (1, 0, 0.0001)), (5000, (0, 1, 0))], seed=0, num_lanes=2,
                        shuffle_window=4)  # fmt: skip
    given = [[order.num_of_dataset(number, place) for number in range(3)] for place in (30, 30 + 4096, 5000, 5010)]
    assert given == [[10, 10, 10], [10 + 4095, 10, 11], [4979, 10, 11], [4979, 20, 11]]


def test_next_index_is_the_first_that_no_step_has_taken():
    order = StreamOrder([[40, 9], [21]], [3, 1], seed=1, num_lanes=3, shuffle_window=5)
    taken = [0] * 6
    for step in range(30):
        assert [order.next_index(lane, step, 7) for lane in range(6)] == taken
        for piece in order.rank_part(step, 7, 0, 1):
            assert piece.start == taken[piece.lane]
            taken[piece.lane] = piece.stop


@pytest.mark.parametrize("weights", [(1.0,), (3.0, 1.0)])
def test_parts_are_cuts_of_the_batch_with_many_lanes(weights):
    """`rank_part` works on all lanes at once; the loop over `batch` is its slow twin."""
    order = StreamOrder([[5000, 70]] * len(weights), weights, seed=1, num_lanes=37, shuffle_window=64)
    for step, world_size in ((0, 4), (3, 6), (50, 12), (7, 120)):
        pairs = [
            (piece.lane, index)
            for piece in order.rank_part(step, 120, 0, 1)
            for index in range(piece.start, piece.stop)
        ]
        parts = [order.rank_part(step, 120, rank, world_size) for rank in range(world_size)]
        cut = [[(piece.lane, index) for piece in part for index in range(piece.start, piece.stop)] for part in parts]
        size = 120 // world_size
        assert cut == [pairs[rank * size : (rank + 1) * size] for rank in range(world_size)]
        assert all(type(value) is int for part in parts for piece in part for value in (piece.start, piece.stop))
