"""Figures from plain data. Imports nothing else of mmcli."""
