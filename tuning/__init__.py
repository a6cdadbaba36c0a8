"""Sweeps over `sigray train` runs: the top package, which no other imports."""
