"""The head as a module: its inputs, fusions, attention, MLPs and losses."""
