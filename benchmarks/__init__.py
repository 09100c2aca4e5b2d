"""The programs that measured the numbers of docs/benchmarks.md."""
