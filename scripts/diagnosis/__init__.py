"""Checks of scripts/doctor.py, one module per topic; scripts/doctor.py lists them."""
