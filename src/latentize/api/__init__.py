"""The functions behind the commands."""

from latentize.api.making import convert, heal
from latentize.api.measuring import bench, compare, evaluate
from latentize.api.reporting import extend_report, report, require_report
from latentize.api.using import export, generate, verify
from latentize.families.opening import open_source

__all__ = [
    "bench",
    "compare",
    "convert",
    "evaluate",
    "export",
    "extend_report",
    "generate",
    "heal",
    "open_source",
    "report",
    "require_report",
    "verify",
]
