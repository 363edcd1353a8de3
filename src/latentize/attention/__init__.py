"""Reference attention: short, readable, and the oracle of every test."""
