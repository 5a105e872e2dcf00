"""The record of a run: written once as JSONL, read, summarised, compared and shown."""
