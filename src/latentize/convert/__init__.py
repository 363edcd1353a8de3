"""The mathematics of conversion, and the pipeline that applies it layer by layer."""

from latentize._callable import call_as

call_as(__name__, "latentize.api", "convert")
