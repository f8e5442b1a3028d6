"""The process that owns time: it keeps every call's story. Run as ``flame-orchestrator``."""
