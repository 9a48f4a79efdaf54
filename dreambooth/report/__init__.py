"""report.html: what a run folder holds, on one page that needs nothing else; and several runs side by side."""
