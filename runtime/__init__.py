"""What drives a bundle, with numpy and one inference runtime. Importing any of it never imports torch."""
