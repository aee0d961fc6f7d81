"""Finds a model's files by the name a user gives (placeholder: see the helper's work)."""
