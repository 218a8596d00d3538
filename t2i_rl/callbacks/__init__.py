"""Lightning callbacks, one file and one YAML each."""
