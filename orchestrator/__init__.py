"""From a config to a run on a cluster: checks, starts, watches, reports. Imports `workers` and `losses`."""
