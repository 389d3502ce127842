"""`python -m ia3rt.cli` is the command `ia3rt`."""

from ia3rt.cli.main import app

app()
