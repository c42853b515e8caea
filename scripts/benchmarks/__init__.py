"""Benchmarks against the published code; the timing in them also serves scripts/doctor.py."""
