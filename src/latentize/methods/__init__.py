"""One layer in, one layer out: statistics, ways to split keys, and low rank. The mathematics of conversion."""
