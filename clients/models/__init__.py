"""Models the sites may train, one file each."""
