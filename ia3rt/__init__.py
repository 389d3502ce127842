"""ia3rt runs many IA³ adapters on one PyTorch model."""

from pathlib import Path

__version__ = "0.1.0"

_here = Path(__file__).resolve().parent
if not (_here / "kernels").is_dir():
    # A checkout (or an editable install of one): kernels/ and bench/ stand beside this package, not inside it.
    __path__.append(str(_here.parent))

from ia3rt.adapters.mix import Mix  # noqa: E402
from ia3rt.adapters.site import Site  # noqa: E402
from ia3rt.modules.explanation import Explanation, SiteExplanation, explain  # noqa: E402
from ia3rt.patch import patch  # noqa: E402
from ia3rt.runtime import Runtime  # noqa: E402

__all__ = ["Explanation", "Mix", "Runtime", "Site", "SiteExplanation", "explain", "patch"]
