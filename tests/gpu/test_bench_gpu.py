"""`ia3rt bench --graph` on a GPU: every contender is captured, and computes what it computes without."""

import pytest
import torch

from ia3rt.bench.contenders.registry import CONTENDERS
from ia3rt.bench.runner import run
from ia3rt.bench.settings import Effort, Settings

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")

ONCE = Effort(least=1, most=1, seconds=0, sample=0)


@pytest.mark.parametrize("suite", ["forward", "mixed", "generate"])
def test_captured_cases(suite) -> None:
    contenders = [name for name in CONTENDERS if not name.endswith("-compiled")]
    given = dict(model="tiny", device=torch.device("cuda"), dtype=torch.bfloat16, quick=True, graph=True, effort=ONCE)
    result = run(Settings([suite], contenders, **given))
    assert not result.failures
    graphed = [case for case in result.cases if case.parameters.keys() & {"mode", "cache"}]
    assert len(graphed) == len(result.cases) / 2
    for case in graphed:
        assert {"base", "peft", "ia3rt"} <= {measured.contender for measured in case.measurements}
        assert case.reference == "base" and case.control is not None
