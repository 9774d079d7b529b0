"""A small Janus that draws pictures from words: its data, its two trainings, and the folder it is published in."""
