from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medforge.config import DataConfig
from medforge.convert.common import UNSPLIT
from medforge.convert.splits import Member, assign, by_study, groups

SHARES = {"test": 0.2, "validation": 0.1}
MEMBERS = st.lists(
    st.builds(
        Member,
        study=st.sampled_from([f"s{n}" for n in range(12)]),
        images=st.lists(st.sampled_from([f"i{n}" for n in range(20)]), max_size=2, unique=True).map(tuple),
        split=st.sampled_from(["train", "test"]),
    ),
    max_size=40,
)


@given(MEMBERS, st.integers(0, 5))
def test_no_image_and_no_study_straddles_splits(members: list[Member], seed: int) -> None:
    dealt = by_study(members, SHARES, seed)
    where: dict[str, set[str]] = {}
    for member, split in zip(members, dealt, strict=True):
        for key in (f"study {member.study}", *member.images):
            where.setdefault(key, set()).add(split)
    assert all(len(splits) == 1 for splits in where.values())
    if len(set(groups(members))) >= 3:
        assert set(dealt) == {"train", "validation", "test"}


@given(MEMBERS, st.integers(0, 5), st.randoms())
def test_dealing_does_not_depend_on_the_order(members: list[Member], seed: int, random: object) -> None:
    order = list(range(len(members)))
    random.shuffle(order)  # type: ignore[attr-defined]
    dealt = by_study(members, SHARES, seed)
    assert by_study([members[n] for n in order], SHARES, seed) == [dealt[n] for n in order]


def test_groups_hang_together_over_images_and_studies() -> None:
    members = [Member("a", ("1",), ""), Member("b", ("1", "2"), ""), Member("c", ("2",), ""), Member("d", ("3",), "")]
    assert groups(members) == ["image:1", "image:1", "image:1", "image:3"]
    assert groups([Member("text", (), "")]) == ["study:text"]


def test_shares_are_met_and_a_study_keeps_its_place_when_others_come() -> None:
    members = [Member(str(n), (f"{n}",), "train") for n in range(2000)]
    counts = Counter(by_study(members, SHARES, 1))
    assert abs(counts["test"] - 400) < 60
    assert abs(counts["validation"] - 200) < 45
    assert by_study(members[:1500], SHARES, 1) == by_study(members, SHARES, 1)[:1500]
    assert by_study(members, SHARES, 2) != by_study(members, SHARES, 1)


@pytest.mark.parametrize(("count", "expected"), [(1, ["train"]), (2, ["test", "train"])])
def test_few_studies(count: int, expected: list[str]) -> None:
    for seed in range(20):
        members = [Member(str(n), (), "train") for n in range(count)]
        dealt = set(by_study(members, SHARES, seed))
        assert "train" in dealt
        assert len(dealt) == len(expected)


def test_validation_is_carved_from_train_only_where_there_is_none() -> None:
    members = [Member(str(n % 50), (), "train" if n < 100 else "test") for n in range(150)]
    splits = assign(members, DataConfig(validation_share=0.2), 0)
    assert splits[100:] == ["test"] * 50
    assert 0 < splits.count("validation") < 40
    assert splits[:50] == splits[50:100]  # both samples of a study
    assert assign(members, DataConfig(validation_share=0), 0) == [m.split for m in members]
    own = [*members, Member("v", (), "validation")]
    assert assign(own, DataConfig(validation_share=0.2), 0) == [m.split for m in own]


def test_samples_without_a_split_are_dealt() -> None:
    members = [Member(str(n), (), UNSPLIT) for n in range(100)]
    assert set(assign(members, DataConfig(), 0)) == {"train", "validation", "test"}
