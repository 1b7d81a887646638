"""The commands, a file per group. Each parses, calls one function, and prints; heavy modules are imported inside it."""
