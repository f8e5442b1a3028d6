"""Clusters: where workers come from."""
