"""Figures, tables and progress from plain data. Imports nothing else of mmcli."""
