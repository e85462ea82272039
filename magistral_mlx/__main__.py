"""`python -m magistral_mlx` is `magistral-mlx`."""

from .cli.app import cli

cli(prog_name="magistral-mlx")
