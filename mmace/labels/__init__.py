"""Honest DFT labels: plans, engines, quality gate, runner."""
