"""What the torch backend composes when a mix is set."""

import os
import subprocess
import sys

COUNT = """
import os, time
from pathlib import Path
import torch
from ia3rt.adapters.bank import Bank
from ia3rt.adapters.mix import Mix
from ia3rt.adapters.site import Site
from ia3rt.routing.route import Route
from ia3rt.routing.routing import Routing

def woken():
    "How often the other threads of this process went to sleep again."
    lines = (line for task in Path("/proc/self/task").iterdir() if task.name != str(os.getpid())
             for line in (task / "status").read_text().splitlines())
    return sum(int(line.split()[1]) for line in lines if line.startswith("voluntary_ctxt_switches"))

def parallel_regions(run):
    run()
    time.sleep(0.3)
    before = woken()
    for _ in range(20):
        run()
        time.sleep(0.005)  # the threads fall asleep
    time.sleep(0.3)
    return woken() - before

torch.set_num_threads(2)
sites = [Site(f"layers.{n}", "out", 1920) for n in range(100)]  # 192,000 numbers: several pieces
bank = Bank(sites, torch.device("cpu"), torch.float32, 4)
for name in "abc":
    bank.add(name, {site: torch.rand(site.width) for site in sites})
routing = Routing(bank, "torch", False)
mixes = [bank.resolve(mix) for mix in (
    Mix(()), Mix(("a",)), Mix(("a", "b", "c")), Mix(("a", "b"), (0.3, 0.4), "linear"), Mix(("c",), (0.5,), "delta"))]
whole = torch.ones(bank.total_width)
print(parallel_regions(lambda: whole.mul_(1.5)))
print(sum(parallel_regions(lambda: routing.wear_everywhere(Route((mix,)))) for mix in mixes))
print(parallel_regions(lambda: routing.wear_here(Route.by_row([*mixes, *mixes]))))
vectors = {site: torch.rand(site.width) for site in sites[1:]}
print(parallel_regions(lambda: (bank.add("d", vectors), bank.adapters.remove("d"))))
"""


def test_switching_waits_for_no_other_thread() -> None:
    """A parallel region would wait for its threads, and these, where the cores are busy, for other processes."""
    environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    environment |= {"OMP_WAIT_POLICY": "passive", "KMP_BLOCKTIME": "0"}  # threads sleep at once, so that it is seen
    run = subprocess.run([sys.executable, "-c", COUNT], env=environment, capture_output=True, text=True, timeout=100)
    assert run.returncode == 0, run.stderr
    shared, switched, routed, added = map(int, run.stdout.split())
    assert shared >= 10, "an operation that torch shares between threads was not seen"
    assert switched == routed == added == 0
