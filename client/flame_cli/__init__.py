"""The `flame` command."""
