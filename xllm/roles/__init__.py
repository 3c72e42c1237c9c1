"""The processes of a cluster: what `--role` selects, composed from the packages below."""
