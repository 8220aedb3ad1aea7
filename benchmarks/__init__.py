"""One file per question; each is a command that writes a CSV, a plot, and its table in the README or docs/results.md."""
