"""Every error a user can meet.

Each has a stable code and says three things: what is wrong, where, and how to fix it. Commands print
them without a traceback and exit with status 2.
"""

from __future__ import annotations

__all__ = [
    "CODES",
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


# What each code stands for, and what can be done; docs/errors.md is made of it.
CODES: dict[str, tuple[str, str]] = {
    "LZ101": ("no weights that can be read", "Is it the folder of a model, with .safetensors files, or a GGUF file?"),
    "LZ102": ("config.json is missing, malformed or makes no sense", "Take it from where the model was published."),
    "LZ103": ("a file of weights is truncated", "Download it again."),
    "LZ104": ("a git-LFS pointer, or an unfinished download", "Run `git lfs pull`, or download again."),
    "LZ105": ("the header of a file of weights is damaged", "Download it again."),
    "LZ106": ("index and shards disagree", "Download all shards and the index from one revision."),
    "LZ107": ("a path that leaves the folder, or a link to itself", "Put the file itself there."),
    "LZ108": ("a tensor holds NaN or infinity", "The model is damaged; download it again."),
    "LZ109": ("a tensor has another shape than config.json implies", "Is it the config.json of these weights?"),
    "LZ110": ("config.json and the weights differ in the number of layers", "Is it the config.json of these weights?"),
    "LZ111": ("a tensor is missing, or there is one too many", "Are all files there, and only those of this model?"),
    "LZ112": ("embeddings are said to be tied, and are not", "Set tie_word_embeddings to what is true."),
    "LZ113": ("only pickled weights", "Convert them to safetensors; pickles can run code and are never opened."),
    "LZ114": ("a file is not what the hub published", "Download it again."),
    "LZ115": ("an adapter, not a model", "Merge it into its model first."),
    "LZ116": ("the tokenizer cannot be loaded", "Copy tokenizer.json and tokenizer_config.json from the model."),
    "LZ117": ("the tokenizer makes tokens that the embedding does not have", "Is it this model's own tokenizer?"),
    "LZ118": ("an output of latentize is damaged, or is none", "Convert again."),
    "LZ119": ("several GGUF files, or one part of several", "Name one file; merge parts into one."),
    "LZ120": ("a package that quantised weights need is not installed", "`pip install 'latentize[gguf,quantised]'`."),
    "LZ121": ("sizes in config.json contradict each other", "Take it from where the model was published."),
    "LZ122": ("a checkpoint is read otherwise than transformers reads it", "Report it, with config.json."),
    "LZ123": ("a model of text alone, asked to see", "Load it by AutoModelForCausalLM."),
    "LZ201": ("an architecture without a table", "See docs/adding-a-family.md."),
    "LZ202": ("the output format, or the file type, cannot hold this", "Use --format native, or another --type."),
    "LZ203": ("the model has latent attention already", "Lower its rank (docs/lower-rank.md), or convert its source."),
    "LZ204": ("weights quantised in a way that is not read", "Use the unquantised checkpoint."),
    "LZ205": ("an active sliding window, or layers of other kinds", "Only full attention can be converted."),
    "LZ206": ("soft-capped logits", "No latent attention of an engine has them."),
    "LZ207": ("model or tokenizer need code from the checkpoint", "Read it; `--trust-remote-code` runs it."),
    "LZ208": ("a RoPE scaling that is not known", "The message names those that are."),
    "LZ209": ("RoPE on a part of each head, where the family or the method has it on all", "Use --method calibrated."),
    "LZ210": ("a published method that cannot treat qk-norm", "Use --method calibrated."),
    "LZ211": ("encoder-decoder or multimodal", "Only decoders of text can be converted."),
    "LZ212": ("an operation in attention that has no counterpart", "The message says which."),
    "LZ213": ("a projection whose matrix cannot be read", "Merge or unload the adapter, or decelerate the model."),
    "LZ301": ("an option with an impossible value", "The message says which values there are."),
    "LZ302": ("text that is missing, unreadable or too short", "Give other --data."),
    "LZ303": ("sizes of latent or roped key that are out of bounds", "The message says what would fit."),
    "LZ304": ("a budget that no sizes fit", "Keep more, or give sizes."),
    "LZ305": ("a recipe that cannot be read", "A recipe is a YAML mapping, or an output's latentize.json."),
    "LZ401": ("the output exists already", "Remove it, or choose another."),
    "LZ402": ("the output folder cannot be made", "Choose a folder that can be written."),
    "LZ403": ("writing failed", "Make room on the disk; then go on with --resume."),
    "LZ404": ("the output would overwrite the model", "Choose another folder."),
    "LZ405": (
        "what was measured, or a chart of it, cannot be kept",
        "Make room, or the place; what was measured already was printed.",
    ),
    "LZ406": ("something else has come to be where the output goes", "Move it away, then go on with --resume."),
    "LZ411": ("something unfinished is there", "Go on with --resume, or remove it."),
    "LZ412": ("what is unfinished was asked for something else", "Use the same model, text and options."),
    "LZ413": ("another process is at it", "Wait for it, or end it."),
    "LZ421": ("the disk has not enough room", "Make room, or choose another disk."),
    "LZ422": ("memory does not suffice", "End other programs, give fewer --tokens, or use a larger machine."),
    "LZ423": ("of several processes one has ended", "What that one said is the reason; then go on with --resume."),
    "LZ501": ("an engine is missing, stops, or computes something else", "See docs/engines.md."),
    "LZ601": ("conversion left the range of numbers", "Does the model itself predict anything?"),
}


class LatentizeError(Exception):
    """Base of all user-facing errors.

    Args:
        what: What is wrong, one sentence.
        where: The file, tensor, config key or option that is concerned.
        fix: What the user can do about it; by default what helps against all of its code.
        code: Of this very refusal; by default that of the class.
    """

    code = "LZ000"

    def __init__(self, what: str, *, where: str = "", fix: str = "", code: str = "") -> None:
        self.code = code or self.code
        self.what, self.where = what, where
        self.fix = fix or CODES.get(self.code, ("", ""))[1]
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

    code = "LZ411"


class ResourceError(LatentizeError):
    """Memory or disk do not suffice."""

    code = "LZ421"


class NumericsError(LatentizeError):
    """Conversion computed something that is not a finite number."""

    code = "LZ601"


def documentation() -> str:
    """The text of docs/errors.md."""
    lines = [
        "# Errors",
        "",
        "Every refusal has a code that stays, says what is wrong, where, and how to mend it, exits with status 2 and",
        "leaves nothing half-written. Made by `python -m latentize.errors > docs/errors.md`.",
        "",
        "| code | what | what to do |",
        "|---|---|---|",
        *(f"| {code} | {what} | {fix} |" for code, (what, fix) in CODES.items()),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(documentation(), end="")
