"""Several sets in one: their names, and an order that keeps to the weights over any stretch."""

from __future__ import annotations

import json
from collections import Counter
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch

from cppo_lightning.errors import ConfigError
from cppo_lightning.prompts import (
    BadRows,
    DatasetPrompts,
    LoadCounts,
    Mixture,
    PromptOrder,
    PromptSource,
    ReasoningGymPrompts,
    check_problems,
)
from cppo_lightning.verifiers import Problem, ReasoningGym

SUMS = ReasoningGymPrompts("chain_sum", 20, params={"max_digits": 1})


def sized(**sizes: int) -> list[Problem]:
    return [Problem(f"{name}/{i}", (), "", dataset=name) for name, size in sizes.items() for i in range(size)]


def written(path: Path, *rows: object) -> DatasetPrompts:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return DatasetPrompts(str(path))


def asked(number: int, **more: object) -> dict[str, object]:
    return {"id": number, "problem": f"{number} + 1?", "answer": number + 1, **more}


# --- the order ---------------------------------------------------------------------------------------------------------------


def test_without_shares_each_pass_is_one_shuffle_of_torch() -> None:
    """That of the seed ``seed * 1000003 + pass``: checkpoints hold a position and count on it."""
    problems = sized(a=4, b=3)
    for seed in (0, 5, 2**31 + 7):
        expected = []
        for epoch in range(3):
            generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
            expected += [problems[i] for i in torch.randperm(7, generator=generator).tolist()]
        assert PromptOrder(problems, seed).take(21) == expected
    assert [p.id for p in PromptOrder(problems, 0).take(7)] == ["b/0", "a/0", "b/1", "a/3", "a/2", "b/2", "a/1"]


SHARES = [
    {"a": 3, "b": 1},
    {"a": 1, "b": 3},
    {"a": 0.1, "b": 0.2, "c": 0.7},
    {"a": 1, "b": 1, "c": 1, "d": 1},
    {"a": 1e-3, "b": 5, "c": 2.5},
    {"a": 2**0.5, "b": 1},
]


@pytest.mark.parametrize("shares", SHARES)
def test_every_stretch_has_the_sets_in_proportion(shares: dict[str, float]) -> None:
    """Counted one by one: a prefix is off by at most (k - 1) / 2 problems of a set, a stretch by at most k - 1."""
    order = PromptOrder(sized(**dict.fromkeys(shares, 7)), 1, shares)
    total = sum(map(Fraction, shares.values()))
    seen: Counter[str] = Counter()
    low, high = dict.fromkeys(shares, Fraction(0)), dict.fromkeys(shares, Fraction(0))
    for n, problem in enumerate(order.take(3000), start=1):
        seen[problem.dataset] += 1
        for name in shares:
            off = seen[name] - n * Fraction(shares[name]) / total
            assert abs(off) <= Fraction(len(shares) - 1, 2) + Fraction(1, 10**9)
            low[name], high[name] = min(low[name], off), max(high[name], off)
    assert max(high[name] - low[name] for name in shares) <= len(shares) - 1 + 1e-9


def test_round_weights_are_exact_in_every_block() -> None:
    """0.1 + 0.2 + 0.7: in binary these have no sum of one, as they are written they do."""
    order = PromptOrder(sized(a=4, b=5, c=6), 0, {"a": 0.1, "b": 0.2, "c": 0.7})
    for _ in range(50):
        assert Counter(p.dataset for p in order.take(20)) == {"a": 2, "b": 4, "c": 14}
    orders = [
        PromptOrder(sized(a=4, b=5, c=6), 0, dict(zip("abc", shares, strict=True))).take(60)
        for shares in ((0.1, 0.2, 0.7), (1, 2, 7), (0.3, 0.6, 2.1))
    ]
    assert orders[0] == orders[1] == orders[2]
    sevens = PromptOrder(sized(a=4, b=5), 0, {"a": 4, "b": 3})
    assert "".join(p.dataset for p in sevens.take(14)) == "abababa" * 2


def test_every_set_goes_through_shuffles_of_its_own() -> None:
    taken = PromptOrder(sized(a=5, b=5, c=3), 2, {"a": 2, "b": 2, "c": 3}).take(700)
    passes = {}
    for name, size, count in (("a", 5, 200), ("b", 5, 200), ("c", 3, 300)):
        ids = [p.id for p in taken if p.dataset == name]
        assert len(ids) == count
        passes[name] = [tuple(ids[i : i + size]) for i in range(0, count, size)]
        assert all(sorted(one) == sorted(f"{name}/{i}" for i in range(size)) for one in passes[name])
        assert len(set(passes[name])) > 3, "each pass has an order of its own"
    together = [[i[2:] for i in one] == [i[2:] for i in other] for one, other in zip(passes["a"], passes["b"], strict=True)]
    assert sum(together) < 5, "sets of one size are not shuffled alike (by chance 1 pass in 120 is)"


def test_a_position_is_all_that_a_resumed_order_needs() -> None:
    problems, shares = sized(a=4, b=9, c=2), {"a": 5, "b": 1, "c": 2}
    whole = [p.id for p in PromptOrder(problems, 3, shares).take(400)]
    for position in (0, 1, 7, 8, 99, 250):
        resumed = PromptOrder(problems, 3, shares)
        resumed.position = position
        assert [p.id for p in resumed.take(100)] == whole[position : position + 100]
    assert [p.id for p in PromptOrder(problems, 3, {"a": 0.625, "b": 0.125, "c": 0.25}).take(400)] == whole, "in any unit"
    assert [p.id for p in PromptOrder(problems, 4, shares).take(400)] != whole
    far = PromptOrder(problems, 3, shares)
    far.position = 10**15
    assert Counter(p.dataset for p in far.take(800)) == {"a": 500, "b": 100, "c": 200}


@pytest.mark.parametrize(
    ("problems", "shares", "message"),
    [
        ([], None, "no problems to hand out"),
        (sized(a=2), {"a": 1, "b": 1}, r"no problem is left of \['b'\]"),
        (sized(a=2, b=1), {"a": 1}, "problem 'b/0' is of the set 'b', which has no weight"),
    ],
)
def test_orders_that_cannot_be(problems: list[Problem], shares: dict[str, float] | None, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PromptOrder(problems, 0, shares)


# --- the source --------------------------------------------------------------------------------------------------------------


def test_problems_carry_the_name_of_their_set(tmp_path: Path) -> None:
    first, second = written(tmp_path / "1.jsonl", asked(1), asked(2)), written(tmp_path / "2.jsonl", asked(2))
    mixture = Mixture({"one": first, "two": second}, {"one": 1, "two": 2})
    problems = mixture.load()
    assert [(p.id, p.dataset, p.answer) for p in problems] == [
        ("one/1", "one", "2"),
        ("one/2", "one", "3"),
        ("two/2", "two", "3"),
    ]
    assert [p.source for p in problems] == [f"{tmp_path}/1.jsonl:1", f"{tmp_path}/1.jsonl:2", f"{tmp_path}/2.jsonl:1"]
    assert mixture.shares() == {"one": 1, "two": 2}
    assert Mixture({"one": first}).shares() is None
    assert first.shares() is None


def test_bad_rows_of_all_sets_are_counted_and_named(tmp_path: Path) -> None:
    sources: dict[str, PromptSource] = {
        "one": written(tmp_path / "1.jsonl", asked(1), "{", asked(2, answer="")),
        "two": written(tmp_path / "2.jsonl", "{", asked(1)),
    }
    rows = BadRows(skip=True)
    assert [p.id for p in Mixture(sources).load(rows)] == ["one/1", "two/1"]
    assert rows.counts == LoadCounts(rows=5, bad=3)
    assert rows.reasons == {"not valid JSON": 2, "no answer": 1}
    assert rows.examples[2].startswith(f"{tmp_path}/2.jsonl:1: not valid JSON")
    with pytest.raises(ConfigError, match=r"1\.jsonl:2: not valid JSON"):
        Mixture(sources).load()
    sources["three"] = written(tmp_path / "3.jsonl", asked(1, answer=None))
    with pytest.raises(ConfigError, match=r"3\.jsonl has no problems: 1 no answer; first: .*3\.jsonl:1"):
        Mixture(sources).load(BadRows(skip=True))


def test_reasoning_gym_tasks_together() -> None:
    pytest.importorskip("reasoning_gym")
    mixture = Mixture({"sums": SUMS, "gcds": ReasoningGymPrompts("gcd", 10)}, {"sums": 1, "gcds": 1})
    rows = BadRows()
    problems = mixture.load(rows)
    assert len({p.id for p in problems}) == len(problems) == rows.rows - rows.repeated
    assert {p.metadata["task"] for p in problems if p.dataset == "gcds"} == {"gcd"}
    assert check_problems(problems, ReasoningGym()) == problems
    assert mixture.load() == problems


class Nothing(PromptSource):
    def load(self, bad_rows: BadRows | None = None) -> list[Problem]:
        return []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sources": {}}, r"sources must name at least one set, without '/', got \[\]"),
        ({"sources": {"a/b": SUMS}}, r"without '/', got \['a/b'\]"),
        ({"sources": {"": SUMS}}, "without '/'"),
        ({"sources": {"a": Mixture({"b": SUMS})}}, r"\['a'\] are mixtures themselves; name their sources here"),
        ({"sources": {"a": SUMS}, "weights": {"b": 1}}, r"weights must name the sets \['a'\], names \['b'\]"),
        ({"sources": {"a": SUMS, "b": SUMS}, "weights": {"a": 1}}, r"must name the sets \['a', 'b'\], names \['a'\]"),
        ({"sources": {"a": SUMS}, "weights": {}}, r"names \[\]"),
        ({"sources": {"a": SUMS}, "weights": {"a": 0}}, "'a' must be above 0, got 0; leave out a set"),
        ({"sources": {"a": SUMS}, "weights": {"a": -1.5}}, "must be above 0, got -1.5"),
        ({"sources": {"a": SUMS}, "weights": {"a": float("nan")}}, "must be above 0, got nan"),
        ({"sources": {"a": SUMS}, "weights": {"a": float("inf")}}, "must be above 0, got inf"),
        ({"sources": {"a": Nothing()}}, "'a' has no problems"),
    ],
)
def test_bad_mixtures(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Mixture(**settings).load()
