"""What a conversion cost, measured on the files that were written."""

from latentize._callable import call_as

call_as(__name__, "latentize.api", "evaluate")
