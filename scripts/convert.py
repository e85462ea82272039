"""The quantization step: a checkpoint to a 4-bit MLX directory. The same as `magistral-mlx convert`.

python scripts/convert.py SOURCE --out DIR [--bits 4 --group-size 64 …]
"""

import sys

from magistral_mlx.cli.app import cli

if __name__ == "__main__":
    cli(["convert", *sys.argv[1:]], prog_name="magistral-mlx")
