"""Processes, engines, logs: how a stage runs, not what it computes."""
