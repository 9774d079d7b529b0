"""From what is asked for to images: conditions, the loop, runs on disk."""
