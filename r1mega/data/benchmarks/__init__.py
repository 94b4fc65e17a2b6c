"""Benchmarks in the schemas they were published in, one module each: `prompt_of(row, where)` makes a prompt of a row."""
