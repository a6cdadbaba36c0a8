"""Sweeps over `sigray train` runs. Imports everything below it; nothing imports it but the command line."""
