"""Recovering what a conversion lost, with a sliver of data: distillation from the source."""

from latentize._callable import call_as

call_as(__name__, "latentize.api", "heal")
