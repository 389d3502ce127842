"""Prints the facts of the shipped launches as JSON: `python -m ia3rt.bench.compiled ARCH [PART OF THEIR NAMES]`."""

import json
import sys

from ia3rt.bench.compiled.build import build_all

print(json.dumps(build_all(*sys.argv[1:])))
