"""Pictures and pages, self-contained."""
