"""Who is asked: the wanted class before others, few messages, little imbalance."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from experts.replicas import MESSAGE_S, ActorLoad, Reach, best_left, choose, rank, wanted_class
from experts.shares import Place

NAMES = ("a", "b", "c", "d")
CLASSES = ("own", "gpu")
reaches = st.builds(
    Reach,
    st.frozensets(st.sampled_from(NAMES)),
    st.fixed_dictionaries(dict.fromkeys(NAMES, st.sampled_from(CLASSES))),
    st.just("own"),
)
name_lists = st.lists(st.sampled_from(NAMES), unique=True).map(tuple)
ALL_OWN = dict.fromkeys(NAMES, "own")


def _reach(*present: str, **classes: str) -> Reach:
    return Reach(frozenset(present), ALL_OWN | classes, "own")


@given(name_lists, name_lists, reaches)
def test_everybody_who_can_be_asked_is_ranked_once(
    owners: tuple[str, ...], fallbacks: tuple[str, ...], reach: Reach
) -> None:
    ranked = [place for tier in rank(owners, fallbacks, reach) for place in tier]
    assert len(ranked) == len(set(ranked))
    assert set(ranked) == ({*owners, *fallbacks} & reach.present) | {None}


@given(name_lists, name_lists, reaches)
def test_wanted_class_comes_first(owners: tuple[str, ...], fallbacks: tuple[str, ...], reach: Reach) -> None:
    wanted = wanted_class(owners, reach)
    classes = [
        {reach.own_class if place is None else reach.class_of[place] for place in tier}
        for tier in rank(owners, fallbacks, reach)
    ]
    assert all(len(each) == 1 for each in classes), "equals are of one class"
    is_wanted = [wanted in each for each in classes]
    assert is_wanted == sorted(is_wanted, reverse=True)


def test_owners_then_copies_then_here() -> None:
    assert rank(("a", "b"), ("c", "a"), _reach("a", "b", "c")) == (("a", "b"), ("c",), (None,))


def test_expert_without_owners_stays_here() -> None:
    assert rank((), ("c",), _reach("c")) == ((None,), ("c",))


def test_lost_owner_s_class_is_looked_for_elsewhere_first() -> None:
    """All owners compute on another kind of device than the router: a copy of their class keeps the bits."""
    reach = _reach("c", "d", a="gpu", d="gpu")
    assert rank(("a",), ("c", "d"), reach) == (("d",), ("c",), (None,))


def test_class_that_some_owner_shares_with_this_process_is_wanted() -> None:
    reach = _reach("a", "b", a="gpu")
    assert rank(("a", "b"), (), reach) == (("b",), (None,), ("a",))


def test_best_left_passes_over_tiers_that_were_tried() -> None:
    tiers: tuple[tuple[Place, ...], ...] = (("a", "b"), ("c",), (None,))
    assert best_left(tiers, frozenset({"a"})) == ("b",)
    assert best_left(tiers, frozenset({"a", "b"})) == ("c",)
    assert best_left(tiers, frozenset({"a", "b", "c"})) == (None,)
    assert best_left(tiers, frozenset({"a", "b", "c", None})) == ()


def _loads(**row_s: float) -> dict[str, ActorLoad]:
    return {name: ActorLoad(0, seconds) for name, seconds in row_s.items()}


def test_few_rows_go_where_somebody_is_asked_anyway() -> None:
    loads = _loads(a=MESSAGE_S / 100, b=MESSAGE_S / 100)
    assert choose([1, 1, 1], [("a", "b"), ("b",), ("a", "b")], loads.__getitem__) == ["b", "b", "b"]


def test_few_rows_that_anybody_can_compute_take_one_message() -> None:
    loads = _loads(a=MESSAGE_S / 100, b=MESSAGE_S / 100)
    assert choose([1] * 8, [("a", "b")] * 8, loads.__getitem__) == ["a"] * 8


def test_many_rows_are_shared_out() -> None:
    loads = _loads(a=MESSAGE_S, b=MESSAGE_S)
    places = choose([10] * 8, [("a", "b")] * 8, loads.__getitem__)
    assert places.count("a") == places.count("b") == 4


def test_slow_actor_gets_less() -> None:
    loads = _loads(a=3 * MESSAGE_S, b=MESSAGE_S)
    places = choose([10] * 8, [("a", "b")] * 8, loads.__getitem__)
    assert places.count("b") == 3 * places.count("a")


def test_busy_actor_is_spared() -> None:
    loads = {"a": ActorLoad(1000, MESSAGE_S), "b": ActorLoad(0, MESSAGE_S)}
    assert choose([1, 1], [("a", "b")] * 2, loads.__getitem__) == ["b", "b"]


@given(
    st.lists(st.tuples(st.integers(1, 50), name_lists.filter(bool)), min_size=1, max_size=12),
    st.dictionaries(st.sampled_from(NAMES), st.floats(1e-6, 1e-2)),
)
def test_choice_is_allowed_repeatable_and_close_to_balanced(
    wanted: list[tuple[int, tuple[str, ...]]], row_s: dict[str, float]
) -> None:
    counts = [count for count, _ in wanted]
    equals = [names for _, names in wanted]
    loads = {name: ActorLoad(0, row_s.get(name, 1e-5)) for name in NAMES}
    places = choose(counts, equals, loads.__getitem__)
    assert all(place in names for place, names in zip(places, equals, strict=True))
    assert places == choose(counts, equals, loads.__getitem__)
    busy_s = dict.fromkeys(NAMES, 0.0)
    for place, count in zip(places, counts, strict=True):
        assert place is not None
        busy_s[place] += count * loads[place].row_s
    free = sorted((i for i in range(len(counts)) if len(equals[i]) > 1), key=lambda i: -counts[i])
    for place in {places[i] for i in free}:
        last = next(i for i in reversed(free) if places[i] == place)
        for other in equals[last]:  # whoever else could have had it would not have been done sooner
            assert place is not None
            otherwise_s = busy_s[other] + counts[last] * loads[other].row_s + MESSAGE_S
            assert busy_s[place] <= otherwise_s + 1e-9
