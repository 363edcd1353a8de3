"""Recovering what a conversion lost, with a sliver of data: distillation from the source."""
