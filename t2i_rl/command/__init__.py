"""The command line: composition, checks, folders, resuming, sweeps."""
