"""The command `doctor`: its checks as a list, and one JSON file to attach to an issue."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from .common import writable

if TYPE_CHECKING:
    from magistral_mlx.measure.doctor import Check
    from magistral_mlx.measure.figures import Json


@click.command()
@click.option(
    "--json",
    "file",
    type=click.Path(dir_okay=False, path_type=Path),
    default=Path("doctor.json"),
    show_default=True,
    help="File for the report.",
)
def doctor(file: Path) -> None:
    """Check that this machine computes correctly.

    Takes half a minute, downloads nothing. Writes one JSON file, to be attached to an issue: chip, memory,
    versions and results; no names, no paths. Exit code 1 if a check fails.
    """
    from magistral_mlx.measure.doctor import examine

    writable(file)
    report = examine(_show)
    file.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    click.echo(f"\n{_machine(report)}\n{file}: this report. Open an issue with it, whatever it says.")
    if not report["right"]:
        sys.exit(1)


def _show(check: "Check") -> None:
    click.echo(f"{click.style('✓', fg='green') if check.right else click.style('✗', fg='red')} {check.name}")
    click.echo(click.style(f"  {check.found}", dim=True))


def _machine(report: "Json") -> str:
    machine, versions = report["machine"], report["versions"]
    return (
        f"{machine['chip']}, {machine['memory_bytes'] / 2**30:.0f} GB, {machine['system']}, "
        f"computing on the {report['device']['type']}, mlx {versions['mlx']}, Python {versions['python']}"
    )
