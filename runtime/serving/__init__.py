"""Serving: an engine that keeps a bundle's rows busy with images that begin whenever a row falls free."""
