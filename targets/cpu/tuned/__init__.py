"""Schedules that come with v4c for common shapes: one tuning database (JSON) per x86-64 level."""
