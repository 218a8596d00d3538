"""report.html and what stands in it."""
