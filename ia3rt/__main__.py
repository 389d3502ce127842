"""`python -m ia3rt` is the command `ia3rt`."""

from ia3rt.cli.main import app

app()
