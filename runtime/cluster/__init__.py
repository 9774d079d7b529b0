"""Several machines: batches of a run, and replicas of a server, on a Ray cluster."""
