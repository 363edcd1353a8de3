"""Every error a user can meet.

Each has a stable code and says three things: what is wrong, where, and how to fix it. Commands print
them without a traceback and exit with status 2.
"""

from __future__ import annotations

__all__ = [
    "CheckpointError",
    "ConfigError",
    "DataError",
    "EngineError",
    "FormatError",
    "LatentizeError",
    "NumericsError",
    "OptionError",
    "OutputError",
    "ResourceError",
    "ResumeError",
    "UnsupportedModelError",
]


class LatentizeError(Exception):
    """Base of all user-facing errors.

    Args:
        what: What is wrong, one sentence.
        where: The file, tensor, config key or option that is concerned.
        fix: What the user can do about it.
        code: Of this very refusal; by default that of the class.
    """

    code = "LZ000"

    def __init__(self, what: str, *, where: str = "", fix: str = "", code: str = "") -> None:
        self.what, self.where, self.fix = what, where, fix
        self.code = code or self.code
        super().__init__(self.__str__())

    def __str__(self) -> str:
        lines = [f"{self.code} {self.what}"]
        if self.where:
            lines.append(f"  where: {self.where}")
        if self.fix:
            lines.append(f"  fix:   {self.fix}")
        return "\n".join(lines)


class CheckpointError(LatentizeError):
    """The files of a checkpoint are missing, damaged, or contradict each other."""

    code = "LZ101"


class ConfigError(LatentizeError):
    """``config.json`` is missing, malformed, or contradicts the tensors."""

    code = "LZ102"


class UnsupportedModelError(LatentizeError):
    """The architecture, or a feature that it uses, is not one that can be converted."""

    code = "LZ201"


class FormatError(LatentizeError):
    """The chosen output format cannot carry what the model or the method needs."""

    code = "LZ202"


class OptionError(LatentizeError):
    """A command-line option, recipe entry or argument has an impossible value."""

    code = "LZ301"


class DataError(LatentizeError):
    """Calibration or evaluation text is missing, unreadable, or too short."""

    code = "LZ302"


class EngineError(LatentizeError):
    """An inference engine is missing, stops, or computes something else than the model."""

    code = "LZ501"


class OutputError(LatentizeError):
    """The output folder cannot be written, or would overwrite something."""

    code = "LZ401"


class ResumeError(LatentizeError):
    """Something unfinished is there that was not asked for, or is of something else."""

    code = "LZ410"


class ResourceError(LatentizeError):
    """Memory or disk do not suffice."""

    code = "LZ420"


class NumericsError(LatentizeError):
    """Conversion computed something that is not a finite number."""

    code = "LZ601"
