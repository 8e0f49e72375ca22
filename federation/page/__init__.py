"""The page of a run: what metrics.json and log.txt say, in a browser. It imports nothing that starts a process."""
