"""Runs on a cluster: checks, start, supervision, reports."""
