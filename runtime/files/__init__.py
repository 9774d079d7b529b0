"""Files: replaced at once, locked, read within bounds."""
