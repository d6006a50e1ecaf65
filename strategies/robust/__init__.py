"""Robust aggregation rules that compare the clients of one round, or follow them through rounds."""
