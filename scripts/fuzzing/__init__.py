"""What scripts/fuzz.py damages, how, and what it looks at afterwards."""
