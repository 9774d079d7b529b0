"""What a bundle is: its manifest, its geometry, its plans."""
