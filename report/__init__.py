"""Figures, tables, notes and progress. At run time it imports nothing else of mmcli; types of results are for mypy."""
