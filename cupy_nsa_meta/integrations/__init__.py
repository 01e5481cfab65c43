"""Bridges into serving engines; nothing here is imported with the package."""
