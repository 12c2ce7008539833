"""What this machine keeps: the local cache and downloaded bundles."""
