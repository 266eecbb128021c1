"""`python -m dare_hf.cli`, for launchers that start modules."""

from dare_hf.cli import app

app()
