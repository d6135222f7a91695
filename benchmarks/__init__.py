"""Measurements against peers and against the machine's limits; timings live here, never in tests."""
