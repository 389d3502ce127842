"""What a checkpoint's vectors are in one model: at its sites, by the names that its modules have today."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor, nn

from ia3rt.adapters.bank import Bank
from ia3rt.adapters.checkpoint import Checkpoint
from ia3rt.adapters.host import HostRow
from ia3rt.adapters.packing import pack
from ia3rt.adapters.registry import read_whole
from ia3rt.adapters.site import Site, SiteKey
from ia3rt.modules import brought
from ia3rt.modules.adapter_sites import AdapterSites
from ia3rt.modules.alone import alone
from ia3rt.modules.parts import ReadingTheModels
from ia3rt.modules.renamed import by_todays_names
from ia3rt.routing.routing import Routing


class Reading:
    """Reads adapters for one model.

    Args:
        model: the model.
        bank: the rows and columns that the vectors are to have.
        sites: where they can act.
        routing: whose lock is taken where the bank is looked at.
        check_in_place: raises ValueError where the sites' names mean other layers by now.
    """

    def __init__(
        self,
        model: nn.Module,
        bank: Bank,
        sites: AdapterSites,
        routing: Routing,
        check_in_place: Callable[[], None],
    ) -> None:
        self._model, self._bank, self._sites, self._routing = model, bank, sites, routing
        self._check_in_place = check_in_place

    def vectors(self, name: str, checkpoint: Checkpoint) -> dict[Site, Tensor]:
        """An adapter's vectors by site, where the model may have none yet. Called with the lock.

        Raises:
            ValueError: one cannot act where it says.
        """
        return self._by_site(name, by_todays_names(self._model, checkpoint.vectors))

    def row(self, name: str, folder: Path, is_registered: bool) -> HostRow:
        """A registered adapter as a row of the bank; read in a thread that holds no lock, as the disk may be slow.

        Args:
            name: the adapter's.
            folder: where it is.
            is_registered: whether it was registered by name; else a function knows it.

        Raises:
            FileNotFoundError: its files are gone.
            ValueError: they are damaged or of another kind, or do not fit the model, or hold modules.
        """
        checkpoint, stamp = read_whole(name, folder, is_registered)
        with ReadingTheModels():
            read = by_todays_names(self._model, checkpoint.vectors)
            own = brought.of_file(self._model, name, checkpoint)
        if own.states:
            raise ValueError(
                f"adapter {name!r} has its own {', '.join(map(repr, own.states))} beside its vectors, which a "
                "registered adapter cannot have: load_adapter() it"
            )
        row, vectors = self._packed(name, read)
        row = row.to(self._bank.dtype)
        shared = frozenset(site for site, vector in vectors.items() if vector.numel() < site.width)
        return HostRow(
            folder,
            stamp,
            row.pin_memory() if self._bank.is_cuda else row,
            frozenset(vectors),
            shared,
            checkpoint.config,
        )

    @alone
    def _packed(self, name: str, read: Mapping[SiteKey, Tensor]) -> tuple[Tensor, dict[Site, Tensor]]:
        """A row of the bank; alone, as a load that fails takes columns back that it added."""
        self._check_in_place()
        for key in read:
            if key not in self._bank.sites:
                raise ValueError(
                    f"adapter {name!r} acts at {key[0]!r} ({key[1]}put), where the model has no site: name it in "
                    "patch(target_modules=…), or load_adapter() one that acts there before"
                )
        vectors = self._by_site(name, read)
        return pack(name, vectors, self._bank.sites, self._bank.dtype), vectors

    def _by_site(self, name: str, read: Mapping[SiteKey, Tensor]) -> dict[Site, Tensor]:
        return {self._sites.site(name, key): vector for key, vector in read.items()}
