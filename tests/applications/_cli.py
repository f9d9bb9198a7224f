"""What the tests of the commands share."""

TINY = "basic 64 @ 8x8"  # the quickest case of a benchmark
