"""What a bundle is: its files, manifest, graphs and adapter files, and the checks of each."""
