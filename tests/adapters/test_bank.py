"""The table of all resident adapters: rows, columns, what is resident, and what a mix of them is."""

import copy

import pytest
import torch

from ia3rt.adapters.bank import Bank
from ia3rt.adapters.mix import Mix
from ia3rt.adapters.site import Site

SITES = [Site("a.k", "out", 3), Site("a.down", "in", 5), Site("b.k", "out", 4)]


def make(capacity: int = 2, dtype: torch.dtype = torch.float32) -> Bank:
    return Bank(SITES, torch.device("cpu"), dtype, capacity)


def vectors(*sites: Site) -> dict[Site, torch.Tensor]:
    return {site: torch.rand(site.width) + 0.5 for site in sites or SITES}


def test_an_adapter_is_a_row_and_a_site_a_column_slice() -> None:
    bank, given = make(), vectors(SITES[0], SITES[2])
    adapter = bank.add("x", given)
    row = torch.cat([given[SITES[0]], torch.ones(5), given[SITES[2]]])
    assert torch.equal(bank.table[adapter.row], row) and torch.equal(bank.table[0], torch.ones(12))
    assert {site: list(vector) for site, vector in bank.vectors(adapter).items()} == {
        s: list(v) for s, v in given.items()
    }


def test_it_grows_by_rows_and_columns_and_keeps_what_is_there() -> None:
    bank, given = make(capacity=1), [vectors() for _ in range(3)]
    adapters = [bank.add(str(number), each) for number, each in enumerate(given)]
    late = Site("late", "out", 2)
    adapters.append(bank.add("wider", {late: torch.full((2,), 0.25)}))
    for adapter, each in zip(adapters, [*given, {late: torch.full((2,), 0.25)}], strict=True):
        held = bank.vectors(adapter)
        assert held.keys() == each.keys() and all(torch.equal(held[site], each[site]) for site in each)
    assert bank.table.shape[1] == 14 and torch.equal(bank.table[adapters[0].row, 12:], torch.ones(2))


def test_a_freed_row_is_used_again_and_the_old_adapter_is_not_the_new_one() -> None:
    bank = make(capacity=1)
    old = bank.add("x", vectors())
    row, table = old.row, bank.table
    assert bank.adapters.remove("x") is old and "x" not in bank.adapters
    del old
    assert bank.add("x", vectors()).row == row and bank.table is table


def test_a_row_that_somebody_holds_is_not_used_again() -> None:
    bank = make(capacity=1)
    held = bank.resolve(Mix((bank.add("x", vectors()).name,)))
    bank.adapters.remove("x")
    new = bank.add("x", vectors())
    assert new is not held.adapters[0] and new.row != held.rows[0]


@pytest.mark.parametrize("is_first", [False, True], ids=["bank last", "bank first"])
def test_a_row_that_nobody_holds_in_a_copy_is_free_there(is_first) -> None:
    bank = make(capacity=2)
    bank.add("x", vectors())
    held = bank.resolve(Mix(("x",)))
    bank.adapters.remove("x")
    bank.add("y", vectors())
    copied = copy.deepcopy(bank)
    table = copied.table
    assert copied.add("z", vectors()).row == held.rows[0] and copied.table is table
    copied, still = copy.deepcopy((bank, held)) if is_first else copy.deepcopy((held, bank))[::-1]
    table = copied.table
    del still
    assert copied.add("z", vectors()).row == held.rows[0] and copied.table is table
    copied, still = copy.deepcopy((bank, held)) if is_first else copy.deepcopy((held, bank))[::-1]
    numbers = copied.table[held.rows[0]].clone()
    assert copied.add("z", vectors()).row != held.rows[0], "it is held there too"
    assert torch.equal(copied.table[held.rows[0]], numbers)
    table = copied.table
    del still
    free = [copied.add(f"new {number}", vectors()).row for number in range(2)]
    assert len(set(free)) == 2 and held.rows[0] in free and copied.table is table


def test_delta_is_a_weighted_sum_with_the_identity() -> None:
    bank = make()
    a = bank.add("a", vectors())
    resolved = bank.resolve(Mix(("a",), (0.25,), "delta"))
    assert (resolved.rows, resolved.weights) == ((0, a.row), (0.75, 0.25))


def test_a_weighted_sum_is_one_where_none_of_its_adapters_acts() -> None:
    bank = make()
    a, b = bank.add("a", vectors(SITES[0])), bank.add("b", vectors(SITES[1]))
    resolved = bank.resolve(Mix(("a", "b"), (0.5, 2.0), "linear"))
    summed = sum(weight * bank.table[row] for row, weight in zip(resolved.rows, resolved.weights, strict=True))
    assert torch.equal(summed[8:], torch.ones(4))
    expected = 0.5 * bank.table[a.row, :3] + 2.0 * bank.table[b.row, :3]
    torch.testing.assert_close(summed[:3], expected)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), 1e6])
def test_what_the_table_cannot_hold_is_refused_and_changes_nothing(number) -> None:
    bank = make(dtype=torch.float16)
    before, given = bank.table.clone(), vectors()
    given[SITES[1]][2] = number
    with pytest.raises(ValueError, match=r"'x'.*(a\.down|float16)"):
        bank.add("x", given)
    assert torch.equal(bank.table, before) and not bank.adapters


def test_a_vector_of_another_width_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'x' has a vector of shape \(4,\) at a\.k .*expected 3"):
        make().add("x", {SITES[0]: torch.ones(4)})


@pytest.mark.parametrize("wide", [False, True], ids=["a row", "a row and a column"])
@pytest.mark.parametrize("capacity", [2, 8])
def test_what_was_added_is_taken_back_where_what_follows_fails(wide, capacity):
    sites = [Site("a", "out", 3), Site("b", "in", 2)]
    bank = Bank(sites[:1], torch.device("cpu"), torch.float32, capacity=capacity)
    for name in "xy":
        bank.add(name, {sites[0]: torch.rand(3)})
    table, was, free = bank.table, bank.table[: 2 + 1].clone(), list(bank._free.rows)
    with pytest.raises(KeyboardInterrupt), bank.all_or_nothing():
        bank.add("z", {site: torch.rand(site.width) for site in (sites if wide else sites[:1])})
        raise KeyboardInterrupt
    assert bank.table is table and torch.equal(bank.table[: 2 + 1], was)
    assert (list(bank.sites.values()), list(bank.adapters), bank._free.rows) == (sites[:1], ["x", "y"], free)
    bank.add("z", {sites[0]: torch.rand(3)})
