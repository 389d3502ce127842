"""ia3rt inside inference engines. Importing this package imports no engine."""
