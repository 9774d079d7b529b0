"""How fast a bundle runs, and how good its images are."""
