"""What of an adapter lies on one of several devices."""

import pytest
import torch

from ia3rt.adapters.bank import Bank
from ia3rt.adapters.device_table import DeviceTable
from ia3rt.adapters.site import Site

ROW = torch.arange(10.0)  # four sites: 0 and 1, 2 to 5, 6 to 8, 9


@pytest.mark.parametrize(
    ("widths", "row", "expected"),
    [
        ([2, 4, 3, 1], ROW, ROW),
        ([2, 0, 3, 0], ROW, torch.tensor([0.0, 1, 6, 7, 8])),
        ([0, 4, 0, 1], ROW, torch.tensor([2.0, 3, 4, 5, 9])),
        ([0, 0, 3, 1], ROW, ROW[6:]),
        ([2, 0, 3, 0], ROW[:6], torch.tensor([0.0, 1, 1, 1, 1])),  # read when the last two sites were not there yet
        ([0, 4, 0, 1], ROW[:2], torch.ones(5)),
        ([2, 4, 3, 1], ROW[:6], torch.tensor([0.0, 1, 2, 3, 4, 5, 1, 1, 1, 1])),
    ],
)
def test_a_row_is_written_where_its_sites_lie(widths, row, expected) -> None:
    table = DeviceTable(torch.full((3, sum(widths)), 7.0), widths, [2, 4, 3, 1])
    assert table.write(1, row) is None
    assert torch.equal(table.table[1], expected)
    assert (table.table[[0, 2]] == 7.0).all()
    assert [column.shape[1] for column in table.columns] == widths


def test_a_bank_of_two_devices_has_each_sites_columns_in_one_table() -> None:
    """On the CPU, and on the device of tensors without numbers."""
    sites = [Site("a", "out", 2), Site("b", "out", 4), Site("c", "in", 3)]
    meta, cpu = torch.device("meta"), torch.device("cpu")
    bank = Bank(sites, lambda site: meta if site.path == "b" else cpu, torch.float32, 2)
    vectors = {site: torch.rand(site.width) for site in sites}
    row = bank.add("x", vectors).row
    assert [each.device for each in bank.tables] == [cpu, meta] and bank.places == [0, 1, 0]
    assert torch.equal(bank.tables[0].table[row], torch.cat([vectors[sites[0]], vectors[sites[2]]]))
    assert {site: each.device for site, each in bank.vectors(bank.adapters["x"]).items()} == bank.devices
    assert bank.nbytes == 3 * 9 * 4 and bank.rows == 3
    with pytest.raises(ValueError, match="too many values"):
        _ = bank.table
