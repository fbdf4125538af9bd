"""Faults, injected and counted: after each the results equal a quiet run's bit for bit, every sample exactly once."""
